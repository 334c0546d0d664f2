"""Read a region's function: which channels of which maps meet, in which order, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from rewriter.ir.mlp import Activation
from rewriter.passes.match.mlp.activations import name_gated, name_plain
from rewriter.passes.match.mlp.evaluate import EvaluationError, Origin, Tracked, evaluate
from rewriter.passes.match.mlp.maps import Map
from rewriter.passes.match.mlp.region import Region
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.ops import arguments, op
from rewriter.passes.torch_private import size_hint

_DROPOUTS = ("dropout", "feature_dropout")
Rows = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """Output channels (start, stop, step) of one map."""

    map: Map
    rows: Rows

    @property
    def whole(self) -> bool:
        return self.rows == (0, self.map.outputs, 1)


@dataclass(frozen=True)
class Hidden:
    """The hidden values: f(up), or f(gate) * up."""

    activation: Activation
    up: Part
    gate: Part | None
    width: int
    dropout: float


def read_hidden(region: Region, down: Map, view: View) -> Hidden | Refusal:
    """The hidden values that enter `down`, or why they are not those of an MLP."""
    try:
        result, probes = evaluate(region, down.source, view)
    except EvaluationError as error:
        return Refusal(str(error), down.source)
    if len(result.origins) > 2:
        return Refusal(f"{len(result.origins)} projected values are combined", down.source)
    parts: list[Part] = []
    for origin in result.origins:
        item = next(m for m in region.maps if m.node is origin.source)
        part = _part(origin, item, down)
        if part is None:
            reason = f"the values of '{origin.source.name}' meet the projection in another order"
            return Refusal(reason, down.source)
        parts.append(part)
    if not parts:
        return Refusal("nothing projected enters the pointwise functions", down.source)
    lack = _coverage(parts)
    if lack is not None:
        return Refusal(lack, parts[0].map.node)
    activation, first = _name(result, probes, region, view)
    if len(parts) == 1:
        gate, up = None, parts[0]
    else:
        gate, up = parts if first else parts[::-1]
    return Hidden(activation, up, gate, _length(parts[0].rows), _dropout(region))


def _name(result: Tracked, probes: object, region: Region, view: View) -> tuple[Activation, bool]:
    assert isinstance(probes, dict)
    y = result.numbers.double().flatten()
    x = [probes[o.source].numbers.flatten()[o.index.flatten()] for o in result.origins]
    known = _constants(region, view)
    if len(x) == 1:
        named, first = name_plain(x[0], y, known), True
    else:
        named, first = name_gated(x[0], x[1], y, known)
    learned = tuple(view.captured.parameters.get(n.name, n.name) for n in region.learned)
    return Activation(named.name, named.parameters, named.scale, learned), first


def _constants(region: Region, view: View) -> tuple[float, ...]:
    """Numbers that occur in the region: candidates for the constants of a function."""
    found: list[float] = []
    for node in region.nodes:
        if view.constants.scalar(node) is not None:
            continue
        for item in arguments(node).values():
            number = view.constants.scalar(item)
            if number is not None and number not in found:
                found.append(number)
    return tuple(found)


def _dropout(region: Region) -> float:
    """Probability that a hidden value is dropped; one dropout keeps its number."""
    found = [float(arguments(n)["p"]) for n in region.nodes if op(n) in _DROPOUTS]
    return found[0] if len(found) == 1 else 1.0 - math.prod(1.0 - p for p in found)


def _part(origin: Origin, item: Map, down: Map) -> Part | None:
    """Which output channels of `item` enter `down`; None if rows do not stay in order."""
    if origin.index.is_floating_point():  # an operation computed with the places themselves
        return None
    shape = _shape(item.node)
    source = _rows_and_channels(torch.arange(math.prod(shape)).reshape(shape), item.channel)
    entering = _rows_and_channels(origin.index, down.inner)
    width = source.shape[1]
    row, channel = _place(source, entering, width)
    rows = torch.arange(entering.shape[0])
    if not torch.equal(row, rows[:, None].expand_as(row)):
        return None
    if not torch.equal(channel, channel[:1].expand_as(channel)):
        return None
    span = _progression(channel[0])
    return None if span is None else Part(item, span)


def _place(
    source: torch.Tensor, entering: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and channel of each entering element among those of the source."""
    position = torch.empty_like(source.flatten())
    position[source.flatten()] = torch.arange(source.numel())
    place = position[entering]
    return place // width, place % width


def _rows_and_channels(index: torch.Tensor, channel: int) -> torch.Tensor:
    moved = index.movedim(channel, -1)
    return moved.reshape(-1, moved.shape[-1])


def _shape(node: fx.Node) -> list[int]:
    return [size_hint(s) or 0 for s in node.meta["val"].shape]


def _progression(values: torch.Tensor) -> Rows | None:
    """(start, stop, step) of an arithmetic progression; stop is the end of the channels used."""
    start = int(values[0])
    step = int(values[1]) - start if len(values) > 1 else 1
    if step < 1 or not torch.equal(values, start + step * torch.arange(len(values))):
        return None
    return start, start + step * len(values), step


def _length(rows: Rows) -> int:
    start, stop, step = rows
    return (stop - start) // step


def _coverage(parts: list[Part]) -> str | None:
    """Why the parts do not make up whole projections, or None if they do."""
    if len(parts) == 1:
        return None if parts[0].whole else "only some channels of the projection are activated"
    one, two = parts
    if one.map.node is not two.map.node:
        whole = one.whole and two.whole
        return None if whole else "only some channels of the projections are used"
    used = {*range(*one.rows), *range(*two.rows)}
    full = len(used) == 2 * _length(one.rows) == one.map.outputs
    return None if full else "gate and up projection do not make up the whole of the fused one"
