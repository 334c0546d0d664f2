"""What lies upstream and downstream of a core: projections, rotary embedding, QK-norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from rewriter.ir.site import Projection
from rewriter.passes.match.operands import scalar_factor
from rewriter.passes.match.result import Operand
from rewriter.passes.match.view import View
from rewriter.passes.normalise.linear import CONVOLUTIONS
from rewriter.passes.normalise.noops import strip, strip_casts
from rewriter.passes.normalise.ops import op, operand, tensor_inputs, value
from rewriter.passes.provenance import module_path

_NORMS = frozenset(
    {
        "linalg_vector_norm",
        "sqrt",
        "layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "native_layer_norm",
        "rsqrt",
    }
)
_REACH = 80


@dataclass(frozen=True)
class Upstream:
    """What was found between an operand and its projections.

    `ends` are inputs of the captured module that were met on the way, and what convolutions read;
    a convolution itself where it changes the number of tokens.
    """

    linears: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    ends: tuple[fx.Node, ...] = ()

    @property
    def normed(self) -> bool:
        return any(op(n) in _NORMS for n in self.nodes)


def upstream(start: fx.Node, view: View) -> Upstream:
    """Walk back from an operand; a projection by a parameter ends each path."""
    linears: list[fx.Node] = []
    nodes: set[fx.Node] = set()
    ends: list[fx.Node] = []
    queue = [start]
    while queue and len(nodes) < _REACH:
        node = queue.pop(0)
        if node.name in view.captured.inputs and node not in ends:
            ends.append(node)
        if node in nodes or node.op != "call_function":
            continue
        if view.linear(node) is not None:
            if node not in linears:
                linears.append(node)
            continue
        if op(node) in CONVOLUTIONS and view.is_parameter(operand(node, 1)):
            # A projection too, what stands before it is not the core's; of other tokens if it has
            # another number of them than what it reads.
            same = view.sizes.of(operand(node))[2:] == view.sizes.of(node)[2:]
            ends.append(operand(node) if same else node)
            continue
        nodes.add(node)
        queue.extend(tensor_inputs(node))
    return Upstream(tuple(linears), frozenset(nodes), tuple(ends))


def picked(found: Upstream) -> fx.Node | None:
    """A node between operand and projection that picks entries by the largest of some scores."""
    for node in found.nodes:
        if op(node) not in _PICKS:
            continue
        stack: list[fx.Node] = [n for n in node.all_input_nodes[1:] if value(n) is not None]
        seen: set[fx.Node] = set()
        while stack:
            item = stack.pop()
            if op(item) in _RANKS:
                return node
            if item not in seen and len(seen) < _REACH:
                seen.add(item)
                stack.extend(tensor_inputs(item))
    return None


_PICKS = frozenset({"index", "gather", "index_select", "take_along_dim", "embedding"})
_RANKS = frozenset({"topk", "sort", "argsort", "argmax", "argmin", "multinomial"})


def scaled_behind(linear: fx.Node, start: fx.Node, view: View) -> float:
    """Product of the scalars between a projection and `start`, which lies behind it.

    Follows the projection's result through layout operators as long as one operation uses it; 1.0
    if `start` is met on that way, since what lies behind `start` is counted elsewhere.
    """
    node, total = linear, 1.0
    for _ in range(_REACH):
        if node is start:
            return 1.0
        users = [u for u in node.users if value(u) is not None]
        if len(users) != 1:
            return total
        found = scalar_factor(users[0], view)
        if found is not None and found[1] is node:
            total *= found[0].factor
        elif op(users[0]) not in _CARRIERS:
            return total
        node = users[0]
    return total


def same_source(query: Upstream, key: Upstream, view: View) -> bool | None:
    """Whether queries and keys are projections of one sequence; None if that cannot be seen.

    They are if both lead back, through operations that treat each token on its own, to one tensor.
    """
    starts = [[_source(n, view) for n in up.linears] or list(up.ends) for up in (query, key)]
    if not starts[0] or not starts[1]:
        return None
    mine, theirs = (_token_wise(nodes, view) for nodes in starts)
    return not mine.isdisjoint(theirs)


def _source(linear: fx.Node, view: View) -> fx.Node:
    """What a projection reads; the projection itself where it sums over tokens."""
    found = view.linear(linear)
    if found is None or not found.of_channels:
        return linear
    return strip_casts(found.source)


def _token_wise(starts: list[fx.Node], view: View) -> set[fx.Node]:
    """Activations that `starts` are computed from token by token, nearest first, up to a bound."""

    def count(node: fx.Node) -> int:
        while value(node) is None and node.all_input_nodes:  # a tuple of parts of one tensor
            node = node.all_input_nodes[0]
        return math.prod(view.sizes.of(node)[:-1]) if value(node) is not None else 0

    counts = {count(n) for n in starts}
    seen: set[fx.Node] = set()
    queue = list(starts)
    while queue and len(seen) < _REACH:
        node = queue.pop(0)
        if node in seen or node.op == "get_attr" or view.captured.parameter(node.name) is not None:
            continue
        seen.add(node)
        if op(node) not in _MIXING and not view.is_product(node):
            queue.extend(n for n in tensor_inputs(node) if count(n) in counts)
    return seen


_MIXING = frozenset(
    {
        "scaled_dot_product_attention",
        "softmax",
        "_softmax",
        "embedding",
        *CONVOLUTIONS,
        "arange",
        "cumsum",
    }
)


def downstream(output: fx.Node, view: View) -> fx.Node | None:
    """The projection that the core's result enters, if nothing but layout stands between."""
    node = output
    for _ in range(_REACH):
        users = [u for u in node.users if op(u) and isinstance(value(u), torch.Tensor)]
        if len(users) != 1:
            return None
        found = view.linear(users[0])
        if found is not None:
            return users[0] if found.source is node else None
        if op(users[0]) not in _CARRIERS:
            return None
        node = users[0]
    return None


_CARRIERS = frozenset(
    {
        "transpose",
        "permute",
        "reshape",
        "view",
        "contiguous",
        "clone",
        "to",
        "dropout",
        "flatten",
        "_unsafe_view",
        "squeeze",
        "unsqueeze",
        "slice",
        "alias",
    }
)


def projections(
    found: Mapping[str, Upstream], output: fx.Node | None
) -> tuple[dict[str, Projection], tuple[fx.Node, ...]]:
    """Name the projections; one linear that serves several operands is fused."""
    nearest = {name: up.linears[0] for name, up in found.items() if len(up.linears) == 1}
    out: dict[str, Projection] = {}
    for name, node in nearest.items():
        fused = sum(1 for other in nearest.values() if other is node) > 1
        out[name] = Projection(module_path(node), fused)
    if output is not None:
        out["output"] = Projection(module_path(output))
    return out, tuple(dict.fromkeys(nearest.values()))


def hidden(found: Mapping[str, Upstream], query: Operand, view: View) -> tuple[fx.Node | None, int]:
    """The (batch, token, channel) tensor that all three projections read and its width, or 0."""
    sources = {
        source.source
        for up in found.values()
        for source in map(view.linear, up.linears)
        if source is not None
    }
    if len(sources) != 1 or any(len(up.linears) != 1 for up in found.values()):
        return None, 0
    source = sources.pop()
    if op(source) in ("view", "reshape", "flatten") and len(view.sizes.of(source)) == 2:
        source = operand(source)
    sizes, named = (
        view.sizes.of(source),
        dict(zip(query.layout.dims, view.sizes.of(query.node), strict=True)),
    )
    expected = named.get(("batch",)), named.get(("token",))
    if len(sizes) != 3 or sizes[1] != expected[1] or expected[0] not in (None, sizes[0]):
        return None, 0
    return source, sizes[2]


def rotary_width(query: Operand, found: Upstream, view: View) -> int:
    """Rotated channels of each head, 0 without rotary embedding."""
    for node in found.nodes:
        name = op(node)
        if name == "view_as_complex":
            return 2 * view.sizes.of(node)[-1]
        if name in ("cat", "stack") and _rotates(node):
            width = view.sizes.of(node)[-1]
            interleaved = name == "stack" and width == 2
            return width * view.sizes.of(node)[-2] if interleaved else width
    return 0


def _rotates(node: fx.Node) -> bool:
    """cat([-x2, x1]) or cat([x1 cos - x2 sin, x2 cos + x1 sin])."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return False
    first, second = parts
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    first, second = strip_casts(first), strip_casts(second)
    if op(first) == "neg":
        return _base(operand(first)) is _base(second)
    if op(first) == "sub" and op(second) == "add":
        return all(
            isinstance(a, fx.Node) and op(strip(a)) == "mul"
            for n in (first, second)
            for a in n.args[:2]
        )
    return False


def _base(node: fx.Node) -> fx.Node:
    """The tensor that a half was cut from."""
    node = strip(node)
    while op(node) in ("slice", "getitem", "select", "split", "chunk", "unbind", "squeeze"):
        node = strip(operand(node))
    return node
