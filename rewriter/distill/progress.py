"""What a running distillation tells: a small protocol, a rich display and plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Progress:
    """State after one optimiser step.

    Attributes:
        stage: 'layers' or 'logits'.
        step: steps done, counted from 1.
        steps: steps in all, or None where time alone limits the stage.
        fraction: part of the budget that is used, 0 to 1.
        loss: mean over layers (stage 1) or nats a token (stage 2).
        parts: loss of each rewritten module (stage 1 only).
        lr: learning rate of the new parameters.
        tokens_per_second: tokens trained on a second, over this process.
        seconds_left: estimate to the end of the stage.
    """

    stage: str
    step: int
    steps: int | None
    fraction: float
    loss: float
    parts: Mapping[str, float]
    lr: float
    tokens_per_second: float
    seconds_left: float


class Reporter(Protocol):
    """Receives progress. It must not raise and must not touch the models."""

    def update(self, progress: Progress) -> None: ...

    def message(self, text: str) -> None: ...


class Silent:
    """Reports nothing."""

    def update(self, progress: Progress) -> None:
        return

    def message(self, text: str) -> None:
        return


def summary(progress: Progress) -> str:
    """One line for people and logs."""
    steps = f"{progress.step}/{progress.steps}" if progress.steps else f"{progress.step}"
    worst = ""
    if progress.parts:
        name = max(progress.parts, key=lambda key: progress.parts[key])
        worst = f", highest {progress.parts[name]:.4f} in {name}"
    return (
        f"{progress.stage} step {steps}: loss {progress.loss:.4f}{worst}, "
        f"{progress.tokens_per_second:.0f} tokens/s, {duration(progress.seconds_left)} left"
    )


def duration(seconds: float) -> str:
    """Seconds as '4m05s' or '42s'."""
    whole = max(0, round(seconds))
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


@dataclass
class PlainLines:
    """A line every `every` seconds and at the end of a stage; for logs and pipes."""

    stream: IO[str] = field(default_factory=lambda: sys.stderr)
    every: float = 10.0
    _last: float = field(default=float("-inf"), init=False)

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= self.every or progress.fraction >= 1.0:
            self._last = now
            self.message(summary(progress))

    def message(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


class LiveProgress:
    """A live display on a terminal, plain lines anywhere else. Use as a context manager."""

    def __init__(self, console: Console | None = None, every: float = 10.0):
        self.console = console or Console(stderr=True)
        self._plain = PlainLines(self.console.file, every)
        self._live: Live | None = None

    def __enter__(self) -> LiveProgress:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, progress: Progress) -> None:
        if self._live is None:
            self._plain.update(progress)
        else:
            self._live.update(render(progress))
            if progress.fraction >= 1.0:
                self.message(summary(progress))

    def message(self, text: str) -> None:
        if self._live is None:
            self._plain.message(text)
        else:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def render(progress: Progress, columns: int = 3) -> Group:
    """Summary, bar and the loss of each layer."""
    bar = ProgressBar(total=1.0, completed=min(1.0, progress.fraction), width=60)
    table = Table.grid(padding=(0, 2))
    cells = [f"{name} {value:.4f}" for name, value in progress.parts.items()]
    for start in range(0, len(cells), columns):
        table.add_row(*cells[start : start + columns])
    return Group(Text(summary(progress)), bar, table)
