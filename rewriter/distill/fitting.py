"""The start from data: every new core sets what it can from tokens and the original's outputs.

One forward of the rewritten model. Behind every core a hook computes what the original softmax
gives for the same queries, keys and values, and hands that on, so that every layer sees the
teacher's own stream.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.distill.copies import rewritten_cores
from rewriter.distill.data import Rows
from rewriter.distill.stages import call, uncached
from rewriter.evaluate.scoring import evaluation_mode
from rewriter.mixers.base import Mixer
from rewriter.mixers.exact.keep import Keep, KeepOptions
from rewriter.mixers.tokens import Tokens

Visit = Callable[[str, Mixer, Tokens, Tensor, Tensor], object]


@dataclass(frozen=True)
class Fitted:
    """How far one core was and is from the original: |core - original| / |original|."""

    fqn: str
    mixer: str
    before: float
    after: float


def fit_cores(model: nn.Module, rows: Rows) -> tuple[Fitted, ...]:
    """Fit the new cores of a rewritten model in place, and say what it gave.

    Cores that take nothing from data are left out. One that a fit would move away from the
    original, on these very tokens, stays as it was.

    Args:
        model: rewritten, its layers not trained yet.
        rows: some thousand tokens of ordinary text.
    """
    report: list[Fitted] = []

    def fit(fqn: str, core: Mixer, x: Tokens, out: Tensor, target: Tensor) -> None:
        before, start = _gap(out, target, x.valid), _values(core)
        core.fit(x, target)
        if all(torch.equal(value, start[name]) for name, value in core.state_dict().items()):
            return
        after = _gap(core.mix(x)[0], target, x.valid)
        if not after <= before:
            core.load_state_dict(start)
            after = before
        report.append(Fitted(fqn, core.info.name, before, after))

    _visit(model, rows, fit, lambda core: core.takes_data)
    return tuple(report)


def core_gaps(model: nn.Module, rows: Rows) -> dict[str, float]:
    """|core - original| / |original| of every new core, by path, each on the original's stream."""
    gaps: dict[str, float] = {}

    def measure(fqn: str, core: Mixer, x: Tokens, out: Tensor, target: Tensor) -> None:
        gaps[fqn] = _gap(out, target, x.valid)

    _visit(model, rows, measure)
    return gaps


class _DoneSignal(Exception):  # noqa: N818 - control flow, not a failure
    """Every core has been visited: the rest of the forward, the logits above all, is not needed."""


def _visit(
    model: nn.Module, rows: Rows, visit: Visit, wanted: Callable[[Mixer], bool] = lambda core: True
) -> None:
    """One forward; `visit` gets path, core, tokens, the core's output and the original's."""
    waiting = {core for core in rewritten_cores(model).values() if wanted(core)}
    if not waiting:
        return

    def hook_of(fqn: str, core: Mixer) -> Any:
        original = Keep(core.site, KeepOptions()).eval()

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            q, k, v, terms = args
            target = original(q, k, v, terms)[0]
            if core in waiting:  # of a module that runs several times the first run counts
                waiting.remove(core)
                x = core.tokens(q, k, v, terms, kwargs.get("hidden"))
                visit(fqn, core, x, output[0], target)
                if not waiting:
                    raise _DoneSignal
            return target, None

        return hook

    with ExitStack() as stack, suppress(_DoneSignal), torch.no_grad():
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(uncached(model))
        for path, core in rewritten_cores(model).items():
            fqn = path.removesuffix("core").rstrip(".")
            handle = core.register_forward_hook(hook_of(fqn, core), with_kwargs=True)
            stack.callback(handle.remove)
        call(model, rows)


def _values(core: Mixer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in core.state_dict().items()}


def _gap(out: Tensor, target: Tensor, valid: Tensor | None) -> float:
    if valid is not None:
        out, target = (t.transpose(1, 2)[valid] for t in (out, target))
    error = (out.float() - target.float()).norm() / target.float().norm().clamp_min(1e-30)
    return float(error)
