"""Contract 8 for a splice: the new nodes equal the core they replace, outputs and gradients.

Both are run on random queries, keys and values and on masks made from the site's predicate, at a
generic length, at one where a window shows, and with padding at the end and in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from rewriter.ir.mask import Chunk, SymmetricWindow, Window
from rewriter.ir.site import FillTerm
from rewriter.passes.compare import max_difference
from rewriter.passes.match import Match, Operand
from rewriter.passes.normalise.ops import value
from rewriter.passes.splice.recipe import tokens
from rewriter.passes.splice.region import ProbeSizes, RegionError, evaluate
from rewriter.passes.torch_private import symbolic_expression
from rewriter.passes.verify.exact import BOUND

_GENERIC, _BATCH = 37, 2
_LARGEST = 1 << 26  # scores of one probe


@dataclass(frozen=True)
class Probe:
    """One set of inputs: sizes, and which keys are valid ((B, N) bool)."""

    sizes: ProbeSizes
    valid: torch.Tensor


def difference(found: Match, new: fx.Node, module: fx.GraphModule, needs_grad: bool) -> float | str:
    """Largest difference between core and replacement relative to the largest value.

    A sentence says what fails or differs too much.
    """
    worst = 0.0
    bound = BOUND.get(_tensor(found.nodes.value.node).dtype, 1e-2)
    try:
        for probe in _probes(found):
            known = _inputs(found, probe)
            theirs = _results(found, found.nodes.output.node, known, probe, module, needs_grad)
            ours = _results(found, new, known, probe, module, needs_grad)
            for part, a, b in zip(("output", "gradient", "gradient", "gradient"), ours, theirs,
                                  strict=False):  # fmt: skip
                gap = max_difference(a, b) / max(float(b.float().abs().max()), 1e-6)
                worst = max(worst, gap)
                if gap > bound:
                    return f"the {part} differs from the original by {gap:.1e}, allowed {bound:g}"
    except RegionError as error:
        return f"the core cannot be run by itself: {error}"
    return worst


def _results(
    found: Match,
    node: fx.Node,
    known: Mapping[fx.Node, torch.Tensor],
    probe: Probe,
    module: fx.GraphModule,
    needs_grad: bool,
) -> list[torch.Tensor]:
    """Output and, if wanted, gradients of queries, keys and values."""
    operands = [found.nodes.query.node, found.nodes.key.node, found.nodes.value.node]
    with torch.inference_mode(False), torch.set_grad_enabled(needs_grad):
        leaves = {n: known[n].detach().clone().requires_grad_(needs_grad) for n in operands}
        out = evaluate(node, {**known, **leaves}, probe.sizes, module)
        if not needs_grad:
            return [out]
        cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))
    return [out.detach(), *grads]


def _probes(found: Match) -> Iterator[Probe]:
    mask = found.site.mask
    local = [a.size for a in mask.atoms if isinstance(a, Window | Chunk)]
    local += [a.radius for a in mask.atoms if isinstance(a, SymmetricWindow)]
    base = _sizes(found, _GENERIC)
    room = math.isqrt(_LARGEST // max(_rows(found, base), 1))
    lengths = {_GENERIC, *(min(size + 13, room) for size in local)}
    for length in sorted(lengths):
        sizes = _sizes(found, length)
        batch, queries, keys = _counts(found, sizes)
        whole = torch.ones(batch, keys, dtype=torch.bool)
        yield Probe(sizes, whole)
        if mask.padding:
            right, hole = whole.clone(), whole.clone()
            right[0, -2:] = False
            hole[-1, 1:2] = False
            for valid in (right, hole):
                rows, columns = torch.arange(queries), torch.arange(keys)
                if bool(mask.dense(rows, columns, valid).any(-1).all()):
                    yield Probe(sizes, valid)


def _sizes(found: Match, length: int) -> ProbeSizes:
    """Tokens count `length`; other free sizes are small, fixed ones as traced."""
    nodes = found.nodes
    counted = [sympy.sympify(tokens(o)) for o in (nodes.query, nodes.key)]
    tensors = [_tensor(o.node) for o in (nodes.query, nodes.key, nodes.value, *nodes.terms)]
    every = {s for t in tensors for n in t.shape for s in symbolic_expression(n).free_symbols}
    mine = set().union(*(c.free_symbols for c in counted))
    symbols = {s: length if s in mine else _BATCH for s in every}
    fixed = {int(c) for c in counted if not c.free_symbols}
    heads = found.site.heads
    taken = {heads.query, heads.key_value, heads.key_dim, heads.value_dim, heads.group, 1}
    counts = {n: length for n in fixed if n > length and n not in taken}
    return ProbeSizes(symbols, counts)


def _rows(found: Match, sizes: ProbeSizes) -> int:
    batch, _, _ = _counts(found, sizes)
    return batch * found.site.heads.query


def _counts(found: Match, sizes: ProbeSizes) -> tuple[int, int, int]:
    """(batch, queries, keys) of a probe."""
    shape = sizes.shape(_tensor(found.nodes.query.node))
    batch = math.prod(shape)
    batch //= found.site.heads.query * found.site.heads.key_dim
    queries, keys = (sizes.number(_count(o)) for o in (found.nodes.query, found.nodes.key))
    return batch // queries, queries, keys


def _count(operand: Operand) -> int | torch.SymInt:
    place = next((d for d, dim in enumerate(operand.layout.dims) if "token" in dim), None)
    return 1 if place is None else _tensor(operand.node).shape[place]


def _inputs(found: Match, probe: Probe) -> dict[fx.Node, torch.Tensor]:
    """Random operands, sharp enough that a wrong mask shows, and terms made from the predicate."""
    nodes = found.nodes
    generator = torch.Generator().manual_seed(11)
    out: dict[fx.Node, torch.Tensor] = {}
    for operand, width in ((nodes.query, 3.0), (nodes.key, 1.0), (nodes.value, 1.0)):
        like = _tensor(operand.node)
        drawn = torch.randn(probe.sizes.shape(like), generator=generator) * width
        out[operand.node] = drawn.to(like.device, like.dtype)
    for index, term in enumerate(nodes.terms):
        out[term.node] = _term(found, index, probe)
    return out


def _term(found: Match, index: int, probe: Probe) -> torch.Tensor:
    """A mask tensor that hides what the predicate hides, in the term's own layout and dtype."""
    term, site = found.nodes.terms[index], found.site
    like = _tensor(term.node)
    names = [name for dim in term.layout.dims for name in (dim if dim else ("",))]
    if any(len(dim) > 1 for dim in term.layout.dims):
        raise RegionError(f"the mask '{term.node.name}' has folded axes")
    batch, queries, keys = _counts(found, probe.sizes)
    hides = site.terms[index] != "none"
    allow = torch.ones(batch, queries, keys, dtype=torch.bool)
    if hides and names[-1] == "token":
        if names[:-1].count("token"):
            rows, columns = torch.arange(queries), torch.arange(keys)
            allow &= site.mask.without_padding().dense(rows, columns)
        if "batch" in names and site.mask.padding:
            allow &= probe.valid[:, None, :]
    shown: list[int | None] = []
    wanted = {"batch": 0, "query": 1, "key": 2}
    for place, name in enumerate(names):
        role = ("key" if place == len(names) - 1 else "query") if name == "token" else name
        shown.append(wanted.get(role))
    for axis in reversed(range(3)):
        if axis not in shown:
            allow = allow.select(axis, 0)
    for place in (p for p, axis in enumerate(shown) if axis is None):
        allow = allow.unsqueeze(place)
    allow = allow.expand(probe.sizes.shape(like)).to(like.device)
    fill = next((s for s in site.score if isinstance(s, FillTerm) and s.index == index), None)
    if fill is not None:
        return (allow if fill.keep else ~allow).to(like.dtype)
    if like.dtype == torch.bool:
        return allow.clone()
    low = torch.finfo(like.dtype).min
    return torch.where(allow, 0.0, low).to(like.dtype)


def _tensor(node: fx.Node) -> torch.Tensor:
    tensor = value(node)
    assert tensor is not None
    return tensor
