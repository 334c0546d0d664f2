"""Apply a plan: every planned owner of the model becomes its re-emitted form, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from rewriter.errors import UsageError, VerificationError
from rewriter.ir.site import AttentionSite
from rewriter.mixers import registry
from rewriter.passes.examples import Call, Examples, examples_for
from rewriter.passes.realise.cache_probe import cache_layers
from rewriter.passes.realise.calls import Observed, made_anew, observe
from rewriter.passes.realise.owner import EmissionCache, ReEmitted, UntracedError, make_owner
from rewriter.passes.realise.sizes import Name, SizeBook, Sizes
from rewriter.passes.realise.visibility import ensure_called
from rewriter.plan import Plan

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Target:
    """One site and the mixer that will serve it."""

    site: AttentionSite
    mixer: str
    options: Mapping[str, Any]


def targets_of(plan: Plan) -> list[Target]:
    """The sites a plan rewrites (planned or done); refused ones stay as they are."""
    return [
        Target(AttentionSite.from_json(d.site), d.target, d.options)
        for d in plan.decisions
        if d.status != "refused"
    ]


def apply_plan(model: M, plan: Plan, examples: Examples | None = None) -> M:
    """Rewrite `model` in place as the plan says and return it.

    New parameters are created with their initial values; load a state dict to restore trained ones.

    Args:
        model: a model with the owners that the plan names.
        plan: decisions with matched facts; refused ones are skipped.
        examples: how to call the model; derived from its config by default.

    Raises:
        UsageError: the plan names a module the model does not have.
        VerificationError: an owner does not run as often as it did when the plan was made.
    """
    from rewriter.passes.exact.rest import rest  # these need realisation themselves
    from rewriter.passes.realise.channel import superseded
    from rewriter.passes.step import attach_later

    rewritten = rest(realise(model, targets_of(plan), examples), plan)
    if not superseded(plan.mlps):
        attach_later(rewritten)
    return rewritten


Caches = dict[tuple[tuple[tuple[str, str, str], ...], type[nn.Module]], EmissionCache]


def realise(
    model: M,
    targets: Sequence[Target],
    examples: Examples | None = None,
    caches: Caches | None = None,
) -> M:
    """Re-emit the owners of `targets` in place, each with its mixer as `core`.

    Args:
        caches: traces by group of identical layers; pass the same dict when one model is realised
            several times.
    """
    if not targets:
        return model
    examples = examples if examples is not None else examples_for(model)
    by_owner = _by_owner(targets)
    owners = list(by_owner)
    for fqn in owners:
        _existing(model, fqn)
    first = observe(model, owners, examples.primary)
    second = observe(model, owners, examples.resized)
    layers = cache_layers(model, owners, examples)
    sizes = (call_sizes(examples.primary), call_sizes(examples.resized))
    caches = {} if caches is None else caches
    unknown = False
    for fqn, members in by_owner.items():
        sites = [t.site for t in members]
        _runs_as_found(sites[0], first[fqn])
        for one, other in zip(first[fqn], second[fqn], strict=False):
            name = made_anew(one.named, other.named)
            if name is not None:
                reason = f"each call of '{fqn}' brings a new {name}, which no trace can take"
                raise UntracedError(sites[0], reason)
        owner = model.get_submodule(fqn)
        facts = tuple((s.core, s.fingerprint or fqn, s.core_hash()) for s in sites)
        key = (facts, type(owner))
        if key not in caches:
            book = SizeBook()
            for one, other in zip(first[fqn], second[fqn], strict=False):
                book.learn(one.named, other.named, sizes)
            outputs = _cache_outputs(first[fqn][0].output)
            caches[key] = EmissionCache(type(owner), book, outputs)
        places = _cache_places(sites, layers.get(fqn, ()))
        cores = [
            (t.site, build_core(t, places[t.site.slot], owner))
            for t in sorted(members, key=lambda t: t.site.slot)
        ]
        make_owner(owner, cores, caches[key])
        unknown |= any(len(s.terms) > 1 and s.slot not in caches[key].origins for s in sites)
    padded = examples.variants.get("left padding")
    if padded is not None and unknown:
        # A call without padding may come without its mask; which term is which shows in this one.
        with torch.no_grad():
            model(*padded.args, **padded.kwargs)
    ensure_called(model, owners, examples.primary)
    return model


def _by_owner(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """One target for each block of each owner; the runs of an owner share it.

    Raises:
        UsageError: runs of one owner are to become different things.
    """
    out: dict[str, dict[int, list[Target]]] = {}
    for target in targets:
        out.setdefault(target.site.fqn, {}).setdefault(target.site.slot, []).append(target)
    for fqn, slots in out.items():
        for runs in slots.values():
            wanted = {(t.mixer, repr(sorted(t.options.items()))) for t in runs}
            if len(wanted) > 1 or len(runs) != runs[0].site.runs:
                raise UsageError(different_runs(fqn, runs[0].site.runs))
    return {fqn: [runs[0] for _, runs in sorted(slots.items())] for fqn, slots in out.items()}


def different_runs(fqn: str, runs: int) -> str:
    """Why a plan that treats runs of one module differently cannot be carried out."""
    return (
        f"'{fqn or 'the model'}' runs {runs} times in one forward pass with the same weights, so "
        "all its runs need the same mixer: select all of its sites or none"
    )


def _cache_places(sites: Sequence[AttentionSite], found: Sequence[int]) -> dict[int, int | None]:
    """The cache layer of each block of an owner, where it is known.

    A module that runs several times fills several layers, of which its one mixer can have none.
    """
    places: dict[int, int | None] = dict.fromkeys((s.slot for s in sites), None)
    if sites[0].runs > 1 or not found:
        return places
    if sites[0].slots == 1:
        return {sites[0].slot: found[0]}
    filling = [s.slot for s in sites if s.kind == "causal" and not s.cross]
    if len(found) == sites[0].slots == len(sites):
        filling = [s.slot for s in sites]
    if len(found) == len(filling):
        places.update(zip(filling, found, strict=True))
    return places


def build_core(target: Target, layer: int | None, owner: nn.Module) -> nn.Module:
    """A fresh mixer for a site, on the device and in the dtype of the owner's parameters."""
    mixer = registry.get(target.mixer)
    core = mixer(target.site, mixer.Options(**target.options), layer)
    like = next((p for p in owner.parameters() if p.is_floating_point()), None)
    if like is not None:
        core = core.to(device=like.device, dtype=like.dtype)
    return core.train(owner.training)


def call_sizes(call: Call) -> Sizes:
    """Batch, tokens and, if a second sequence is there, its length, read off the tensors of a call.

    The first tensor gives batch and tokens; the first integer tensor of another length the source.
    """
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)]
    first = next((x for x in tensors if x.dim() >= 2), None)
    if first is None:
        raise UsageError("the example inputs hold no tensor with a batch and a token dimension")
    sizes: dict[Name, int] = {"batch": int(first.shape[0]), "tokens": int(first.shape[1])}
    for x in tensors:
        if x.dim() == 2 and not x.is_floating_point() and x.shape[1] != first.shape[1]:
            sizes.setdefault("source", int(x.shape[1]))
    return sizes


def _existing(model: nn.Module, fqn: str) -> None:
    try:
        module = model.get_submodule(fqn)
    except AttributeError:
        raise UsageError(
            f"the plan names the module '{fqn}', which this model does not have; "
            "make a new plan for it with `rewriter plan`"
        ) from None
    if isinstance(module, ReEmitted):
        raise UsageError(
            f"'{fqn or 'the model'}' is rewritten already; rewrite the original model instead"
        )


def _runs_as_found(site: AttentionSite, calls: Sequence[Observed]) -> None:
    if len(calls) != site.runs:
        raise VerificationError(
            f"'{site.fqn or 'the model'}' runs {len(calls)} times in one forward pass, but its "
            f"attention was found in {site.runs} of them"
        )


def _cache_outputs(output: Any) -> tuple[int, ...]:
    """Positions of cache objects among the flat outputs; the emitted code hands them on."""
    leaves = pytree.tree_leaves(output, is_leaf=lambda x: isinstance(x, Cache))
    return tuple(n for n, leaf in enumerate(leaves) if isinstance(leaf, Cache))
