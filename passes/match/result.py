"""What matching hands to realisation: a site (pure data) and the graph nodes it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from rewriter.ir.site import AttentionSite, NearMiss

Axis = Literal["batch", "window", "head", "kv_head", "group", "token", "channel"]


@dataclass(frozen=True)
class Layout:
    """How the canonical axes lie in a node's dimensions.

    `dims[d]` names the axes folded into dimension d, outermost first; an empty tuple is a size-1
    dimension. Canonical queries, keys, values and outputs are (batch, head, token, channel), with
    kv_head instead of head for keys and values. Examples: bhsd is
    ((batch,), (head,), (token,), (channel,)); (B*H, S, D) is ((batch, head), (token,), (channel,)).
    Windows of one image are further rows of the batch; where they have a dimension of their own it
    is called window.
    """

    dims: tuple[tuple[Axis, ...], ...]


@dataclass(frozen=True)
class Operand:
    """A node of the graph and the layout in which it holds a canonical operand."""

    node: Node
    layout: Layout


@dataclass(frozen=True)
class CoreNodes:
    """Boundary of the matched core.

    Attributes:
        query, key, value: operands as they enter (keys and values before head repetition).
        terms: mask and bias tensors, in the order of `AttentionSite.terms`; as SDPA's attn_mask or
            broadcastable to (B, H, Nq, Nk) scores. If a term meets the scores in another layout
            (such as (B*H, Nq, Nk)) its Operand layout says so.
        output: node that holds the core's result, and its layout.
        weights: node of the softmax result (in (B, H, Nq, Nk) layout) if something outside the
            core uses it, else None.
        region: all nodes of the core, from the operands (excluded) to the output (included).
        hidden: the (batch, token, channel) tensor that all three projections read, if one.
    """

    query: Operand
    key: Operand
    value: Operand
    terms: tuple[Operand, ...]
    output: Operand
    weights: Operand | None
    region: frozenset[Node]
    hidden: Node | None = None


@dataclass(frozen=True)
class Match:
    site: AttentionSite
    nodes: CoreNodes


@dataclass(frozen=True)
class MatchResult:
    """Everything found in one captured graph, in the order it runs."""

    matches: tuple[Match, ...]
    misses: tuple[NearMiss, ...]
