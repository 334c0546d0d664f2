"""Seconds of a model on a device: measured times where there are some, the roofline elsewhere.

Between measured points the rate (operations a second) is interpolated in the logarithm of the size,
so the symbolic arithmetic of `work` carries a time from one shape to another.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy

from rewriter.ir.mask import Causal, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Source
from rewriter.ir.state import BATCH, TOKENS
from rewriter.mixers import registry
from rewriter.planner.device import CoreTime, Device
from rewriter.planner.trunk import Trunk
from rewriter.planner.work import Phase, core_work, state_bytes

_PROJECTIONS = frozenset({"query", "key", "value", "output"})
WIDTHS: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Use:
    """What one site runs: a mixer and its options."""

    site: AttentionSite
    mixer: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """Seconds of one forward and bytes of the cache behind it.

    Attributes:
        products, pointwise, cores: the parts of `seconds`.
        cache: bytes after `tokens` of all rows.
    """

    phase: Phase
    tokens: int
    products: float
    pointwise: float
    cores: float
    cache: int

    @property
    def seconds(self) -> float:
        return self.products + self.pointwise + self.cores


def predict(
    device: Device,
    trunk: Trunk,
    uses: Sequence[Use],
    phase: Phase,
    tokens: int,
    *,
    batch: int = 1,
    dtype: str = "float32",
    compiled_step: bool = False,
) -> Prediction:
    """Time one forward of a model.

    Args:
        uses: what every site of the model runs.
        phase: a prefill of `tokens`, or one new token behind `tokens` - 1.
        compiled_step: single tokens run without the framework, so its launches cost nothing.

    Raises:
        UsageError: the device or a mixer does not say what is needed.
    """
    rows = tokens if phase == "prefill" else 1
    step = compiled_step and phase == "decode"
    products = sum(
        m.count * product_seconds(device, batch * (1 if m.head else rows), m.inputs, m.outputs,
                                  dtype)
        for m in trunk.matrices
    )  # fmt: skip
    moved = WIDTHS[dtype] * trunk.elements * batch * rows
    pointwise = 0.0 if step else trunk.calls * move_seconds(device, moved / max(trunk.calls, 1))
    products -= sum(spared_seconds(device, use, phase, tokens, batch, dtype) for use in uses)
    cores = sum(core_seconds(device, use, phase, tokens, batch, dtype) for use in uses)
    cache = sum(cache_bytes(use, tokens, batch, dtype) for use in uses)
    return Prediction(phase, tokens, products, pointwise, cores, cache)


def cache_bytes(use: Use, tokens: int, batch: int = 1, dtype: str = "float32") -> int:
    """Bytes that one site carries after `tokens`; 0 for sites without a cache."""
    if use.site.kind != "causal":
        return 0
    formula = state_bytes(use.mixer, dict(use.options), _plain_site(use.site), WIDTHS[dtype])
    return int(formula.subs({BATCH: batch, TOKENS: tokens}))


def product_seconds(
    device: Device, rows: int, inputs: int, outputs: int, dtype: str = "float32"
) -> float:
    """Of (rows, inputs) times a weight (inputs, outputs)."""
    flops = 2.0 * rows * inputs * outputs
    if not device.products:
        moved = WIDTHS[dtype] * (inputs * outputs + rows * (inputs + outputs))
        return _roofline(device, flops, moved, dtype)
    shapes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for p in device.products:
        rate = 2.0 * p.rows * p.inputs * p.outputs / p.seconds
        shapes.setdefault((p.inputs, p.outputs), []).append((p.rows, rate))
    if (inputs, outputs) in shapes:
        return flops / _between(shapes[inputs, outputs], rows)
    weighted, weights = 0.0, 0.0
    for (k, n), points in shapes.items():
        distance = abs(math.log(k / inputs)) + abs(math.log(n / outputs))
        weight = 1.0 / (distance**2 + 1e-3)
        weighted += weight * math.log(_between(points, rows))
        weights += weight
    return flops / math.exp(weighted / weights)


def move_seconds(device: Device, moved: float) -> float:
    """Of one pointwise operation over `moved` bytes."""
    if not device.moves:
        return moved / (device.bandwidth * device.efficiency) + device.launch
    points = sorted((m.bytes, m.seconds) for m in device.moves)
    if moved >= points[-1][0]:
        return points[-1][1] * moved / points[-1][0]
    return _between(points, moved)


def core_seconds(
    device: Device, use: Use, phase: Phase, tokens: int, batch: int = 1, dtype: str = "float32"
) -> float:
    """Of the core of one site."""
    if registry.get(use.mixer).silent:
        return device.launch
    site = _plain_site(use.site)
    flops, moved = _amounts(use.mixer, _frozen(use.options), site, phase, WIDTHS[dtype])
    mine = float(flops(batch, tokens))
    points = [
        (p.tokens, p.seconds, _measured_flops(p))
        for p in _nearest(device.cores, use.mixer, _frozen(use.options), site, phase)
    ]
    if not points:
        return _roofline(device, mine, float(moved(batch, tokens)), dtype)
    if not mine or not all(f for _, _, f in points):
        return batch * _between([(n, s) for n, s, _ in points], tokens)
    return mine / _between([(n, f / s) for n, s, f in points], tokens)


def spared_seconds(
    device: Device, use: Use, phase: Phase, tokens: int, batch: int = 1, dtype: str = "float32"
) -> float:
    """Of the projections that do not run because the mixer's output is 0 whatever they give.

    Pointwise work that falls away with them (rotations, copies) is not counted.
    """
    if not spares_projections(use):
        return 0.0
    heads, hidden = use.site.heads, use.site.hidden_dim
    rows = batch * (tokens if phase == "prefill" else 1)
    inside = heads.query * heads.value_dim
    shapes = (
        (hidden, heads.query * heads.key_dim),
        (hidden, heads.key_value * heads.key_dim),
        (hidden, heads.key_value * heads.value_dim),
        (inside, hidden),
    )
    return sum(product_seconds(device, rows, i, o, dtype) for i, o in shapes)


def spares_projections(use: Use) -> bool:
    """Whether a mixer's output is 0 and its projections are known, so that none of them runs."""
    site = use.site
    known = bool(site.hidden_dim) and set(site.projections or {}) >= _PROJECTIONS
    return registry.get(use.mixer).silent and known


def measured_core(device: Device, use: Use, phase: Phase) -> bool:
    """Whether the time of this core rests on a measurement of its mixer."""
    site = _plain_site(use.site)
    return bool(_nearest(device.cores, use.mixer, _frozen(use.options), site, phase))


def _nearest(
    cores: Sequence[CoreTime], mixer: str, options: str, site: AttentionSite, phase: Phase
) -> list[CoreTime]:
    """The measured series of this mixer whose options and heads are nearest."""
    series: dict[tuple[str, tuple[int, ...]], list[CoreTime]] = {}
    for core in cores:
        if core.mixer == mixer and core.phase == phase:
            series.setdefault((_frozen(core.options), core.heads), []).append(core)
    if not series:
        return []
    heads = (site.heads.query, site.heads.key_value, site.heads.key_dim, site.heads.value_dim)

    def distance(key: tuple[str, tuple[int, ...]]) -> tuple[float, float]:
        shape = sum(abs(math.log(a / b)) for a, b in zip(key[1], heads, strict=True))
        return _difference(key[0], options), shape

    return series[min(series, key=distance)]


def _difference(first: str, second: str) -> float:
    """How far two sets of options are apart: differing numbers count by their ratio."""
    a, b = dict(_thawed(first)), dict(_thawed(second))
    out = 0.0
    for name in a.keys() | b.keys():
        x, y = a.get(name), b.get(name)
        if x == y:
            continue
        numeric = isinstance(x, int | float) and isinstance(y, int | float) and x > 0 and y > 0
        out += abs(math.log(x / y)) if numeric else 1.0  # type: ignore[operator]
    return out


def _roofline(device: Device, flops: float, moved: float, dtype: str) -> float:
    peak = device.peak_of(dtype) * device.efficiency
    return max(flops / peak, moved / (device.bandwidth * device.efficiency)) + device.launch


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Piecewise linear in the logarithms, constant outside."""
    ordered = sorted(points)
    sizes = [s for s, _ in ordered]
    place = bisect_left(sizes, at)
    if place == 0 or place == len(ordered):
        return ordered[min(place, len(ordered) - 1)][1]
    (x0, y0), (x1, y1) = ordered[place - 1], ordered[place]
    share = math.log(at / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def _measured_flops(core: CoreTime) -> float:
    site = causal_site(core.heads, core.hidden)
    flops, _ = _amounts(core.mixer, _frozen(core.options), site, core.phase, 4)
    return float(flops(1, core.tokens))


@lru_cache(maxsize=512)
def _amounts(mixer: str, options: str, site: AttentionSite, phase: Phase, width: int) -> Any:
    """(operations, bytes) as functions of batch and tokens."""
    work = core_work(mixer, dict(_thawed(options)), site, phase, width)
    return tuple(sympy.lambdify((BATCH, TOKENS), e, "math") for e in (work.flops, work.bytes))


def causal_site(heads: tuple[int, int, int, int], hidden: int) -> AttentionSite:
    """A causal block of these sizes, for costs and measurements."""
    groups = HeadGroups(*heads)
    return AttentionSite(
        fqn="attention",
        index=0,
        heads=groups,
        score=(Scale(groups.key_dim**-0.5),),
        terms=(),
        mask=Mask((Causal(),)),
        spelling="sdpa",
        source=Source("attention"),
        causal_flag=True,
        hidden_dim=hidden,
    )


@lru_cache(maxsize=512)
def _hashable(heads: HeadGroups, mask: Mask, hidden: int) -> AttentionSite:
    site = causal_site((heads.query, heads.key_value, heads.key_dim, heads.value_dim), hidden)
    return replace(site, mask=mask.without_padding(), causal_flag=False)


def _plain_site(site: AttentionSite) -> AttentionSite:
    """The facts a cost depends on, equal for alike layers, so that formulas are made once."""
    return _hashable(site.heads, site.mask, site.hidden_dim)


def _frozen(options: Mapping[str, Any]) -> str:
    return json.dumps(dict(options), sort_keys=True, default=list)


def _thawed(options: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(options)
    return out
