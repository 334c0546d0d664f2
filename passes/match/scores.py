"""From a softmax back to the product of queries and keys, through a table of transparent rules.

Each rule reads one node and yields a typed step, or a refusal that names the node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from rewriter.ir.site import (
    AddTerm,
    FillTerm,
    Scale,
    ScoreStep,
    SinkTerm,
    Softcap,
    TemperatureTerm,
)
from rewriter.passes.match.content import depends_on_input, is_content
from rewriter.passes.match.draft import Facts, Labelled, Scores, Sink
from rewriter.passes.match.guards import gates, late_changes
from rewriter.passes.match.leads import leads_to_product, of_activations
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.axes import Axes, Labels
from rewriter.passes.normalise.binary import is_binary, line
from rewriter.passes.normalise.contract import Contraction, contraction
from rewriter.passes.normalise.layout import backward
from rewriter.passes.normalise.noops import cast_dtype, is_cast, is_noop, strip
from rewriter.passes.normalise.ops import arguments, dimension, op, operand
from rewriter.passes.normalise.softmax import Softmax


@dataclass
class _Walk:
    """State of one walk; steps and terms are collected backwards."""

    view: View
    axes: Axes
    facts: Facts
    node: fx.Node
    labels: Labels
    key_axis: tuple[int, ...]
    steps: list[ScoreStep | fx.Node] = field(default_factory=list)
    fills: dict[fx.Node, FillTerm] = field(default_factory=dict)
    factors: dict[fx.Node, float] = field(default_factory=dict)
    terms: dict[fx.Node, Labelled] = field(default_factory=dict)
    warm: dict[fx.Node, bool] = field(default_factory=dict)
    sink: Sink | None = None
    dtype: str | None = None
    softmax: bool = True
    shift_invariant: bool = True

    def join(self, at: fx.Node, term: fx.Node, main: fx.Node) -> Refusal | None:
        """Record that `term` joins the scores at node `at`."""
        shape = self.view.sizes.of(term)
        if len(shape) > len(self.labels):
            return Refusal("a mask or bias has more dimensions than the scores", at)
        aligned = self.labels[len(self.labels) - len(shape) :]
        labels = tuple(() if s == 1 else d for s, d in zip(shape, aligned, strict=True))
        if self.view.sizes.of(main) != self.view.sizes.of(at):
            return Refusal("a mask or bias is larger than the scores it is added to", at)
        self.terms[at] = Labelled(term, labels)
        self.steps.append(at)
        return None


def scores(
    softmax: Softmax, labels: Labels, view: View, axes: Axes, facts: Facts
) -> Scores | Refusal:
    """Walk back from a softmax whose result carries `labels`."""
    walk = _Walk(view, axes, facts, softmax.scores, labels, labels[softmax.dim])
    walk.softmax = softmax.normaliser == "softmax"
    walk.shift_invariant = softmax.shift_invariant
    key_axis = labels[softmax.dim]
    if softmax.keep is not None:
        refusal = walk.join(softmax.node, softmax.keep, softmax.scores)
        if refusal is not None:
            return refusal
        walk.fills[softmax.node] = FillTerm(0, -math.inf, keep=True)
        walk.facts.add(f"exponentials times '{softmax.keep.name}' of zeros and ones")
    if softmax.dtype is not None:
        walk.dtype = str(softmax.dtype).removeprefix("torch.")
    while True:
        found = contraction(walk.node, walk.labels, axes, view.sizes)
        if isinstance(found, str):
            return Refusal(found, walk.node)
        if found is not None and view.linear(walk.node) is None:
            if walk.sink is not None:
                key_axis = walk.sink.keys
            return _finish(walk, found, axes.leaves(key_axis))
        if walk.softmax and walk.sink is None and op(walk.node) == "cat":
            refusal = _sink(walk, walk.node, key_axis)
            if refusal is not None:
                return refusal
            continue
        refusal = _step(walk)
        if refusal is not None:
            return refusal


def _step(walk: _Walk) -> Refusal | None:
    node = walk.node
    if is_cast(node) and walk.dtype is None and not walk.steps:
        dtype = cast_dtype(node)
        walk.dtype = str(dtype).removeprefix("torch.")
    if is_noop(node) or is_cast(node):
        walk.node = operand(node)
        return None
    rule = _RULES.get(op(node))
    if rule is not None:
        return rule(walk, node)
    step = backward(node, walk.labels, walk.axes, walk.view.sizes)
    if step is not None and not step.repeated:
        walk.node, walk.labels = step.source, step.labels
        return None
    kind = op(node) or node.op
    if kind == "getitem" and op(operand(node)) in ("topk", "sort"):
        return Refusal("the softmax runs over the largest of some scores: a gate", node)
    if walk.view.linear(node) is not None:
        return Refusal("the softmax follows a projection, not a product of queries and keys", node)
    return Refusal(f"'{kind}' stands between a product and the softmax and is not understood", node)


def _scale(walk: _Walk, node: fx.Node) -> Refusal | None:
    """A factor, or the outer factor of a soft-cap."""
    divide = op(node) == "div"
    if divide and arguments(node).get("rounding_mode"):
        return Refusal("the scores are rounded", node)
    factor = walk.view.constants.scalar(node.args[1])
    main = node.args[0]
    if factor is None and not divide:
        factor, main = walk.view.constants.scalar(node.args[0]), node.args[1]
    if factor is None:
        return _temperature(walk, node, divide)
    if not isinstance(main, fx.Node) or factor == 0.0:
        return Refusal("the scores are scaled by something that is no constant", node)
    if not divide and op(strip(main)) == "tanh":
        return _softcap(walk, strip(main), factor)
    walk.steps.append(Scale(factor, divide=divide))
    walk.facts.add(f"scale {1 / factor if divide else factor:g}")
    walk.node = main
    return None


def _temperature(walk: _Walk, node: fx.Node, divide: bool) -> Refusal | None:
    """A learned factor that all keys of a query share: one for each head, say."""
    refusal = Refusal("the scores are scaled by something that is no constant", node)
    pair = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    leading = [a for a in pair if leads_to_product(walk.view, a)]
    if len(pair) != 2 or len(leading) != 1 or (divide and leading[0] is not pair[0]):
        return refusal
    main = leading[0]
    term = pair[1] if main is pair[0] else pair[0]
    if depends_on_input(term, walk.view) or not walk.softmax:
        return refusal
    key = set(walk.axes.leaves(walk.key_axis if walk.sink is None else walk.sink.keys))
    joined = walk.join(node, term, main)
    if joined is not None:
        return joined
    if key & {a for dim in walk.axes.resolve(walk.terms[node].labels) for a in dim}:
        return refusal
    walk.warm[node] = divide
    walk.facts.add(f"learned factor '{term.name}'")
    walk.node = main
    return None


def _softcap(walk: _Walk, node: fx.Node, cap: float = 1.0) -> Refusal | None:
    inner = strip(operand(node))
    divisor = None
    if op(inner) in ("div", "mul"):
        divisor = walk.view.constants.scalar(inner.args[1])
        if divisor is not None and op(inner) == "mul" and divisor != 0.0:
            divisor = 1.0 / divisor
    if divisor:
        walk.node = operand(inner)
    else:
        divisor, walk.node = 1.0, operand(node)
    walk.steps.append(Softcap(cap))
    if abs(divisor - cap) > 1e-6 * abs(cap):
        walk.steps.append(Scale(cap / divisor))
    walk.facts.add(f"softcap {cap:g}")
    return None


def _add(walk: _Walk, node: fx.Node) -> Refusal | None:
    alpha = arguments(node).get("alpha", 1)
    if not isinstance(alpha, int | float) or alpha == 0:
        return Refusal("a mask or bias is added with a factor that is no constant", node)
    blend = _blend(walk.view, node, float(alpha))
    if blend is not None:
        return blend.apply(walk, node)
    pair = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if len(pair) != 2:
        return _shift(walk, node, pair)
    leading = [a for a in pair if leads_to_product(walk.view, a)]
    if len(leading) == 2:
        leading = [a for a in leading if of_activations(walk.view, a)] or leading
    if len(leading) == 2:
        leading = [a for a in leading if not is_content(a, walk.view, needs_gather=True)] or leading
    if len(leading) == 2 and op(node) == "sub":
        return Refusal("something is subtracted from the scores", node)
    if len(leading) != 1:
        what = "two products are added" if leading else "no product of queries and keys is in sight"
        return Refusal(f"{what} before the softmax", node)
    main = leading[0]
    term = pair[1] if main is pair[0] else pair[0]
    if main is pair[1] and (alpha != 1 or op(node) == "sub"):
        return Refusal("something is subtracted from the scores", node)
    refusal = walk.join(node, term, main)
    if refusal is None:
        walk.factors[node] = -float(alpha) if op(node) == "sub" else float(alpha)
        walk.facts.add(f"added term '{term.name}'")
        walk.node = main
    return refusal


@dataclass(frozen=True)
class _Blend:
    """x * keep + fill * (1 - keep), `keep` of zeros and ones: x filled where `keep` is 0."""

    main: fx.Node
    keep: fx.Node
    fill: float

    def apply(self, walk: _Walk, node: fx.Node) -> Refusal | None:
        refusal = walk.join(node, self.keep, self.main)
        if refusal is None:
            walk.fills[node] = FillTerm(0, self.fill, keep=True)
            walk.facts.add(f"scores filled with {self.fill:g} where '{self.keep.name}' is 0")
            walk.node = self.main
        return refusal


def _blend(view: View, node: fx.Node, alpha: float) -> _Blend | None:
    pair = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if len(pair) != 2:
        return None
    subtract = op(node) == "sub"
    for product, other in (pair,) if subtract or alpha != 1 else (pair, pair[::-1]):
        product = strip(product)
        if op(product) != "mul" or not all(isinstance(a, fx.Node) for a in product.args[:2]):
            continue
        x, b = product.args[:2]
        for main, keep in ((x, b), (b, x)):
            assert isinstance(main, fx.Node)
            assert isinstance(keep, fx.Node)
            if not is_binary(keep, view.captured.parameter) or not leads_to_product(view, main):
                continue
            one, two = line(keep), line(other)
            if one.base is not two.base:
                continue
            slope = two.scale / one.scale
            fill = two.shift - slope * one.shift
            if slope + fill == 0.0:
                return _Blend(main, keep, (-alpha if subtract else alpha) * fill)
    return None


def _shift(walk: _Walk, node: fx.Node, main: list[fx.Node]) -> Refusal | None:
    """A number added to all scores of a row changes no softmax, but it changes a soft-cap."""
    if len(main) != 1 or any(isinstance(s, Softcap) for s in walk.steps):
        return Refusal("a constant is added to the scores before the soft-cap", node)
    if not walk.shift_invariant:
        return Refusal("a constant is added to scores that are not normalised by softmax", node)
    walk.facts.add("a constant added to all scores, which changes nothing")
    walk.node = main[0]
    return None


def _sub(walk: _Walk, node: fx.Node) -> Refusal | None:
    """x - r(x) changes no softmax if r reduces over the keys; other differences are refused."""
    if not isinstance(node.args[1], fx.Node):
        return _shift(walk, node, [operand(node)])
    if not isinstance(node.args[0], fx.Node):
        return Refusal("something is subtracted from the scores", node)
    shift = strip(node.args[1])
    if op(shift) == "getitem":
        shift = operand(shift)
    if op(shift) not in _REDUCTIONS or strip(operand(shift)) is not strip(operand(node)):
        return _add(walk, node)
    over = arguments(shift).get("dim")
    dims = over if isinstance(over, list | tuple) else [over]
    key = walk.axes.leaves(walk.key_axis)
    for d in dims:
        if not isinstance(d, int) or walk.axes.leaves(walk.labels[d]) != key:
            return Refusal("the scores are shifted over another axis than the softmax's", node)
    return _shift(walk, node, [operand(node)])


_REDUCTIONS = frozenset({"amax", "max", "mean", "amin", "logsumexp", "sum"})


def _fill(walk: _Walk, node: fx.Node) -> Refusal | None:
    """masked_fill(x, mask, c), where(mask, x, c) and where(mask, c, x)."""
    if op(node) == "masked_fill":
        main, mask, constant, keep = node.args[0], node.args[1], node.args[2], False
    else:
        mask, yes, no = node.args[:3]
        keep = isinstance(yes, fx.Node) and leads_to_product(walk.view, yes)
        main, constant = (yes, no) if keep else (no, yes)
    fill = walk.view.constants.scalar(constant)
    if fill is None or not isinstance(main, fx.Node) or not isinstance(mask, fx.Node):
        return Refusal("the scores are filled with something that is no constant", node)
    refusal = walk.join(node, mask, main)
    if refusal is None:
        walk.fills[node] = FillTerm(0, fill, keep)
        walk.facts.add(f"boolean mask '{mask.name}'")
        walk.node = main
    return refusal


def _sink(walk: _Walk, node: fx.Node, key_axis: tuple[int, ...]) -> Refusal | None:
    """cat([scores, sink]) or cat([sink, scores]) along the keys, the sink one column wide."""
    a = arguments(node)
    parts = a["tensors"]
    shape = walk.view.sizes.of(node)
    dim = dimension(int(a.get("dim") or 0), len(shape))
    leading = [leads_to_product(walk.view, p) for p in parts]
    if walk.axes.leaves(walk.labels[dim]) != walk.axes.leaves(key_axis):
        return Refusal("scores are joined along another axis than the softmax runs over", node)
    if len(parts) != 2 or sum(leading) != 1:
        return Refusal("the softmax runs over several products joined side by side", node)
    main, term = parts[leading.index(True)], parts[leading.index(False)]
    if walk.view.sizes.of(term)[dim] != 1:
        return Refusal("the scores are joined with more than one other column", node)
    keys = walk.axes.new(walk.view.sizes.of(main)[dim])
    walk.sink = Sink(walk.labels[dim], keys, first=parts[0] is term)
    walk.labels = (*walk.labels[:dim], keys, *walk.labels[dim + 1 :])
    sizes = walk.view.sizes.of(term)
    labels = tuple(() if s == 1 else d for s, d in zip(sizes, walk.labels, strict=True))
    walk.terms[node] = Labelled(term, labels)
    walk.steps.append(node)
    walk.facts.add(f"learned sink '{term.name}'")
    walk.node = main
    return None


_RULES: Mapping[str, Callable[[_Walk, fx.Node], Refusal | None]] = {
    "mul": _scale,
    "div": _scale,
    "tanh": _softcap,
    "add": _add,
    "sub": _sub,
    "masked_fill": _fill,
    "where": _fill,
}


def _finish(walk: _Walk, product: Contraction, key_axis: tuple[int, ...]) -> Scores | Refusal:
    axes = walk.axes
    if product.added is not None:
        walk.factors[product.node] = product.beta
        shape = walk.view.sizes.of(product.added)
        aligned = walk.labels[len(walk.labels) - len(shape) :]
        labels = tuple(() if s == 1 else d for s, d in zip(shape, aligned, strict=True))
        walk.terms[product.node] = Labelled(product.added, labels)
        walk.steps.append(product.node)
        walk.facts.add(f"added term '{product.added.name}'")
    if product.alpha != 1.0:
        walk.steps.append(Scale(product.alpha))
        walk.facts.add(f"scale {product.alpha:g}")
    left = set(axes.leaves(a for dim in product.left_labels for a in dim))
    right = set(axes.leaves(a for dim in product.right_labels for a in dim))
    key = set(axes.leaves(key_axis))
    if not key or (key & left and key & right):
        return Refusal("the softmax runs over an axis that queries and keys share", product.node)
    sides = (
        Labelled(product.left, product.left_labels),
        Labelled(product.right, product.right_labels),
    )
    query, keys = sides if key <= right else sides[::-1]
    steps: list[ScoreStep] = []
    terms: list[Labelled] = []
    for item in reversed(walk.steps):
        if not isinstance(item, fx.Node):
            steps.append(item)
            continue
        fill = walk.fills.get(item)
        index = len(terms)
        if op(item) == "cat":
            steps.append(SinkTerm(index))
        elif item in walk.warm:
            steps.append(TemperatureTerm(index, walk.warm[item]))
        else:
            factor = walk.factors.get(item, 1.0)
            made = FillTerm(index, fill.value, fill.keep) if fill else AddTerm(index, factor)
            steps.append(made)
        terms.append(walk.terms[item])
    held = [t.node for t in terms]
    refusal = late_changes(steps, product.node) or gates(held, product.node, walk.view)
    return refusal or Scores(query, keys, tuple(steps), tuple(terms), walk.dtype, walk.sink)
