"""GraphSplice: each core of a graph that a plan wants replaced becomes one operator call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.site import AttentionSite
from rewriter.passes.capture import Captured
from rewriter.passes.match import Match
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import value
from rewriter.passes.splice.emit import emit
from rewriter.passes.splice.proof import difference
from rewriter.passes.splice.recipe import Recipe, recipe_for
from rewriter.passes.splice.tidy import erase_unused, relax_views


@dataclass(frozen=True)
class Outcome:
    """What became of one site.

    Attributes:
        status: 'spliced', or 'kept' as it was.
        what: the recipe for people, or why the site was kept.
        difference: largest difference from the original on the probes, relative to the largest
            value; None where nothing was replaced.
    """

    site: AttentionSite
    status: Literal["spliced", "kept"]
    what: str
    difference: float | None = None


@dataclass(frozen=True)
class Spliced:
    """The outcomes in the order of the matches, and how many nodes were not needed any more."""

    outcomes: tuple[Outcome, ...]
    erased: int


def splice(
    captured: Captured,
    matches: Collection[Match],
    *,
    needs_grad: bool,
    allow_reference: bool = False,
    instead: Mapping[int, BlockSparse] | None = None,
) -> Spliced:
    """Replace the cores of `matches` in the captured graph itself, where that is proved exact.

    Args:
        captured: its graph is changed in place.
        needs_grad: the graph will be differentiated, so gradients are compared too.
        allow_reference: plain torch may stand in where no generated kernel serves a site.
        instead: by site index, what an approximate policy computes; nothing is compared there.
    """
    module, view = captured.graph_module, View(captured)
    outcomes: list[Outcome] = []
    proved: dict[str, float | str] = {}
    new: list[fx.Node] = []
    for found in matches:
        other = (instead or {}).get(found.site.index)
        recipe = recipe_for(found, view, needs_grad, allow_reference, other)
        if isinstance(recipe, str):
            outcomes.append(Outcome(found.site, "kept", recipe))
            continue
        check = None if other is not None else proved
        outcomes.append(_replace(module, found, recipe, needs_grad, check, new))
    relax_views(new)
    erased = erase_unused(module.graph)
    module.graph.lint()
    module.recompile()
    return Spliced(tuple(outcomes), erased)


def _replace(
    module: fx.GraphModule,
    found: Match,
    recipe: Recipe,
    needs_grad: bool,
    proved: dict[str, float | str] | None,
    new: list[fx.Node],
) -> Outcome:
    """`proved` remembers the verdicts on equal cores; None replaces without comparing."""
    try:
        node = emit(module.graph, found, recipe)
    except (NotImplementedError, ValueError) as error:
        return Outcome(found.site, "kept", f"its layout cannot be written: {error}")
    verdict: float | str | None = None
    if proved is not None:
        key = _signature(found, recipe)
        if key not in proved:
            proved[key] = difference(found, node, module, needs_grad)
        verdict = proved[key]
    if isinstance(verdict, str):
        erase_unused(module.graph)
        return Outcome(found.site, "kept", f"not proved: {verdict}")
    found.nodes.output.node.replace_all_uses_with(node)
    new.append(node)
    return Outcome(found.site, "spliced", recipe.describe(), verdict)


def _signature(found: Match, recipe: Recipe) -> str:
    """Equal for cores that run the same operations on tensors of the same shapes."""
    nodes = found.nodes
    names = {o.node: f"in{i}" for i, o in enumerate((nodes.query, nodes.key, nodes.value))}
    names.update({o.node: f"term{i}" for i, o in enumerate(nodes.terms)})
    lines = [str(recipe), found.site.core_hash()]
    lines += [f"{name} {_kind(node)}" for node, name in names.items()]

    def read(item: fx.Node) -> str:
        return names.get(item) or _kind(item)

    region = [n for n in found.nodes.output.node.graph.nodes if n in found.nodes.region]
    for number, node in enumerate(region):
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Shown(read(n)))
        lines.append(f"{node.target} {args}")
        names[node] = f"%{number}"
    return "\n".join(lines)


def _kind(node: fx.Node) -> str:
    tensor = value(node)
    if tensor is None:
        return str(node.meta.get("val"))
    return f"{tuple(str(s) for s in tensor.shape)} {tensor.dtype}"


class _Shown(str):
    """A node's stand-in in printed arguments."""

    __slots__ = ()

    __repr__ = str.__str__
