"""Find every MLP block of a captured graph: anchor on a projection, peel the functions before it.

Each channel map is tried as a down projection. What stands before it is walked upstream through
pointwise and layout operators; if nothing but channel maps of one common input feeds that region,
and the region is more than a linear function, it is an MLP. The region is then run on probe values
to name its function and to see which channel meets which (`evaluate`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rewriter.ir.mlp import ChannelMap, GateLayout, MlpSite
from rewriter.ir.site import NearMiss
from rewriter.passes.capture import Captured
from rewriter.passes.match.fingerprint import fingerprint
from rewriter.passes.match.mlp import near
from rewriter.passes.match.mlp.hidden import Hidden, Part, read_hidden
from rewriter.passes.match.mlp.maps import Map, read_map
from rewriter.passes.match.mlp.region import Region, is_tensor, walk
from rewriter.passes.match.mlp.result import MlpMatch, MlpNodes, MlpResult
from rewriter.passes.match.story import around
from rewriter.passes.match.view import Refusal, View
from rewriter.passes.normalise.noops import is_cast, is_noop
from rewriter.passes.normalise.ops import op, operand
from rewriter.passes.provenance import common_module, module_path, source_of

_RESHAPES = frozenset({"view", "reshape", "_unsafe_view"})


@dataclass(frozen=True)
class _Draft:
    """An MLP before its place among the others is known."""

    down: Map
    hidden: Hidden
    nodes: MlpNodes


def match_mlps(captured: Captured) -> MlpResult:
    """Every MLP block that is understood, and a near miss for what looks like one and is not."""
    view = View(captured)
    moving = near.depends_on_inputs(view)
    drafts: list[_Draft] = []
    misses: list[NearMiss] = []
    for down in _maps(view):
        region = walk(down.source, view)
        found = _draft(down, region, view, moving)
        if isinstance(found, _Draft):
            drafts.append(found)
        elif found is not None:
            misses.append(_miss(found, region))
    chained = near.chains([(d.down, d.hidden.up.map) for d in drafts])
    matches: list[MlpMatch] = []
    for draft in drafts:
        if draft.down.node in chained:
            reason = "three or more projections follow each other; a site has one hidden layer"
            misses.append(_miss(Refusal(reason, draft.down.node), walk(draft.down.source, view)))
        else:
            matches.append(MlpMatch(_site(draft, view, len(matches)), draft.nodes))
    return MlpResult(tuple(matches), tuple(misses))


def _maps(view: View) -> list[Map]:
    """All channel maps in graph order; one whose bias is added by a later node counts once."""
    found = {n: m for n in view.graph.nodes if (m := read_map(n, view)) is not None}
    weights_with_bias = {(m.weight, m.source) for m in found.values() if m.bias is not None}
    return [
        m
        for m in found.values()
        if m.bias is not None or (m.weight, m.source) not in weights_with_bias
    ]


def _draft(
    down: Map, region: Region, view: View, moving: frozenset[fx.Node]
) -> _Draft | Refusal | None:
    """A draft, a refusal of something that looks like an MLP, or None for anything else."""
    if not region.curved or region.foreign or not region.maps:
        return near.looks_like(region, view)
    roots = {_root(m.source) for m in region.maps}
    if len(roots) > 1:
        return Refusal("the projections before it read different inputs", down.node)
    if next(iter(roots)) not in moving:
        return Refusal("its input is a constant of the model", down.node)
    counts = {m.experts for m in (*region.maps, down)}
    if len(counts) > 1:
        return Refusal("projections with and without experts are mixed", down.node)
    hidden = read_hidden(region, down, view)
    if isinstance(hidden, Refusal):
        return hidden
    first = hidden.up.map
    members = {*region.nodes, *down.nodes(), *(n for m in region.maps for n in m.nodes())}
    nodes = MlpNodes(first.source, first.inner, down.node, down.channel, frozenset(members))
    outside = near.used_outside(nodes)
    if outside is not None:
        return outside
    return _Draft(down, hidden, nodes)


def _root(node: fx.Node) -> fx.Node:
    """The tensor behind copies, casts and reshapes of the rows."""
    while is_noop(node) or is_cast(node) or _splits_rows(node):
        node = operand(node)
    return node


def _splits_rows(node: fx.Node) -> bool:
    if op(node) not in _RESHAPES or not is_tensor(operand(node)):
        return False
    before, after = operand(node).meta["val"].shape, node.meta["val"].shape
    return bool(before) and bool(after) and str(before[-1]) == str(after[-1])


def _site(draft: _Draft, view: View, index: int) -> MlpSite:
    down, hidden = draft.down, draft.hidden
    owner = common_module([module_path(n) for n in draft.nodes.region])
    return MlpSite(
        fqn=owner,
        index=index,
        activation=hidden.activation,
        input=hidden.up.map.inputs,
        hidden=hidden.width,
        output=down.outputs,
        up=_channel_map(hidden.up, view),
        down=_channel_map(Part(down, (0, down.outputs, 1)), view),
        gate=None if hidden.gate is None else _channel_map(hidden.gate, view),
        gate_layout=_gate_layout(hidden),
        source=source_of(down.node),
        dropout=hidden.dropout,
        experts=down.experts,
        fingerprint=fingerprint(owner, down.node, view),
    )


def _channel_map(part: Part, view: View) -> ChannelMap:
    names = view.captured.parameters
    bias = part.map.bias
    return ChannelMap(
        weight=names[part.map.weight.name],
        bias=None if bias is None else names[bias.name],
        module=module_path(part.map.node),
        transposed=part.map.transposed,
        rows=part.rows,
        spelling=part.map.spelling,
    )


def _gate_layout(hidden: Hidden) -> GateLayout:
    if hidden.gate is None:
        return "none"
    if hidden.gate.map.node is not hidden.up.map.node:
        return "separate"
    return "halves" if hidden.gate.rows[2] == 1 else "interleaved"


def _miss(refusal: Refusal, region: Region) -> NearMiss:
    facts = [f"projection '{m.node.name}'" for m in region.maps]
    facts += [f"'{n.name}' is no projection" for n in region.foreign]
    return NearMiss(
        "match",
        refusal.reason,
        source_of(refusal.node),
        tuple(facts),
        "projections",
        around(refusal.node),
    )
