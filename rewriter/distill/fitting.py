"""The start from data: every new core sets what it can from tokens and the original's outputs.

One forward of the rewritten model. Behind every core a hook computes what the original softmax
gives for the same queries, keys and values, lets the core fit itself to it, and hands the
original's output on, so that every layer sees the teacher's own stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.distill.copies import rewritten_owners
from rewriter.mixers.base import Mixer
from rewriter.mixers.exact.keep import Keep, KeepOptions


@dataclass(frozen=True)
class Fitted:
    """How far one core was and is from the original: |core - original| / |original|."""

    fqn: str
    mixer: str
    before: float
    after: float


def fit_cores(model: nn.Module, call: Mapping[str, Any]) -> tuple[Fitted, ...]:
    """Fit all new cores of a rewritten model in place, and say what it gave.

    Args:
        model: rewritten, its layers not trained yet.
        call: arguments of one forward, some thousand tokens of ordinary text; no cache.
    """
    report: list[Fitted] = []
    with ExitStack() as stack, torch.no_grad():
        for fqn, core in rewritten_owners(model).items():
            handle = core.register_forward_hook(_hook(fqn, core, report), with_kwargs=True)
            stack.callback(handle.remove)
        model(**{**call, "use_cache": False})
    return tuple(report)


def _hook(fqn: str, core: Mixer, report: list[Fitted]) -> Any:
    original = Keep(core.site, KeepOptions()).eval()

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        q, k, v, terms = args
        target = original(q, k, v, terms)[0]
        x = core.tokens(q, k, v, terms, kwargs.get("hidden"))
        before = _gap(output[0], target, x.valid)
        core.fit(x, target)
        report.append(Fitted(fqn, core.info.name, before, _gap(core.mix(x)[0], target, x.valid)))
        return target, None

    return hook


def _gap(out: Tensor, target: Tensor, valid: Tensor | None) -> float:
    if valid is not None:
        out, target = (t.transpose(1, 2)[valid] for t in (out, target))
    error = (out.float() - target.float()).norm() / target.float().norm().clamp_min(1e-30)
    return float(error)
