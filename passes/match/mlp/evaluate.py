"""Run a pointwise region on probe values, and track where every element came from.

Each value carries, besides its numbers, the positions of the elements of the channel maps it was
computed from. Layout operators move both alike, pointwise operators unite the positions of their
operands. So the result shows which element of which map decides it, whatever reshapes, chunks and
strides stand between, and a region that mixes tokens or channels shows as well. Numbers are
float64 and casts between floating types are left out, so that functions compare exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewriter.passes.match.mlp.region import Region, is_layout
from rewriter.passes.match.view import View
from rewriter.passes.normalise.noops import is_cast
from rewriter.passes.normalise.ops import arguments, is_inplace, op, operand, value
from rewriter.passes.torch_private import size_hint

RANGE = 12.0
"""Probe values lie in [-RANGE, RANGE]: beyond the clamps in use, short of where exp overflows."""


class EvaluationError(Exception):
    """The region cannot be run; caught inside the pass and turned into a refusal."""


@dataclass(frozen=True)
class Origin:
    """Positions in the flattened result of one channel map, one for each element of a value."""

    source: fx.Node
    index: torch.Tensor

    def same(self, other: Origin) -> bool:
        return self.source is other.source and torch.equal(self.index, other.index)


@dataclass(frozen=True)
class Tracked:
    """A tensor of the region: float64 (or bool) numbers and where they came from."""

    numbers: torch.Tensor
    origins: tuple[Origin, ...] = ()


def evaluate(region: Region, end: fx.Node, view: View) -> tuple[Tracked, Mapping[fx.Node, Tracked]]:
    """The value at `end`, and the probe values of the channel maps.

    Raises:
        EvaluationError: a size is unknown, a parameter has no values, or an operator fails.
    """
    known: dict[fx.Node, Any] = {}
    for number, item in enumerate(region.maps):
        known[item.node] = _probe(item.node, number)
    probes = dict(known)
    for node in region.learned:
        tensor = view.captured.parameter(node.name)
        if tensor is None or tensor.is_meta:
            raise EvaluationError(f"the values of '{node.name}' are not known")
        known[node] = Tracked(tensor.detach().cpu().double())
    for node in region.nodes:
        try:
            known[node] = _step(node, known, view)
        except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EvaluationError(f"node '{node.name}' cannot be evaluated: {text}") from None
    result = known[end]
    if not isinstance(result, Tracked):
        raise EvaluationError(f"'{end.name}' is no tensor")
    return result, probes


def _probe(node: fx.Node, number: int) -> Tracked:
    val = value(node)
    if val is None:
        raise EvaluationError(f"'{node.name}' is no tensor")
    shape = [_size(s) for s in val.shape]
    count = 1
    for size in shape:
        count *= size
    generator = torch.Generator().manual_seed(number)
    numbers = torch.linspace(-RANGE, RANGE, count, dtype=torch.float64)
    numbers = numbers[torch.randperm(count, generator=generator)].reshape(shape)
    return Tracked(numbers, (Origin(node, torch.arange(count).reshape(shape)),))


def _size(size: Any) -> int:
    hint = size_hint(size)
    if hint is None:
        raise EvaluationError(f"the size {size} depends on data")
    return hint


def _step(node: fx.Node, known: Mapping[fx.Node, Any], view: View) -> Any:
    scalar = view.constants.scalar(node)
    if scalar is not None:
        return Tracked(torch.tensor(scalar, dtype=torch.float64))
    if op(node) in ("dropout", "feature_dropout"):
        return known[operand(node)]
    if is_cast(node):
        return _cast(node, known[operand(node)])
    if op(node) == "glu":
        return _glu(node, known[operand(node)])
    if is_layout(node):
        return _layout(node, known)
    return _pointwise(node, known)


def _cast(node: fx.Node, item: Tracked) -> Tracked:
    val = value(node)
    assert val is not None
    if val.is_floating_point():
        return Tracked(item.numbers.double(), item.origins)
    return Tracked(item.numbers.to(val.dtype), item.origins)


def _layout(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """Move numbers and positions alike."""
    if op(node) == "getitem":
        return known[operand(node)][node.args[1]]
    item: Tracked = known[operand(node)]
    numbers = _call(node, {operand(node): item.numbers})
    moved = [_call(node, {operand(node): o.index}) for o in item.origins]
    if isinstance(numbers, torch.Tensor):
        pairs = zip(item.origins, moved, strict=True)
        return Tracked(numbers, tuple(Origin(o.source, m) for o, m in pairs))
    parts = []
    for position, part in enumerate(numbers):
        pairs = zip(item.origins, (m[position] for m in moved), strict=True)
        parts.append(Tracked(part, tuple(Origin(o.source, m) for o, m in pairs)))
    return tuple(parts)


def _glu(node: fx.Node, item: Tracked) -> Tracked:
    dim = int(arguments(node)["dim"])
    first, second = item.numbers.chunk(2, dim)
    origins = tuple(Origin(o.source, part) for o in item.origins for part in o.index.chunk(2, dim))
    return Tracked(first * torch.sigmoid(second), origins)


def _pointwise(node: fx.Node, known: Mapping[fx.Node, Any]) -> Tracked:
    inputs: dict[fx.Node, Tracked] = {
        n: known[n] for n in node.all_input_nodes if isinstance(known.get(n), Tracked)
    }
    first = node.args[0]
    if is_inplace(node) and isinstance(first, fx.Node) and len(first.users) > 1:
        raise ValueError(f"'{first.name}' is changed in place while something else reads it")
    out = _call(node, {n: item.numbers.clone() for n, item in inputs.items()})
    origins: list[Origin] = []
    for item in inputs.values():
        for origin in item.origins:
            spread = Origin(origin.source, origin.index.expand(out.shape))
            if not any(spread.same(o) for o in origins):
                origins.append(spread)
    return Tracked(out, tuple(origins))


def _call(node: fx.Node, tensors: Mapping[fx.Node, torch.Tensor]) -> Any:
    def concrete(arg: fx.Node) -> Any:
        if arg in tensors:
            return tensors[arg]
        return _size(arg.meta["val"])

    args = fx.node.map_arg(node.args, concrete)
    kwargs = fx.node.map_arg(node.kwargs, concrete)
    target: Any = node.target
    return target(*args, **{k: v for k, v in kwargs.items() if k != "dtype"})
