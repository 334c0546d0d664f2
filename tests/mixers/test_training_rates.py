"""A short training at the common rate must not undo what a start from data has reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mixer_sites import make_site, qkv
from torch import Tensor, nn

from rewriter.distill import Rows, Silent
from rewriter.distill.config import LayerStage
from rewriter.distill.copies import core_names, core_rates
from rewriter.distill.losses import output_error
from rewriter.distill.stages import Losses
from rewriter.distill.trainer import Trainer
from rewriter.mixers.base import Mixer
from rewriter.mixers.registry import get
from rewriter.mixers.tokens import Tokens

WIDTH = 512  # of the stream: several heads wide


class Owner(nn.Module):
    """A module with one core, as a rewrite leaves it."""

    def __init__(self, core: Mixer) -> None:
        super().__init__()
        self.core = core


class Imitate:
    """Stage 1 of one core on given tokens."""

    name = "layers"
    body: Mapping[str, nn.Parameter] = {}

    def __init__(self, student: nn.Module, x: Tokens, target: Tensor) -> None:
        self.student, self.x, self.target = student, x, target
        self.core = {n: student.get_parameter(n) for n in core_names(student)}
        self.rates = core_rates(student)
        self.groups = [list(self.core)]

    def backward(self, rows: Rows, scale: float, ready: Any = None) -> Losses:
        loss = error(self.student, self.x, self.target)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return Losses(loss.item(), {})

    def write(self, values: Mapping[str, Tensor], student: nn.Module) -> None:
        raise NotImplementedError


def error(student: nn.Module, x: Tokens, target: Tensor) -> Tensor:
    out = student.get_submodule("core").mix(x)[0]  # type: ignore[operator]
    return output_error(out.transpose(1, 2).flatten(2), target.transpose(1, 2).flatten(2))


def problem(n: int, seed: int) -> tuple[Tokens, Tensor]:
    """Tokens, and softmax attention over them."""
    q, k, v = qkv(make_site(heads=(4, 2, 16)), n, seed=seed)
    hidden = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], -1)
    mixed = torch.randn(hidden.shape[-1], WIDTH, generator=torch.Generator().manual_seed(9))
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    target = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    return Tokens(q, k, v, hidden @ mixed / hidden.shape[-1] ** 0.5), target


@pytest.mark.parametrize("name", ["linear_shortcut", "s4d", "gla", "sigmoid_attention"])
def test_training_goes_on_from_the_fit(name: str) -> None:
    site = make_site(heads=(4, 2, 16), hidden_dim=WIDTH)
    core = get(name)(site, get(name).Options())
    x, target = problem(384, 1)
    core.fit(x, target)
    student = Owner(core)
    stage = Imitate(student, x, target)
    before = error(student, x, target).item()
    rows = Rows(torch.zeros(1, 4, dtype=torch.long))
    Trainer(rows, 0, Silent()).run(stage, LayerStage(steps=12))
    assert error(student, x, target).item() < before * 1.05  # a least-squares fit is the optimum


def test_rates_are_those_of_the_modules_inside() -> None:
    site = make_site(heads=(4, 2, 16), hidden_dim=WIDTH)
    rates = core_rates(Owner(get("s4d")(site, get("s4d").Options())))
    assert rates == {
        **dict.fromkeys(("core.log_rate", "core.frequency", "core.log_step", "core.read"), 1 / 30),
        "core.skip": 1.0,
        "core.gate.linear.weight": 64 / WIDTH,
        "core.gate.linear.bias": 1.0,
    }
