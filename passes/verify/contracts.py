"""All ten contracts, in order, on one rewrite."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.mixers.base import Mixer
from rewriter.mixers.placed import core_at
from rewriter.mixers.registry import get
from rewriter.passes.compare import max_difference
from rewriter.passes.exact import fused, linears, padding
from rewriter.passes.examples import Examples
from rewriter.passes.realise import Caches, Target
from rewriter.passes.realise.channel import superseded
from rewriter.passes.verify.accounting import check_accounting, check_keys, check_round_trip
from rewriter.passes.verify.channel import MlpProof, check_mlps
from rewriter.passes.verify.cores import check_core
from rewriter.passes.verify.exact import BOUND, HALF, check_exact
from rewriter.passes.verify.gap import check_gap
from rewriter.passes.verify.layers import check_layers
from rewriter.passes.verify.proof import EXACT, SiteProof, cached_difference
from rewriter.passes.verify.speed import check_speed
from rewriter.passes.verify.whole import check_model, run_call
from rewriter.plan import Plan

Level = Literal["full", "quick", "layers", "none"]


def verify(
    original: nn.Module,
    identity: nn.Module,
    rewritten: nn.Module,
    targets: Sequence[Target],
    proofs: Sequence[SiteProof],
    examples: Examples,
    level: Level = "full",
    wanted_length: int | None = None,
    forced: bool = False,
    caches: Caches | None = None,
    plan: Plan | None = None,
    mlp_proofs: Sequence[MlpProof] = (),
) -> list[ContractResult]:
    """Run the contracts.

    Args:
        original: the model as it was.
        identity: the same with every proved site re-emitted with the exact core.
        rewritten: the result.
        targets: what was rewritten to what.
        proofs: the site proofs (`prove_sites`).
        examples: how to call the model.
        level: 'full'; 'quick' leaves out speed and the teacher gap; 'layers' runs the original a
            few times, and what was rewritten module by module; 'none' runs nothing.
        wanted_length, forced: for contract 10, see `check_speed`.
        caches: traces made so far, see `realise`.
        plan: what was done beside attention.
        mlp_proofs: the proofs of MLP blocks (`prove_mlps`).
    """
    if level == "none":
        return []
    exact = [t for t in targets if get(t.mixer).info.tier == "exact"]
    changed = [t for t in targets if t not in exact]
    causal = bool(targets) and all(t.site.mask.causal for t in targets)
    out: list[ContractResult] = []
    # After the model has run with every pattern of absent inputs, all emissions are known.
    if level == "layers":
        out += check_layers(original, rewritten, targets, proofs, examples)
    else:
        out += check_model(original, rewritten, examples, causal)
    out += check_accounting(rewritten, targets)
    for core, subject in _distinct(rewritten, changed):
        out += check_core(core, subject)
    if level != "layers":
        out += _identity(original, identity, proofs, examples)
    mlps = plan.mlps if plan is not None else ()
    out += check_keys(original, rewritten, mlps)
    if level != "layers":
        out += check_round_trip(original, rewritten, targets, examples, caches, plan)
    if plan is not None:
        out += linears.results(rewritten, plan.linears)
        out += fused.results(plan.fused, next(original.parameters()).dtype)
        out += padding.results(plan.packed, next(original.parameters()).dtype)
    touched = {t.site.fqn for t in changed}
    out += check_exact(
        original, rewritten, [t for t in exact if t.site.fqn not in touched], examples
    )
    out += check_mlps(original, rewritten, mlps, mlp_proofs, examples)
    if level != "layers" and not changed and not superseded(mlps):
        packed = plan is not None and any(x.status != "refused" for x in plan.packed)
        out += _lossless(original, rewritten, examples, packed)
    if level in ("full", "layers"):
        out += check_gap(original, rewritten, changed, examples)
    if level == "full":
        for core, subject in _distinct(rewritten, [t for t in targets if t.mixer != EXACT]):
            out += check_speed(core, subject, wanted_length, forced)
    return sorted(out, key=lambda result: result.number)


def _distinct(model: nn.Module, targets: Sequence[Target]) -> Iterator[tuple[Mixer, str]]:
    """One fp32 CPU copy of each different core, with the number of sites it stands for."""
    groups: dict[str, list[Target]] = {}
    for target in (t for t in targets if t.site.run == 0):
        options = json.dumps(dict(target.options), sort_keys=True)
        groups.setdefault(f"{target.site.core_hash()} {target.mixer} {options}", []).append(target)
    for members in groups.values():
        core = core_at(model.get_submodule(members[0].site.fqn), members[0].site)
        assert isinstance(core, Mixer)
        count = f" and {len(members) - 1} like it" if len(members) > 1 else ""
        subject = f"{members[0].mixer} at {members[0].site.fqn or 'the model'}{count}"
        yield copy.deepcopy(core).float().cpu().eval(), subject


def _furthest(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    return max(max_difference(x, y) for x, y in zip(found, wanted, strict=True))


def _lossless(
    original: nn.Module, rewritten: nn.Module, examples: Examples, packed: bool
) -> Iterator[ContractResult]:
    """Contract 8 for the whole model: nothing but exact cores gives the original outputs.

    In half precision both round, and depth enlarges that. Where they differ by more than the bound,
    both are held against the original in fp32, and ours may be off by twice what it is off by.

    `packed`: outputs at padded positions are not compared, they are 0.
    """

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        found = []
        for call in (examples.primary, *examples.variants.values()):
            out = run_call(model, call)
            mask = call.kwargs.get(str(examples.padded)) if packed else None
            padded = mask is not None and mask.shape == out.shape[:2]
            found.append(out[mask.bool()] if padded and mask is not None else out)
        return found

    dtype = next(original.parameters()).dtype
    bound, detail = 10 * BOUND.get(dtype, 1e-2), ""
    ours, theirs = outputs(rewritten), outputs(original)
    scale = max(1.0, *(float(x.float().abs().max()) for x in theirs))
    worst = _furthest(ours, theirs) / scale
    if worst > bound and dtype in HALF:
        truth = outputs(copy.deepcopy(original).float())
        own = _furthest(theirs, truth) / scale
        worst = _furthest(ours, truth) / scale / max(1.0, 2 * own / bound)
        detail = f"held against fp32, from which the original itself is {own:.2g} away"
    yield judged(8, "outputs equal the original's", "model", worst, bound, detail)
    if examples.cached:
        measured = cached_difference(rewritten, original, examples) / scale
        yield judged(8, "with a cache they equal the original's", "model", measured, bound)


def _identity(
    original: nn.Module, identity: nn.Module, proofs: Sequence[SiteProof], examples: Examples
) -> Iterator[ContractResult]:
    """Contract 5: the identity plan gives the original outputs."""
    worst = 0.0
    for call in (examples.primary, *examples.variants.values()):
        worst = max(worst, max_difference(run_call(identity, call), run_call(original, call)))
    exact = all(p.bit_exact for p in proofs if p.refusal is None)
    detail = "bit for bit" if worst == 0.0 and exact else "same ops, not bit for bit"
    yield judged(5, "identity plan equals the original", "model", worst, 1e-4, detail)
    if examples.cached:
        measured = cached_difference(identity, original, examples)
        yield judged(5, "identity plan with a cache equals the original", "model", measured, 1e-4)
