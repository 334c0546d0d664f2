from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from distill_standin import tiny_student, tiny_teacher, token_rows
from rich.console import Console
from torch import nn

from rewriter.distill import LiveProgress, PlainLines, Progress, Rows, Silent, distill, parse_config
from rewriter.distill.config import LayerStage
from rewriter.distill.stages import Losses
from rewriter.distill.trainer import DivergedError, Trainer, learning_rate


class Line:
    """Fit a line: the smallest stage there is."""

    name = "layers"

    def __init__(self, dtype: torch.dtype = torch.float32, spoil: bool = False):
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.core: dict[str, nn.Parameter] = {} if dtype != torch.float32 else {"w": self.weight}
        self.body: dict[str, nn.Parameter] = {"w": self.weight} if not self.core else {}
        self.groups = [["w"]]
        self.rates = dict.fromkeys(self.core, 1.0)
        self.spoil = spoil

    def backward(self, rows: Rows, scale: float, ready: Any = None) -> Losses:
        x = rows.ids.to(self.weight.dtype)
        loss = ((x @ self.weight).float() - x.float().sum(-1)).square().mean()
        if self.spoil:
            loss = loss * float("nan")
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return Losses(loss.item(), {"a": loss.item()})

    def write(self, values: Any, student: nn.Module) -> None:
        raise NotImplementedError


def rows(count: int = 8) -> Rows:
    return Rows(torch.randint(0, 3, (count, 3), generator=torch.Generator().manual_seed(0)))


def test_accumulated_batches_equal_one_large_batch() -> None:
    outcomes = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        budget = LayerStage(steps=5, batch=batch, accumulate=accumulate)
        outcomes.append(Trainer(rows(), 0, Silent()).run(Line(), budget)[1]["w"])
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0])


def test_masters_keep_what_bfloat16_would_lose() -> None:
    stage = Line(torch.bfloat16)
    budget = LayerStage(steps=40, batch=4, lr=1e-3, schedule="constant", warmup=0)
    _, values = Trainer(rows(), 0, Silent()).run(stage, budget, body_lr=1e-5)
    assert values["w"].dtype == torch.float32
    # Steps of 1e-5 from 0 add up exactly in float32: AdamW moves by about the rate a step.
    torch.testing.assert_close(values["w"], torch.full((3,), 40e-5), rtol=0.2, atol=0)
    assert torch.equal(stage.weight, values["w"].bfloat16())


def test_schedule_warms_up_and_decays() -> None:
    budget = LayerStage(steps=10, warmup=0.2, final=0.1)
    rates = [learning_rate(budget, 1.0, f / 10) for f in range(11)]
    assert rates[0] == 0 and rates[1] == 0.5 and rates[2] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
    assert rates[10] == pytest.approx(0.1)
    linear = LayerStage(steps=10, warmup=0.0, final=0.0, schedule="linear")
    assert learning_rate(linear, 2.0, 0.25) == pytest.approx(1.5)


def test_a_parameter_may_ask_for_a_part_of_the_rate() -> None:
    slow, fast = Line(), Line()
    slow.rates = {"w": 0.1}
    budget = LayerStage(steps=1, lr=1e-2, warmup=0.0, schedule="constant")
    moved = [Trainer(rows(), 0, Silent()).run(stage, budget)[1]["w"] for stage in (slow, fast)]
    torch.testing.assert_close(moved[0], 0.1 * moved[1])


def test_time_budget_ends_a_stage_and_reaches_the_end_of_the_schedule() -> None:
    class Record(Silent):
        seen: list[Progress]

        def __init__(self) -> None:
            self.seen = []

        def update(self, progress: Progress) -> None:
            self.seen.append(progress)

    record = Record()
    result, _ = Trainer(rows(), 0, record).run(Line(), LayerStage(max_seconds=0.3))
    assert 0.3 <= result.seconds < 3
    assert record.seen[-1].fraction == 1.0 and record.seen[-1].steps is None
    assert record.seen[-1].lr < 0.1 * max(p.lr for p in record.seen)
    assert record.seen[0].seconds_left > record.seen[-1].seconds_left >= 0


def test_divergence_stops_with_a_clear_error() -> None:
    with pytest.raises(DivergedError, match=r"step 1 \(the loss of a is not finite\)"):
        Trainer(rows(), 0, Silent()).run(Line(spoil=True), LayerStage(steps=2))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_display(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    teacher = tiny_teacher()
    config = parse_config({"dtype": "float32", "length": 24, "layers": {"steps": 3}})
    with LiveProgress(console, every=0.0) as reporter:
        distill(teacher, tiny_student(teacher), Rows(token_rows()), config, reporter=reporter)
    text = stream.getvalue()
    assert "layers step 3/3: loss" in text and "tokens/s" in text
    assert ("\x1b" in text) == terminal
    assert "stage 'layers': 3 steps, 72 tokens" in text


def test_plain_lines_are_rare_but_end_with_the_last_step() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, every=3600)
    Trainer(rows(), 0, lines).run(Line(), LayerStage(steps=20))
    text = stream.getvalue().splitlines()
    assert len(text) == 2 and "step 1/20" in text[0] and "step 20/20" in text[1]
