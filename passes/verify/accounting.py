"""Contracts about parameters and keys: nothing unaccounted (1), keys (6), round trip (7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.passes.compare import first_tensor, max_difference
from rewriter.passes.exact.rest import rest
from rewriter.passes.examples import Examples
from rewriter.passes.realise import Caches, Target, realise, share_parameters
from rewriter.passes.realise.channel import superseded
from rewriter.passes.realise.owner import emissions_of
from rewriter.plan import Decision, Plan

MARK = "core"


def check_accounting(rewritten: nn.Module, targets: Sequence[Target]) -> Iterator[ContractResult]:
    """Contract 1 for every owner: parameters read before are read now, drops are named."""
    for fqn in dict.fromkeys(target.site.fqn for target in targets):
        emissions = emissions_of(rewritten.get_submodule(fqn))
        lost = sorted({name for e in emissions for name in e.unaccounted})
        dropped = sorted({text for e in emissions for text in e.dropped})
        if lost:
            detail = "parameters no longer used: " + ", ".join(lost)
        else:
            detail = "; ".join(dropped)
        yield judged(1, "parameters the new code no longer reads", fqn, len(lost), 0, detail)


def is_new_key(key: str) -> bool:
    """Whether a state dict key belongs to a mixer (`core` is a path component)."""
    return MARK in key.split(".")[:-1]


def check_keys(
    original: nn.Module, rewritten: nn.Module, mlps: Sequence[Decision] = ()
) -> Iterator[ContractResult]:
    """Contract 6: the original keys are there, in order; only mixer keys are new; ties hold.

    Weights that became structures have the keys of these instead.
    """
    replaced = superseded(mlps)
    before = [k for k in original.state_dict() if k not in replaced]
    after = [k for k in rewritten.state_dict() if k in set(before) or not is_new_key(k)]
    outcome = 0 if before == after else 1
    yield judged(6, "original keys unchanged and in order", "model", outcome, 0)
    ties = [names for names in _ties(original) if not set(names) & set(replaced)]
    broken = [names for names in ties if len({id(_tensor(rewritten, n)) for n in names}) != 1]
    detail = f"{len(ties)} groups of tied parameters"
    yield judged(6, "tied parameters stay tied", "model", len(broken), 0, detail)


def _ties(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    return dict(model.named_parameters(remove_duplicate=False))[name]


def check_round_trip(
    original: nn.Module,
    rewritten: nn.Module,
    targets: Sequence[Target],
    examples: Examples,
    caches: Caches | None = None,
    plan: Plan | None = None,
) -> Iterator[ContractResult]:
    """Contract 7 in memory: rewrite again, load the state dict strictly, get the same outputs."""
    again = realise(share_parameters(original), targets, examples, caches)
    if plan is not None:
        rest(again, plan)
    again.load_state_dict(rewritten.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        a = first_tensor(again(*examples.primary.args, **examples.primary.kwargs))
        b = first_tensor(rewritten(*examples.primary.args, **examples.primary.kwargs))
    yield judged(7, "state dict of the result rebuilds it", "model", max_difference(a, b), 0.0)
