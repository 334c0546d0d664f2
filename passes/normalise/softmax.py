"""One softmax for its spellings: the operators, exp divided by its sum, normalisers of others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from rewriter import extension
from rewriter.passes.normalise.binary import is_binary
from rewriter.passes.normalise.noops import strip, strip_casts
from rewriter.passes.normalise.ops import arguments, dimension, op, operand, value

_OPERATORS = frozenset({"softmax", "_softmax", "_safe_softmax", "special_softmax"})
_MAXIMA = frozenset({"amax", "max"})


@dataclass(frozen=True)
class Softmax:
    """`node` = softmax of `scores` over dimension `dim` (positive).

    `dtype` is what the operator itself casts the scores to, if it does. `nodes` are the nodes of a
    hand-written softmax between scores and result, result included. `normaliser` is another name
    for what another package reads (`rewriter.extension.Anchor`). `keep`, of zeros and ones,
    multiplies the exponentials before they are summed: where it is 0 the scores are hidden.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    dtype: torch.dtype | None
    nodes: tuple[fx.Node, ...]
    normaliser: str = "softmax"
    shift_invariant: bool = True
    keep: fx.Node | None = None


def softmax(node: fx.Node) -> Softmax | None:
    """Read a node as the end of a softmax or of an installed normaliser, or None."""
    val = value(node)
    if val is None:
        return None
    return _softmax(node, val) or _of_others(node, val)


def _of_others(node: fx.Node, val: torch.Tensor) -> Softmax | None:
    for anchor in extension.anchors():
        reading = extension.guarded(anchor, partial(anchor.read, node), None)
        if reading is not None:
            dim = dimension(reading.dim, val.dim())
            facts = (anchor.name, anchor.shift_invariant)
            return Softmax(node, reading.scores, dim, None, (node,), *facts)
    return None


def _softmax(node: fx.Node, val: torch.Tensor) -> Softmax | None:
    if op(node) in _OPERATORS:
        a = arguments(node)
        dtype = a.get("dtype")
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        return Softmax(node, operand(node), dimension(int(a["dim"]), val.dim()), dtype, (node,))
    if op(node) in ("div", "mul"):
        return _by_hand(node, val.dim())
    if op(node) == "exp" and op(strip(operand(node))) in ("log_softmax", "_log_softmax"):
        inner = strip(operand(node))
        dim = dimension(int(arguments(inner)["dim"]), val.dim())
        return Softmax(node, operand(inner), dim, None, (inner, node))
    if op(node) == "exp" and op(strip(operand(node))) == "sub":
        return _by_logarithm(node, strip(operand(node)), val.dim())
    return None


def _by_logarithm(node: fx.Node, shift: fx.Node, rank: int) -> Softmax | None:
    """exp(x - logsumexp(x))."""
    if not isinstance(shift.args[1], fx.Node) or arguments(shift).get("alpha", 1) != 1:
        return None
    total = strip_casts(shift.args[1])
    lifted = op(total) == "unsqueeze"
    log = strip_casts(operand(total)) if lifted else total
    if op(log) != "logsumexp" or strip(operand(log)) is not strip(operand(shift)):
        return None
    dim = _reduced(log, rank)
    placed = dimension(int(arguments(total)["dim"]), rank) == dim if lifted else False
    if dim is None or not (placed or arguments(log)["keepdim"]):
        return None
    return Softmax(node, operand(shift), dim, None, (node, shift, total, log))


def _by_hand(node: fx.Node, rank: int) -> Softmax | None:
    """exp(x) / sum(exp(x)), with or without subtracting a maximum over the same dimension."""
    if len(node.args) < 2 or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    top, bottom = strip_casts(operand(node, 0)), strip_casts(operand(node, 1))
    nodes: list[fx.Node] = [node, bottom]
    if op(node) == "mul":
        if op(bottom) != "reciprocal":
            return None
        bottom = strip_casts(operand(bottom))
        nodes.append(bottom)
    lifted = op(bottom) == "unsqueeze"
    total = strip_casts(operand(bottom)) if lifted else bottom
    nodes.append(total)
    if op(total) != "sum" or strip_casts(operand(total)) is not top:
        return None
    whole, keep = _kept(top)
    if whole is not top:
        nodes.append(top)
        top = whole
    if op(top) != "exp" and (keep is None or op(top) not in _OPERATORS):
        return None
    dim = _reduced(total, rank)
    if dim is None or (lifted and dimension(int(arguments(bottom)["dim"]), rank) != dim):
        return None
    if not lifted and not arguments(total)["keepdim"]:
        return None
    nodes.append(top)
    scores = operand(top)
    if op(top) != "exp":  # a softmax, normalised again over what a mask leaves
        inner_dim = dimension(int(arguments(top)["dim"]), rank)
        given = arguments(top).get("dtype")
        dtype = given if isinstance(given, torch.dtype) else None
        return (
            Softmax(node, scores, dim, dtype, tuple(nodes), keep=keep) if inner_dim == dim else None
        )
    inner = strip(scores)
    if op(inner) == "sub" and isinstance(inner.args[1], fx.Node):
        shift = _maximum(strip(inner.args[1]), dim, rank)
        if shift is not None and strip(operand(shift[-1])) is strip(operand(inner)):
            nodes.extend([inner, *shift])
            scores = operand(inner)
    return Softmax(node, scores, dim, None, tuple(nodes), keep=keep)


def _kept(top: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(e, keep) of e * keep with `keep` of zeros and ones, else (top, None)."""
    if op(top) == "mul" and all(isinstance(a, fx.Node) for a in top.args[:2]):
        for at in (0, 1):
            e, keep = strip_casts(operand(top, at)), operand(top, 1 - at)
            if op(e) in ("exp", *_OPERATORS) and is_binary(keep):
                return e, keep
    return top, None


def _maximum(node: fx.Node, dim: int, rank: int) -> list[fx.Node] | None:
    """Nodes of a maximum over `dim`, kept as a dimension; the reduction comes last."""
    chain = [node]
    if op(node) == "unsqueeze":
        node = strip(operand(node))
        chain.append(node)
    if op(node) == "getitem" and node.args[1] == 0:
        node = operand(node)
        chain.append(node)
    if op(node) not in _MAXIMA or (op(node) == "max" and "dim" not in arguments(node)):
        return None
    return chain if _reduced(node, rank) == dim else None


def _reduced(node: fx.Node, rank: int) -> int | None:
    """The single dimension that a reduction reduces, or None."""
    dims = arguments(node).get("dim")
    dims = dims if isinstance(dims, list | tuple) else [dims]
    if len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return dimension(dims[0], rank)
