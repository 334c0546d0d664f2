"""The pointwise region in front of a channel map: walked upstream until something else begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from rewriter.passes.match.mlp.maps import Map, read_map
from rewriter.passes.match.view import View
from rewriter.passes.normalise.layout import permutation
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import op, operand, tensor_inputs, value


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LINEAR = frozenset({"add", "sub", "rsub", "neg", "mul", "div", "dropout", "feature_dropout"})
_CURVED = _words("""
    abs addcmul celu clamp clamp_max clamp_min clip elu erf erfc exp exp2 expm1 gelu glu
    hardshrink hardsigmoid hardswish hardtanh leaky_relu lerp log log1p log2 log_sigmoid
    maximum minimum mish pow prelu reciprocal relu relu6 rsqrt selu sigmoid sign silu sin cos
    softplus softshrink softsign sqrt square tanh threshold where ge gt le lt eq ne
    logical_and logical_or logical_not masked_fill
""")
_LAYOUT = _words("""
    view reshape _unsafe_view flatten unflatten unsqueeze squeeze chunk split split_with_sizes
    tensor_split getitem slice select unbind expand narrow expand_as
""")
REDUCTIONS = _words("""
    layer_norm rms_norm _fused_rms_norm native_layer_norm group_norm batch_norm instance_norm
    mean var var_mean std sum norm linalg_vector_norm amax
""")
_LIMIT = 200


@dataclass(frozen=True)
class Region:
    """What stands between a channel map and what feeds it.

    Attributes:
        nodes: pointwise and layout nodes, in graph order.
        maps: channel maps that feed the region, in graph order.
        learned: parameters that the pointwise functions read.
        foreign: anything else that feeds it.
        curved: at least one function in it is not linear.
    """

    nodes: tuple[fx.Node, ...]
    maps: tuple[Map, ...]
    learned: tuple[fx.Node, ...]
    foreign: tuple[fx.Node, ...]
    curved: bool


def walk(start: fx.Node, view: View) -> Region:
    """The region that ends at `start` (included)."""
    nodes: set[fx.Node] = set()
    maps: dict[fx.Node, Map] = {}
    learned: set[fx.Node] = set()
    foreign: set[fx.Node] = set()
    stack = [start]
    seen: set[fx.Node] = set()
    while stack and len(nodes) < _LIMIT:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if view.is_parameter(node):
            learned.add(node)
        elif view.constants.scalar(node) is not None:
            nodes.add(node)
            stack.extend(tensor_inputs(node))
        elif node.name in view.captured.constants:
            learned.add(node)
        elif (found := read_map(node, view)) is not None:
            maps[node] = found
        elif is_pointwise(node) or is_layout(node):
            nodes.add(node)
            stack.extend(tensor_inputs(node))
        else:
            foreign.add(node)
    order = view.order

    def ordered(items: set[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(items, key=order.__getitem__))

    return Region(
        ordered(nodes),
        tuple(maps[n] for n in ordered(set(maps))),
        ordered(learned),
        ordered(foreign),
        any(_is_curved(n, view) for n in nodes),
    )


def is_pointwise(node: fx.Node) -> bool:
    """Each element of the result depends on the elements at its place alone."""
    name = op(node)
    if name in ("max", "min"):
        return len(node.args) == 2 and isinstance(node.args[1], fx.Node)
    return name in _LINEAR or name in _CURVED or is_cast(node)


def is_layout(node: fx.Node) -> bool:
    """The elements are moved or chosen, not changed."""
    return is_noop(node) or permutation(node) is not None or op(node) in _LAYOUT


def _is_curved(node: fx.Node, view: View) -> bool:
    """False for what cannot make the region more than a linear function."""
    name = op(node)
    if name in ("mul", "div"):
        moving = [n for n in tensor_inputs(node) if not _is_fixed(n, view)]
        return len(moving) > 1 or (name == "div" and operand(node) not in moving)
    return name in _CURVED


def _is_fixed(node: fx.Node, view: View) -> bool:
    return view.is_parameter(node) or view.constants.scalar(node) is not None


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)
