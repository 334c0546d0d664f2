"""Find every attention block of a captured graph: anchor on softmax, peel outward, name parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from rewriter.ir.site import AttentionSite, NearMiss, PositionKind, Projection
from rewriter.passes.capture import Captured
from rewriter.passes.match import anchors, heads, producers
from rewriter.passes.match.draft import Draft, Facts
from rewriter.passes.match.fingerprint import fingerprint
from rewriter.passes.match.heads import Operands
from rewriter.passes.match.result import CoreNodes, Match, MatchResult
from rewriter.passes.match.semantics import Meaning, Semantics
from rewriter.passes.match.story import around
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.ops import value
from rewriter.passes.provenance import common_module, module_path, module_stack, source_of


def match(captured: Captured) -> MatchResult:
    """Every attention block that is understood, and a near miss for every one that is not."""
    view = View(captured)
    semantics = Semantics(view)
    matches: list[Match] = []
    misses: list[NearMiss] = []
    cores = [_core(node, view) for node in anchors.candidates(view)]
    pieces = _pieces(cores, view)
    for core in cores:
        facts, found = core.facts, core.found
        if isinstance(found, _Named):
            found = pieces.get(found.draft.anchor) or _site(found, view, semantics, matches)
        if isinstance(found, Refusal):
            misses.append(_miss(found, facts))
        else:
            matches.append(found)
    return MatchResult(tuple(_placed(matches)), tuple(misses))


def _miss(refusal: Refusal, facts: Facts) -> NearMiss:
    return NearMiss(
        "match",
        refusal.reason,
        source_of(refusal.node),
        tuple(facts.lines),
        facts.step,
        around(refusal.node),
    )


def _placed(matches: Sequence[Match]) -> Iterator[Match]:
    """The matches with their place among the blocks and runs of their owners."""
    owners: dict[str, dict[int, list[int]]] = {}
    calls = [dict(module_stack(m.nodes.output.node)).get(m.site.fqn, 0) for m in matches]
    for found, call in zip(matches, calls, strict=True):
        owners.setdefault(found.site.fqn, {}).setdefault(call, []).append(found.site.index)
    for found, call in zip(matches, calls, strict=True):
        runs = owners[found.site.fqn]
        site = replace(
            found.site,
            slot=runs[call].index(found.site.index),
            slots=len(runs[call]),
            run=list(runs).index(call),
            runs=len(runs),
        )
        yield replace(found, site=site)


@dataclass(frozen=True)
class _Named:
    """A core whose parts have names, and what stands before each operand."""

    draft: Draft
    operands: Operands
    found: dict[str, producers.Upstream]


@dataclass(frozen=True)
class _Core:
    """What was read at one anchor."""

    facts: Facts
    found: _Named | Match | Refusal


def _core(node: fx.Node, view: View) -> _Core:
    facts = Facts()
    draft = anchors.read(node, view, facts)
    if isinstance(draft, Refusal):
        return _Core(facts, draft)
    facts.step = "axes"
    named = heads.operands(draft, view)
    if isinstance(named, Refusal):
        return _Core(facts, named)
    facts.add(
        f"{named.heads.query} query and {named.heads.key_value} key/value heads, "
        f"{named.heads.key_dim} and {named.heads.value_dim} wide"
    )
    facts.step = "tokens"
    found = {
        "query": producers.upstream(named.query.node, view),
        "key": producers.upstream(named.key.node, view),
        "value": producers.upstream(named.value.node, view),
    }
    return _Core(facts, _Named(draft, named, found))


def _pieces(cores: list[_Core], view: View) -> dict[fx.Node, Refusal]:
    """Refusals, by anchor, for cores that each serve a part of the tokens of one projection.

    Such cores are one attention, computed block by block; replacing a block means nothing.
    """
    parts: dict[fx.Node, list[fx.Node]] = {}
    for core in cores:
        if not isinstance(core.found, _Named) or len(core.found.found["query"].linears) != 1:
            continue
        linear = core.found.found["query"].linears[0]
        if _summed_up(core.found, "query", view):
            parts.setdefault(linear, []).append(core.found.draft.anchor)
    reason = "it serves some queries of one projection, {} more the rest: attention block by block"
    return {
        anchor: Refusal(reason.format(len(together) - 1), anchor)
        for together in parts.values()
        if len(together) > 1
        for anchor in together
    }


def _site(core: _Named, view: View, semantics: Semantics, before: list[Match]) -> Match | Refusal:
    draft, named, found = core.draft, core.operands, core.found
    for side, up in found.items():
        picked = producers.picked(up)
        if picked is not None:
            return Refusal(f"the {side} tokens are picked by the largest of some scores", picked)
    meaning = semantics.of(draft, named)
    region = _region(draft, named)
    output = producers.downstream(named.output.node, view)
    projections, linears = producers.projections(found, output)
    owner = common_module([module_path(n) for n in (*region, *linears)])
    hidden, hidden_dim = producers.hidden(found, named.query, view)
    rotary = producers.rotary_width(named.query, found["query"], view)
    site = AttentionSite(
        fqn=owner,
        index=len(before),
        heads=named.heads,
        score=(*named.scales, *draft.steps),
        terms=meaning.roles,
        mask=meaning.mask,
        spelling=draft.spelling,
        source=source_of(draft.anchor),
        position=_position(rotary, meaning),
        rotary_dim=rotary,
        softmax_dtype=draft.softmax_dtype,
        dropout=draft.dropout,
        projections=_relative(projections, owner),
        prescaled=named.prescaled * _factor(found["query"], named, view),
        causal_flag=draft.causal_flag,
        qk_norm=found["query"].normed and found["key"].normed,
        cross=_crosses(core, view),
        fingerprint=fingerprint(owner, draft.anchor, view),
        hidden_dim=hidden_dim,
        normaliser=draft.normaliser,
    )
    nodes = CoreNodes(
        query=named.query,
        key=named.key,
        value=named.value,
        terms=named.terms,
        output=named.output,
        weights=named.weights,
        region=region,
        hidden=hidden,
    )
    return Match(site, nodes)


def _factor(query: producers.Upstream, named: Operands, view: View) -> float:
    """Scalars on the query that lie further back than the operands were followed."""
    if len(query.linears) != 1 or query.linears[0] is named.query_start:
        return 1.0
    return producers.scaled_behind(query.linears[0], named.query_start, view)


def _crosses(core: _Named, view: View) -> bool:
    """By their numbers, and where these agree, by where queries and keys come from.

    More keys than queries are a memory beside the tokens, or those of an earlier block.
    """
    axes = core.draft.axes
    if axes.total(core.draft.query_axis) != axes.total(core.draft.key_axis):
        return True
    if _summed_up(core, "query", view) or _summed_up(core, "key", view):
        return True
    return producers.same_source(core.found["query"], core.found["key"], view) is False


def _summed_up(core: _Named, side: Literal["query", "key"], view: View) -> bool:
    """Whether an operand has fewer tokens than its projection: landmarks, means of segments."""
    linears, heads_ = core.found[side].linears, core.operands.heads
    if len(linears) != 1:
        return False
    item, count = core.operands.key, heads_.key_value
    if side == "query":
        item, count = core.operands.query, heads_.query
    read_ = view.linear(linears[0])
    before = view.sizes.of(read_.source) if read_ is not None else ()
    if len(before) not in (2, 3):
        return False
    tokens = math.prod(view.sizes.of(item.node)) // (count * heads_.key_dim)
    return tokens < math.prod(before[:-1])


def _region(draft: Draft, named: Operands) -> frozenset[fx.Node]:
    """Tensor nodes between the operands (excluded) and the output (included)."""
    stop = {named.query.node, named.key.node, named.value.node, *(t.node for t in named.terms)}
    region: set[fx.Node] = set()
    stack = [draft.output.node]
    while stack:
        node = stack.pop()
        if node in region or node in stop or node.op == "placeholder" or value(node) is None:
            continue
        region.add(node)
        stack.extend(node.all_input_nodes)
    return frozenset(region)


def _position(rotary: int, meaning: Meaning) -> PositionKind:
    if rotary:
        return "rotary"
    return meaning.position or "external"


def _relative(projections: dict[str, Projection], owner: str) -> dict[str, Projection]:
    """Projection modules by their full path; kept as found when they lie outside the owner."""
    return dict(projections)
