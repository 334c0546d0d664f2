"""A contract that never fails proves nothing: each is shown a mixer that breaks it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixer_sites import make_site

from rewriter.mixers.base import Mixer
from rewriter.mixers.tokens import Tokens
from rewriter.passes.verify.cores import check_core

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def running_mean() -> type[Mixer]:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {"__name__": "documented"}
    exec(compile(code.group(1), str(PAGE), "exec"), scope)
    found = scope["RunningMean"]
    assert issubclass(found, Mixer)
    return found


Correct = running_mean()


class WrongHeads(Correct):  # type: ignore[misc, valid-type]
    """Tiles the key/value heads instead of repeating each."""

    def mix(self, x: Tokens) -> Any:
        out, state = super().mix(x)
        group = self.site.heads.group
        kept = out[:, ::group]
        return torch.cat([kept] * group, dim=1), state


class ForgetsItsState(Correct):  # type: ignore[misc, valid-type]
    def mix(self, x: Tokens) -> Any:
        out, _ = super().mix(replace(x, state=None))
        return out, x.state


class SeesTheFuture(Correct):  # type: ignore[misc, valid-type]
    def mix(self, x: Tokens) -> Any:
        out, state = super().mix(x)
        return out + 0.1 * x.v.mean(2, keepdim=True).repeat_interleave(
            self.site.heads.group, 1
        ), state


class IgnoresPadding(Correct):  # type: ignore[misc, valid-type]
    def mix(self, x: Tokens) -> Any:
        return super().mix(replace(x, valid=None))


class MixesTheBatch(Correct):  # type: ignore[misc, valid-type]
    def mix(self, x: Tokens) -> Any:
        out, state = super().mix(x)
        return out + 0.1 * out.mean(0, keepdim=True), state


def failures(mixer: type[Mixer]) -> set[str]:
    core = mixer(make_site(), mixer.Options())
    return {f"{r.number} {r.check}" for r in check_core(core, "a test") if r.outcome == "fail"}


def test_the_correct_one_breaks_nothing() -> None:
    assert failures(Correct) == set()


@pytest.mark.parametrize(
    ("mixer", "broken"),
    [
        (WrongHeads, "2 query head h reads KV head h // group"),
        (ForgetsItsState, "3 prefill + decode = full"),
        (SeesTheFuture, "4 later tokens change nothing earlier"),
        (IgnoresPadding, "4 left padding changes nothing"),
        (IgnoresPadding, "4 fully masked rows give 0"),
        (MixesTheBatch, "4 batch rows are independent"),
    ],
)
def test_a_broken_mixer_is_caught(mixer: type[Mixer], broken: str) -> None:
    assert broken in failures(mixer)
