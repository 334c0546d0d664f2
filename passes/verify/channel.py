"""Proof and contracts of MLP blocks: the facts rebuild them, and their replacements keep order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.ir.mlp import ChannelMap, MlpSite
from rewriter.mixers.channel.base import Dense, Projection
from rewriter.mixers.channel.registry import get
from rewriter.passes.compare import max_difference, relative_error
from rewriter.passes.examples import Call, Examples
from rewriter.passes.match.mlp.activations import apply
from rewriter.passes.realise.calls import Observed, observe
from rewriter.passes.realise.channel import channel_of, chosen_maps, dense_weight, superseded
from rewriter.plan import Decision

TOLERANCE = 2e-5  # relative to the largest value; the same function in other operators
BOUND = 1e-4


@dataclass(frozen=True)
class MlpProof:
    """Whether the facts of a block rebuild its values in every example call.

    Attributes:
        difference: largest difference of hidden values and outputs, relative to the largest one.
        refusal: why the block cannot be rewritten, or None.
    """

    site: MlpSite
    difference: float
    refusal: str | None = None


def prove_mlps(model: nn.Module, sites: Sequence[MlpSite], examples: Examples) -> list[MlpProof]:
    """Rebuild each block from its facts and compare with what its projections read and give."""
    usable = [s for s in sites if all(m.weight == f"{m.module}.weight" for m in s.maps)]
    names = list(dict.fromkeys(m.module for s in usable for m in s.maps))
    worst: dict[int, float] = {}
    reasons: dict[int, str] = {}
    for call in (examples.primary, *examples.variants.values()):
        seen = observe(model, names, call)
        for site in usable:
            try:
                found = _difference(model, site, seen)
            except (RuntimeError, KeyError) as error:
                reasons[site.index] = f"the block cannot be rebuilt from its facts: {error}"
                continue
            worst[site.index] = max(worst.get(site.index, 0.0), found)
    return [_proof(s, worst.get(s.index), reasons.get(s.index)) for s in sites]


def _proof(site: MlpSite, difference: float | None, reason: str | None) -> MlpProof:
    if reason is not None or difference is None:
        text = reason or "its projections are no modules of their own"
        return MlpProof(site, float("inf"), text)
    if difference > TOLERANCE:
        text = f"the block rebuilt from its facts differs by {difference:.1e}"
        return MlpProof(site, difference, text)
    return MlpProof(site, difference)


def _difference(model: nn.Module, site: MlpSite, seen: Mapping[str, list[Observed]]) -> float:
    worst = 0.0
    down = model.get_submodule(site.down.module)
    for n, read in enumerate(seen[site.down.module]):
        values: dict[str, torch.Tensor] = {}
        for role, part in (("gate", site.gate), ("up", site.up)):
            if part is not None:
                module = model.get_submodule(part.module)
                values[role] = _project(module, part, _rows(seen[part.module][n], module))
        hidden = _rows(read, down)
        if not site.activation.opaque:
            with torch.no_grad():
                expected = apply(site.activation, values.get("gate"), values["up"])
            worst = max(worst, _relative(expected.reshape(hidden.shape), hidden))
        output = read.output.movedim(channel_of(down), -1).reshape(-1, site.output)
        worst = max(worst, _relative(_project(down, site.down, hidden), output))
    return worst


def _rows(observed: Observed, module: nn.Module) -> torch.Tensor:
    """(rows, channels) of what a projection read."""
    x: torch.Tensor = next(iter(observed.named.values()))
    x = x.movedim(channel_of(module), -1)
    return x.reshape(-1, x.shape[-1])


def _project(module: nn.Module, part: ChannelMap, x: torch.Tensor) -> torch.Tensor:
    rows = slice(*part.rows)
    bias = getattr(module, "bias", None) if part.bias is not None else None
    own = None if bias is None else bias.detach()[rows]
    return F.linear(x, dense_weight(module, part)[rows], own)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return max_difference(a, b) / max(float(b.float().abs().max()), 1e-6)


def check_mlps(
    original: nn.Module,
    rewritten: nn.Module,
    decisions: Sequence[Decision],
    proofs: Sequence[MlpProof],
    examples: Examples,
) -> Iterator[ContractResult]:
    """The contracts that make sense for channel mixers, for every rewritten block."""
    changed = [d for d in decisions if d.status != "refused" and d.target != "keep"]
    proved = {p.site.index: p for p in proofs}
    names: list[str] = []
    for decision in changed:
        site = MlpSite.from_json(decision.site)
        proof = proved.get(site.index)
        subject = f"{decision.target} at {site.down.module}"
        yield _accounted(original, rewritten, decision, site, subject)
        if proof is not None:
            exact = "bit for bit" if proof.difference == 0.0 else "other operators, same function"
            check = "the block rebuilt from its facts equals the original"
            yield judged(5, check, subject, proof.difference, TOLERANCE, exact)
        for _, part in chosen_maps(site, decision.options):
            names.append(part.module)
    yield from _by_shape(original, rewritten, changed)
    if changed:
        yield from _gaps(original, rewritten, changed, examples.resized)


def _accounted(
    original: nn.Module, rewritten: nn.Module, decision: Decision, site: MlpSite, subject: str
) -> ContractResult:
    """Every parameter of the block is still read or stands replaced by a structure."""
    replaced = superseded([decision])
    kept = dict(rewritten.named_parameters(remove_duplicate=False))
    lost = [n for n in site.parameters if n not in replaced and n not in kept]
    detail = "replaced by structures: " + ", ".join(replaced) if not lost else ", ".join(lost)
    return judged(1, "parameters that nothing reads any more", subject, len(lost), 0, detail)


def _by_shape(
    original: nn.Module, rewritten: nn.Module, changed: Sequence[Decision]
) -> Iterator[ContractResult]:
    """Rows are independent, and the full size is the original; once for each kind of projection."""
    seen: set[str] = set()
    for decision in changed:
        mixer = get(decision.target)
        for role, part in chosen_maps(MlpSite.from_json(decision.site), decision.options):
            new, old = (m.get_submodule(part.module) for m in (rewritten, original))
            assert isinstance(new, Projection)
            dense = dense_weight(old, part)
            key = f"{decision.target} {role} {tuple(dense.shape)} {decision.options}"
            if key in seen:
                continue
            seen.add(key)
            outputs, inputs = dense.shape
            subject = f"{decision.target} at {part.module}"
            yield _independent(new, inputs, subject)
            full = mixer.structure(outputs, inputs, mixer.full(outputs, inputs)).to(dense.device)
            full.fit(Dense(dense.float()))
            error = relative_error(full.dense().detach(), dense)
            yield judged(5, "at full size it equals the original", subject, error, BOUND)


def _independent(module: Projection, inputs: int, subject: str) -> ContractResult:
    """A row read alone gives what it gives among others: tokens, batch rows, length 1 at once."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(module.parameters())
    x = torch.randn(2, 7, inputs, generator=generator).to(parameter)
    with torch.no_grad():
        whole = module.core(x)
        scale = max(float(whole.float().abs().max()), 1e-6)
        worst = max_difference(module.core(x[:, 3:4]), whole[:, 3:4])
        worst = max(worst, max_difference(module.core(x[:1]), whole[:1]))
    low = 200.0 if parameter.dtype in (torch.bfloat16, torch.float16) else 1.0
    check = "tokens and batch rows are independent, length 1 runs"
    return judged(4, check, subject, worst / scale, BOUND * low)


def _gaps(
    original: nn.Module, rewritten: nn.Module, changed: Sequence[Decision], call: Call
) -> Iterator[ContractResult]:
    """Contract 9: relative error of each block's output on what the original block reads, in a
    call that no structure was fitted to."""
    sites = [MlpSite.from_json(d.site) for d in changed]
    streams = observe(original, list({m.module for s in sites for m in s.maps}), call)
    for decision, site in zip(changed, sites, strict=True):
        read, wanted = streams[site.up.module][0], streams[site.down.module][0]
        try:
            got = _block(rewritten, site, next(iter(read.named.values())))
        except KeyError:
            continue  # an opaque activation; the model's own outputs tell
        teacher: Any = wanted.output
        error = relative_error(got.reshape(teacher.shape), teacher)
        subject = f"{decision.target} at {site.down.module}"
        yield ContractResult(9, "relative teacher gap", subject, "reported", error)


def _block(model: nn.Module, site: MlpSite, x: torch.Tensor) -> torch.Tensor:
    """The block's output from the modules of `model` and the facts between them."""
    with torch.no_grad():
        up, down = (model.get_submodule(m.module) for m in (site.up, site.down))
        axis = channel_of(up)
        whole = up(x).movedim(axis, -1)
        values = whole[..., slice(*site.up.rows)]
        gate = None
        if site.gate is not None:
            fused = site.gate.module == site.up.module
            source = whole if fused else model.get_submodule(site.gate.module)(x).movedim(axis, -1)
            gate = source[..., slice(*site.gate.rows)]
        hidden = apply(site.activation, gate, values)
        out: torch.Tensor = down(hidden.movedim(-1, channel_of(down)))
        return out
