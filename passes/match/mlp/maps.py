"""One channel map for linear, addmm, matmul, einsum, 1x1 convolution and batched experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from rewriter.ir.mlp import MapSpelling
from rewriter.passes.match.view import View
from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.linear import CONVOLUTIONS
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import arguments, op, operand, value

_PRODUCTS = frozenset({"matmul", "mm", "bmm", "__matmul__"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "flatten"})


@dataclass(frozen=True)
class Map:
    """`node` = weight applied to the channels of `source`, plus bias; other axes are left alone.

    Attributes:
        node: the result, bias included.
        source: what it is applied to.
        weight, bias: placeholders of the parameters.
        transposed: the weight holds (input, output).
        channel: dimension of the result that holds the output channels, from the end.
        inner: dimension of the source that holds the input channels, from the end.
        experts: size of the weight's expert axis, 0 without one.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    channel: int
    inner: int
    spelling: MapSpelling
    experts: int = 0

    def nodes(self) -> frozenset[fx.Node]:
        """The nodes that compute it from its source and its parameters."""
        out: set[fx.Node] = set()
        stack = [self.node]
        while stack:
            node = stack.pop()
            if node in out or node is self.source or node.op == "placeholder":
                continue
            out.add(node)
            on_weight = op(node) in ("index", *_RESHAPES) or permutation(node) is not None
            inputs = node.all_input_nodes
            stack.extend(inputs[:1] if on_weight or is_cast(node) else _tensors(inputs))
        return frozenset(out)

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self._width(0)

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self._width(1)

    def _width(self, side: int) -> int:
        val = value(self.weight)
        assert val is not None
        lead = 1 if self.experts else 0
        return int(val.shape[lead + (1 - side if self.transposed else side)])


def read_map(node: fx.Node, view: View) -> Map | None:
    """Read a node as a channel map, or None. A bias may be added by the node itself or after it."""
    name = op(node)
    if name == "add":
        return _with_bias(node, view)
    if name == "linear":
        a = arguments(node)
        found = _stored(operand(node, 1), view)
        bias = a["bias"] if isinstance(a["bias"], fx.Node) else None
        if found is None or found.experts:
            return None
        return found.applied(node, operand(node), "linear", _parameter(bias, view))
    if name == "addmm":
        return _product(node, operand(node, 1), operand(node, 2), view, operand(node, 0))
    if name in _PRODUCTS:
        return _product(node, operand(node, 0), operand(node, 1), view)
    if name == "einsum":
        return _einsum(node, view)
    if name in CONVOLUTIONS:
        return _convolution(node, view)
    if name.endswith(("grouped_mm", "grouped_mm_fallback")):
        found = _stored(operand(node, 1), view)
        if found is None or not found.experts:
            return None
        return found.swapped().applied(node, operand(node), "grouped")
    return None


@dataclass(frozen=True)
class _Stored:
    """A weight behind layout operators and a choice of experts; `turned` if its axes swap."""

    node: fx.Node
    turned: bool
    experts: int

    def swapped(self) -> _Stored:
        return replace(self, turned=not self.turned)

    def applied(
        self,
        node: fx.Node,
        source: fx.Node,
        spelling: MapSpelling,
        bias: fx.Node | None = None,
        channel: int = -1,
    ) -> Map:
        """The map that `node` is, with channels in one dimension of source and result."""
        return Map(
            node, source, self.node, bias, self.turned, channel, channel, spelling, self.experts
        )


def _stored(node: fx.Node, view: View) -> _Stored | None:
    """Follow a weight to its parameter; only the last two axes may have been swapped."""
    turned = False
    while not view.is_parameter(node):
        order = permutation(node)
        if is_noop(node) or is_cast(node):
            node = operand(node)
        elif order is not None:
            if order[:-2] != tuple(range(len(order) - 2)):
                return None
            turned ^= order[-1] != len(order) - 1
            node = operand(node)
        elif op(node) == "index" and _rank(node) == 3:
            node = operand(node)  # one expert for each row
        else:
            return None
    rank = _rank(node)
    if rank not in (2, 3):
        return None
    val = value(node)
    assert val is not None
    return _Stored(node, turned, int(val.shape[0]) if rank == 3 else 0)


def _product(
    node: fx.Node, left: fx.Node, right: fx.Node, view: View, bias: fx.Node | None = None
) -> Map | None:
    weight = _stored(right, view)
    if weight is not None and _is_activation(left, view):
        spelling: MapSpelling = "batched" if weight.experts else "linear"
        return weight.swapped().applied(node, left, spelling, _parameter(bias, view))
    weight = _stored(left, view)
    if weight is not None and bias is None and _is_activation(right, view) and _rank(right) > 1:
        spelling = "batched" if weight.experts else "linear"
        return weight.applied(node, right, spelling, channel=-2)
    return None


def _einsum(node: fx.Node, view: View) -> Map | None:
    """One axis summed, one new axis, and at most one axis of experts, which comes first."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2 or "->" not in equation:
        return None
    terms, result = equation.split("->")
    pairs = list(zip(terms.split(","), operands, strict=True))
    for (letters, weight), (others, source) in (pairs, pairs[::-1]):
        if not isinstance(weight, fx.Node) or not isinstance(source, fx.Node):
            return None
        if not view.is_parameter(weight) or not _is_activation(source, view) or "." in equation:
            continue
        own = letters[-2:]  # of a weight with three axes the first one counts experts
        summed = [c for c in own if c in others and c not in result]
        new = [c for c in own if c not in others and c in result]
        plain = len(summed) == 1 and len(new) == 1 and len(letters) in (2, 3)
        if not plain or len(set(letters)) != len(letters) or letters[0] not in (own + result):
            return None
        val = value(weight)
        assert val is not None
        return Map(
            node,
            source,
            weight,
            None,
            letters.index(summed[0]) < letters.index(new[0]),
            result.index(new[0]) - len(result),
            others.index(summed[0]) - len(others),
            "einsum",
            int(val.shape[0]) if len(letters) == 3 else 0,
        )
    return None


def _convolution(node: fx.Node, view: View) -> Map | None:
    weight, a = operand(node, 1), arguments(node)
    val = value(weight)
    if val is None or not view.is_parameter(weight) or int(a["groups"]) != 1:
        return None
    if a.get("transposed") or any(int(size) != 1 for size in val.shape[2:]):
        return None
    if not _all(a["stride"], 1) or not _all(a["padding"], 0):
        return None
    bias = a["bias"] if isinstance(a["bias"], fx.Node) else None
    stored, channel = _Stored(weight, False, 0), 1 - _rank(node)
    return stored.applied(node, operand(node), "conv1x1", _parameter(bias, view), channel)


def _with_bias(node: fx.Node, view: View) -> Map | None:
    """map + parameter, where nothing but layout stands between the two."""
    for source, bias in (node.args[:2], node.args[1::-1]):
        if not isinstance(source, fx.Node) or not isinstance(bias, fx.Node):
            return None
        parameter = _bias(bias, view)
        inner, moved = source, False
        while (found := _plain_map(inner, view)) is None and _is_layout(inner):
            inner, moved = operand(inner), moved or not is_noop(inner)
        if parameter is None or found is None or found.bias is not None:
            continue
        if moved and found.spelling not in ("batched", "grouped"):
            continue
        channel = -1 if moved else found.channel
        return replace(found, node=node, bias=parameter, channel=channel)
    return None


def _plain_map(node: fx.Node, view: View) -> Map | None:
    return None if op(node) == "add" else read_map(node, view)


def _bias(node: fx.Node, view: View) -> fx.Node | None:
    """A bias vector, or the bias vectors of the experts chosen for each row."""
    while not view.is_parameter(node):
        if not (is_noop(node) or is_cast(node) or op(node) in ("index", "unsqueeze")):
            return None
        node = operand(node)
    return node if _rank(node) in (1, 2) else None


def _parameter(node: fx.Node | None, view: View) -> fx.Node | None:
    return None if node is None else _bias(node, view)


def _is_layout(node: fx.Node) -> bool:
    return is_noop(node) or op(node) in _RESHAPES


def _is_activation(node: fx.Node, view: View) -> bool:
    """False for a parameter in any layout."""
    while is_noop(node) or is_cast(node) or permutation(node) or op(node) in _RESHAPES:
        node = operand(node)
    return not view.is_parameter(node)


def _tensors(nodes: list[fx.Node]) -> list[fx.Node]:
    """Tensors that weigh or are weighed: the offsets of grouped experts are neither."""
    return [n for n in nodes if (val := value(n)) is not None and val.is_floating_point()]


def _rank(node: fx.Node) -> int:
    val = value(node)
    return val.dim() if isinstance(val, torch.Tensor) else 0


def _all(item: object, wanted: int) -> bool:
    """True for a step or padding of `wanted` in every dimension ('same' pads a 1x1 by nothing)."""
    items = item if isinstance(item, list | tuple) else [item]
    return all(isinstance(x, str) or (isinstance(x, int) and x == wanted) for x in items)
