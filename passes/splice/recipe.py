"""Which operator call can stand for a matched core, or why none can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from rewriter.backends.registry import resolve
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.mask import (
    BlockCausal,
    Causal,
    Chunk,
    Dilated,
    SymmetricWindow,
    Window,
    WindowOrSinks,
)
from rewriter.ir.site import AddTerm, AttentionSite
from rewriter.passes.match import CoreNodes, Match, Operand
from rewriter.passes.match.inputs import example_of
from rewriter.passes.match.slices import slice_of
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import arguments, op, value
from rewriter.passes.torch_private import symbolic_expression

_DROPOUTS = {"dropout": "train", "native_dropout": "train", "feature_dropout": "train"}
_OWN_KEY = (Causal, Window, SymmetricWindow, Chunk, Dilated, BlockCausal, WindowOrSinks)
"""Atoms under which every query sees the key at its own position."""


@dataclass(frozen=True)
class Recipe:
    """One call of `attention_rewriter::block_sparse` in the place of a core.

    Attributes:
        spec: what it computes.
        backend: whose kernel.
        padded: the mask terms say which keys are padding; they are read at run time.
    """

    spec: BlockSparse
    backend: str
    padded: bool

    def describe(self) -> str:
        """For people: 'block_sparse on cpu, padding from the mask'."""
        more = ", padding from the mask" if self.padded else ""
        return f"block_sparse on {self.backend}{more}"


def recipe_for(
    found: Match,
    view: View,
    needs_grad: bool,
    allow_reference: bool = False,
    other: BlockSparse | None = None,
) -> Recipe | str:
    """The form of a site as one operator, or one sentence that says why it stays as it is.

    Args:
        view: the captured graph.
        needs_grad: the graph will be differentiated.
        allow_reference: plain torch may stand in where no generated kernel serves the site.
        other: what to compute instead of the site's own attention (an approximate policy).
    """
    site, nodes = found.site, found.nodes
    reason = _unfit(site, nodes) or caller_decides(found, view)
    if reason is not None:
        return reason
    if other is not None and site.mask.padding:
        return "an approximate mixer takes no padding mask in a compiled graph"
    if site.mask.padding:
        reason = next((r for t, role in _masks(site, nodes) if (r := _unreadable(t, role))), None)
        reason = reason or _counted_apart(site, nodes)
        if reason is not None:
            return reason
    tensor = _tensor(nodes.value.node)
    spec = BlockSparse(
        site.heads.key_dim,
        site.heads.value_dim,
        site.scale,
        site.mask.without_padding().predicate,
        site.softcap,
    )
    spec = other or spec
    kernel = resolve(spec, tensor.device, tensor.dtype, needs_grad)
    if kernel.backend == "reference" and not allow_reference:
        why = "; ".join(f"{name}: {text}" for name, text in kernel.declined)
        return f"there is no generated kernel for it ({why or 'generated code is switched off'})"
    return Recipe(spec, kernel.backend, site.mask.padding)


def mask_terms(found: Match) -> Iterator[tuple[int, Operand]]:
    """Terms that hide keys, with their index."""
    for index, (term, role) in enumerate(zip(found.nodes.terms, found.site.terms, strict=True)):
        if role in ("mask", "mask_and_bias"):
            yield index, term


def caller_decides(found: Match, view: View) -> str | None:
    """Why the mask is not known before the call, if it is not: a graph serves many calls.

    The one input that may shape a mask is a (batch, keys) tensor of zeros and ones, because what
    it hides is read off the mask at run time.
    """
    keys = tokens(found.nodes.key)
    for _, term in mask_terms(found):
        for node in slice_of(term.node, view).inputs:
            tensor = value(node)
            if node.name not in view.captured.inputs or tensor is None or tensor.dim() == 0:
                continue
            example = example_of(node, view)
            binary = bool(((example == 0) | (example == 1)).all())
            sizes = [symbolic_expression(s) for s in tensor.shape]
            rows_are_tokens = tensor.dim() == 2 and sizes[0] == sizes[1] == keys
            if not (binary and found.site.mask.padding) or tensor.dim() > 2 or rows_are_tokens:
                return f"the mask depends on the input '{node.name}', whose values each call brings"
    return None


def _unfit(site: AttentionSite, nodes: CoreNodes) -> str | None:
    if site.mask.opaque is not None:
        return f"the mask is opaque ({site.mask.opaque})"
    if site.normaliser != "softmax":
        return f"the scores are normalised by {site.normaliser}, which has no fused form"
    if site.mask.given:
        return "the mask holds documents or groups, which each call brings"
    if any(isinstance(s, AddTerm) and s.factor != 1.0 for s in site.score):
        return "the mask is added with a factor, which has no fused form here"
    if site.has_bias:
        return "the scores have an additive bias, which has no fused form here yet"
    if nodes.weights is not None:
        return "the attention weights are used outside of the core"
    if site.dropout and _drops(site, nodes):
        return "dropout on the attention weights is active"
    layouts = (nodes.query.layout, nodes.key.layout, nodes.value.layout, nodes.output.layout)
    if any("window" in dim for layout in layouts for dim in layout.dims):
        return "the windows of an image have a dimension of their own"
    operands = [_tensor(o.node) for o in (nodes.query, nodes.key, nodes.value)]
    if len({t.dtype for t in operands}) > 1:
        return "queries, keys and values differ in dtype"
    if len({t.device for t in operands}) > 1:
        return "queries, keys and values are on different devices"
    if tokens(nodes.query) == 1:
        return "a single query token gains nothing from a schedule of key blocks"
    return None


def _drops(site: AttentionSite, nodes: CoreNodes) -> bool:
    """Whether a dropout of the core is switched on; SDPA has no switch but its probability."""
    if site.spelling == "sdpa":
        return True
    for node in nodes.region:
        if op(node) in _DROPOUTS:
            a = arguments(node)
            if a.get(_DROPOUTS[op(node)], True) and a.get("p", 1.0):
                return True
    return False


def _masks(site: AttentionSite, nodes: CoreNodes) -> Iterator[tuple[Operand, str]]:
    for term, role in zip(nodes.terms, site.terms, strict=True):
        if role in ("mask", "mask_and_bias"):
            yield term, role


def _unreadable(term: Operand, role: str) -> str | None:
    """Why the padding cannot be read off a term; see `emit.valid_keys`."""
    dims = term.layout.dims
    if any(len(dim) > 1 for dim in dims) or any("head" in d or "kv_head" in d for d in dims):
        return "the mask tensor has another layout than (batch, 1, queries, keys)"
    if dims[-1:] != (("token",),):
        return "the mask tensor has no axis of keys at its end"
    return None


def _counted_apart(site: AttentionSite, nodes: CoreNodes) -> str | None:
    if not all(isinstance(a, _OWN_KEY) for a in site.mask.without_padding().atoms):
        return "padding cannot be read off this mask, where a query may not see its own position"
    if tokens(nodes.query) != tokens(nodes.key):
        return "queries and keys are counted apart, so padding cannot be read off the mask"
    return None


def tokens(operand: Operand) -> sympy.Expr | int:
    """Symbolic number of tokens of an operand whose token axis has a dimension of its own."""
    shape = _tensor(operand.node).shape
    place = next((d for d, dim in enumerate(operand.layout.dims) if "token" in dim), None)
    size: Any = 1 if place is None else shape[place]
    return symbolic_expression(size)


def _tensor(node: fx.Node) -> torch.Tensor:
    tensor = value(node)
    assert tensor is not None
    return tensor
