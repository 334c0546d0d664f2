"""One case of the coverage table: what is there, what is found, and whether every fact is right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rewriter.ir.site import AttentionSite
from rewriter.passes.capture import Captured, capture
from rewriter.passes.match import match
from rewriter.passes.match.mlp import match_mlps
from zoo.family import Attention, Family, enliven
from zoo.mlps import MLPS
from zoo.oracle import count_softmaxes


@dataclass(frozen=True)
class Case:
    """A family in one attention implementation, mode, dtype and kind of shapes."""

    family: str
    attention: str
    mode: str = "inference"
    dtype: str = "float32"
    shapes: str = "dynamic"

    @property
    def key(self) -> str:
        return "/".join(asdict(self).values())


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        softmaxes: calls of softmax or attention counted while the model ran.
        expected, found, right: attention blocks that are there, that are found where they are,
            and whose facts are all right.
        false: matches that are no attention block of the model.
        refused: near misses, each with the reason that is true of it.
        wrong: what differs, in words; empty if the case is as it should be.
        fused: patterns that Inductor replaced in the same graph, -1 where not counted.
        mlps, mlps_right: MLP blocks that are there, and those found with kind, activation, hidden
            channels and down projection right; -1 where they were not looked for.
        mlps_false: blocks found that are none of the model's.
    """

    case: Case
    softmaxes: int
    expected: int
    found: int
    right: int
    false: int
    refused: int
    wrong: tuple[str, ...] = ()
    fused: int = -1
    mlps: int = -1
    mlps_right: int = -1
    mlps_false: int = 0

    def to_json(self) -> dict[str, Any]:
        out = asdict(self)
        return {**out.pop("case"), **out, "wrong": list(self.wrong)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        names = ("family", "attention", "mode", "dtype", "shapes")
        rest = {k: v for k, v in data.items() if k not in names}
        rest["wrong"] = tuple(rest["wrong"])
        return cls(Case(*(data[n] for n in names)), **rest)


def measure(case: Case, family: Family, count_fused: bool = False, with_mlps: bool = True) -> Row:
    """Build, capture and match one case, and compare with what the zoo says about it."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = enliven(family.build(case.attention)).to(dtype).eval()
    inputs = {k: _cast(v, dtype) for k, v in family.inputs().items()}
    softmaxes = count_softmaxes(model, inputs)
    model.train(case.mode == "training")
    fixed = None
    if case.shapes == "static":
        fixed = {
            f"kwargs.{k}": frozenset(range(v.dim()))
            for k, v in inputs.items()
            if isinstance(v, torch.Tensor)
        }
    captured = capture(model, (), inputs, fixed, assume_finite=True)
    if not isinstance(captured, Captured):
        told = bool(family.untraceable) and family.untraceable in captured.reason
        wrong = () if told else (f"not captured: {captured.reason}",)
        row = Row(case, softmaxes, len(family.sites), 0, 0, 0, int(told), wrong)
        mlps = len(MLPS.get(family.name, ()))
        return replace(row, mlps=mlps, mlps_right=0) if with_mlps else row
    row = _compare(case, family, captured, softmaxes, count_fused)
    return _with_mlps(row, captured) if with_mlps else row


def _compare(
    case: Case, family: Family, captured: Captured, softmaxes: int, count_fused: bool
) -> Row:
    result = match(captured)
    wrong: list[str] = []
    left = list(family.sites)
    found = right = 0
    for item in result.matches:
        here = next((s for s in left if s.owner == item.site.fqn), None)
        if here is None:
            wrong.append(f"'{item.site.fqn}' is no attention block of the model")
            continue
        left.remove(here)
        found += 1
        different = differences(here, item.site)
        right += not different
        wrong.extend(f"'{here.owner}': {d}" for d in different)
    wrong.extend(f"'{s.owner}' is not found" for s in left)
    reasons = [m.reason for m in result.misses]
    if len(reasons) != len(family.refused):
        wrong.append(f"{len(reasons)} refusals instead of {len(family.refused)}: {reasons}")
    for reason, part in zip(reasons, family.refused, strict=False):
        if part not in reason:
            wrong.append(f"refused with '{reason}' instead of '{part}'")
    if softmaxes != len(family.sites) + len(family.refused) - family.silent:
        wrong.append(f"{softmaxes} softmaxes ran, which the zoo does not account for")
    return Row(
        case,
        softmaxes,
        len(family.sites),
        found,
        right,
        len(result.matches) - found,
        len(reasons),
        tuple(wrong),
        fused_patterns(captured) if count_fused else -1,
    )


def _with_mlps(row: Row, captured: Captured) -> Row:
    """The same row with what is found of the family's MLP blocks."""
    expected = MLPS.get(row.case.family, ())
    result = match_mlps(captured)
    left = [(e.down, e.activation, 1.0, e.kind, e.hidden) for e in expected]
    wrong: list[str] = [f"MLP refused: {m.reason}" for m in result.misses]
    right = false = 0
    for item in result.matches:
        site = item.site
        activation = site.activation
        facts = (site.down.weight, activation.name, activation.scale, site.kind, site.hidden)
        if facts in left:
            left.remove(facts)
            right += 1
        else:
            false += site.down.weight not in {e.down for e in expected}
            wrong.append(f"MLP found as {facts}")
    wrong += [f"MLP not found: {facts}" for facts in left]
    return replace(
        row,
        mlps=len(expected),
        mlps_right=right,
        mlps_false=false,
        wrong=(*row.wrong, *wrong),
    )


def differences(expected: Attention, site: AttentionSite) -> list[str]:
    """Facts of a found site that are not what the zoo says, in words."""
    heads = site.heads
    got = {
        "mask": site.mask.describe(),
        "heads": (heads.query, heads.key_value),
        "widths": (heads.key_dim, heads.value_dim),
        "scale": site.scale,
        "prescaled": site.prescaled,
        "softcap": site.softcap,
        "rotary_dim": site.rotary_dim,
        "position": site.position,
        "qk_norm": site.qk_norm,
        "fused": any(p.fused for p in (site.projections or {}).values()),
        "cross": site.cross,
        "sinks": site.sinks,
    }
    return [
        f"{name} is {value}, not {getattr(expected, name)}"
        for name, value in got.items()
        if not _same(value, getattr(expected, name))
    ]


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, float) and isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=1e-9)
    return bool(value == expected)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return (
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def fused_patterns(captured: Captured) -> int:
    """How many attention patterns Inductor replaces in the same graph; -1 if it cannot read it.

    Runs its graph passes (private torch interface) and stops before any code is made.
    """
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    graph = captured.graph_module
    inputs = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    known = {n.name: captured.parameter(n.name) for n in graph.graph.find_nodes(op="placeholder")}
    real = []
    for fake, tensor in zip(inputs, known.values(), strict=True):
        if tensor is not None:
            real.append(tensor.detach())
        else:
            shape = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in fake.shape]
            real.append(torch.ones(shape, dtype=fake.dtype))
    counters.clear()
    try:
        with torch.no_grad():
            compile_fx(graph, real, inner_compile=lambda g, *a, **k: g.forward)
    except Exception:  # whatever a compiler may raise on a graph that was not made for it
        return -1
    return int(counters["inductor"]["fuse_attention"])
