"""What hand-written MLPs are made of, and what must be said about one that is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH, HIDDEN, TOKENS = 16, 24, 12
Body = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 4)


def _expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


PARTS: dict[str, Callable[[], nn.Module | torch.Tensor]] = {
    "up": lambda: nn.Linear(WIDTH, HIDDEN),
    "gate": lambda: nn.Linear(WIDTH, HIDDEN),
    "both": lambda: nn.Linear(WIDTH, 2 * HIDDEN),
    "down": lambda: nn.Linear(HIDDEN, WIDTH),
    "norm": lambda: nn.LayerNorm(HIDDEN),
    "last": lambda: nn.Linear(WIDTH, WIDTH),
    "gates": lambda: nn.Linear(WIDTH, WIDTH),
    "narrow": lambda: nn.Linear(WIDTH, 1),
    "w_in": lambda: _parameter(WIDTH, HIDDEN),
    "w_out": lambda: _parameter(HIDDEN, WIDTH),
    "b_in": lambda: _parameter(HIDDEN),
    "b_out": lambda: _parameter(WIDTH),
    "slope": lambda: nn.Parameter(torch.tensor([0.3])),
    "conv_in": lambda: nn.Conv2d(WIDTH, HIDDEN, 1),
    "conv_out": lambda: nn.Conv2d(HIDDEN, WIDTH, 1),
    "line_in": lambda: nn.Conv1d(WIDTH, HIDDEN, 1),
    "line_out": lambda: nn.Conv1d(HIDDEN, WIDTH, 1),
    "wide": lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN),
    "grouped": lambda: nn.Conv1d(WIDTH, HIDDEN, 1, groups=2),
    "mix_in": lambda: nn.Linear(TOKENS, HIDDEN),
    "mix_out": lambda: nn.Linear(HIDDEN, TOKENS),
    "e_in": lambda: _parameter(4, WIDTH, 2 * HIDDEN),
    "e_out": lambda: _parameter(4, HIDDEN, WIDTH),
    "experts": lambda: nn.ModuleList(_expert() for _ in range(3)),
    "router": lambda: nn.Linear(WIDTH, 3),
    "table": lambda: nn.Parameter(torch.randn(TOKENS, WIDTH), requires_grad=False),
}


class Written(nn.Module):
    """A body and those of the parts that it uses."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        body(self, torch.zeros(2, TOKENS, WIDTH))

    def __getattr__(self, name: str) -> Any:
        if name in PARTS and name not in self._modules and name not in self._parameters:
            made = PARTS[name]()
            held = self._parameters if isinstance(made, nn.Parameter) else self._modules
            held[name] = made
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


class Side(nn.Module):
    """Many bodies side by side, so that one capture serves them all: body n is `parts.n`."""

    def __init__(self, bodies: Sequence[Body]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Written(body) for body in bodies)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part(x) for part in self.parts]


@dataclass(frozen=True)
class Says:
    """What must be said about each site; `parts` are the rows of up and gate."""

    activation: str
    kind: str = "plain"
    layout: str = "none"
    up: tuple[int, int, int] = (0, HIDDEN, 1)
    gate: tuple[int, int, int] | None = None
    sites: int = 1
    scale: float = 1.0
    experts: int = 0
    widths: tuple[int, int, int] = (WIDTH, HIDDEN, WIDTH)
