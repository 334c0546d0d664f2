"""The catalogue as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from rewriter.cli.catalogue import HEADS, KV_HEADS, LENGTH, MLP_WIDTH, WIDTH
from rewriter.cli.tables import bullets, facts, heading, number, size, table

Described = Mapping[str, Any]


def mixers_view(listed: Sequence[Described], blocks: Sequence[Described]) -> list[RenderableType]:
    """One line a mixer, those of attention and those of MLP blocks."""
    rows = [
        (
            m["name"],
            m["family"],
            m["tier"],
            _directions(m["directions"]),
            ", ".join(m["needs"]),
            *_cost(m["cost"]),
            _state(m["state"]),
        )
        for m in listed
    ]
    columns = ["mixer", "family", "tier", "direction", "needs", "cost", "share", "state"]
    projections = [
        (m["name"], m["tier"], ", ".join(m["needs"]), _share_of_dense(m["cost"])) for m in blocks
    ]
    return [
        table(columns, rows, fold=("family", "direction", "needs", "state")),
        heading("for MLP blocks (rules with 'site: mlp')"),
        table(["mixer", "tier", "needs", "cost"], projections),
        heading("what they do"),
        bullets((f"{m['name']}:", m["summary"]) for m in (*listed, *blocks)),
        Text(
            "\nneeds: the stream that projections read, a batch to fit the start to, training; "
            "calibration: text whose activations decide what is kept.\n"
            f"cost: growth with N tokens. share: operations of full softmax attention over "
            f"{LENGTH} tokens. state: bytes a sequence, float32. Figures for one block with "
            f"{HEADS} query and {KV_HEADS} key/value heads of width {WIDTH} and default options.\n"
            "More: rewriter mixers NAME"
        ),
    ]


def mixer_view(m: Described) -> list[RenderableType]:
    """Everything about one mixer."""
    cost, share = _cost(m["cost"])
    rows = [
        ("maths", m["maths"]),
        ("family", m["family"]),
        ("tier", f"{m['tier']} ({_TIERS.get(m['tier'], '')})"),
        ("direction", ", ".join(m["directions"])),
        ("needs", ", ".join(m["needs"]) or "nothing"),
        ("branches", ", ".join(m["branches"]) or "one"),
        ("cost", f"{cost}; {share} of full softmax attention over {LENGTH} tokens"),
        ("state", _state(m["state"])),
        ("source", m["source"]),
    ]
    parts: list[RenderableType] = [heading(f"{m['name']}: {m['summary']}"), facts(rows)]
    parts += _options_view(m)
    if m["state"]:
        tensors = m["state"]["tensors"].items()
        parts += [heading("state tensors"), bullets((f"{name}:", text) for name, text in tensors)]
    return parts


def channel_view(m: Described) -> list[RenderableType]:
    """Everything about one mixer of MLP blocks."""
    sizes = ", ".join(f"{name} {value}" for name, value in m["cost"]["sizes"].items())
    inputs = HEADS * WIDTH
    rows = [
        ("maths", m["maths"]),
        ("family", m["family"]),
        ("tier", f"{m['tier']} ({_TIERS.get(m['tier'], '')})"),
        ("needs", ", ".join(m["needs"])),
        ("cost", f"{_share_of_dense(m['cost'])}; {inputs} to {MLP_WIDTH} channels: {sizes}"),
        ("source", m["source"]),
    ]
    return [heading(f"{m['name']}: {m['summary']}"), facts(rows), *_options_view(m)]


def _options_view(m: Described) -> list[RenderableType]:
    if not m["options"]:
        return [heading("options: none")]
    cells = [(o["name"], o["type"], _default(o), o["description"]) for o in m["options"]]
    columns = ["option", "type", "default", "meaning"]
    return [heading("options"), table(columns, cells, fold=("type", "meaning"))]


def _share_of_dense(cost: Mapping[str, Any]) -> str:
    """Parameters and operations of a structured projection."""
    return f"{number(100 * cost['share_of_dense'])} % of the dense projection"


_TIERS: Mapping[str, str] = {
    "exact": "the same function",
    "approximate": "needs no training, its error is measured",
    "distilled": "has to learn from the original",
}


def _directions(directions: Sequence[str]) -> str:
    return "both" if len(directions) > 1 else "".join(directions)


def _cost(cost: Mapping[str, Any] | None) -> tuple[str, str]:
    if cost is None:
        return "?", "?"
    return cost["growth"], f"{number(100 * cost['share_of_softmax'])} %"


def _state(state: Mapping[str, Any] | None) -> str:
    if state is None:
        return "none"
    if not state["bounded"]:
        return f"{size(state['bytes_per_token'])} a token"
    return f"{size(state['bytes'])} fixed"


def _default(option: Mapping[str, Any]) -> str:
    if option["required"]:
        return "required"
    return "none" if option["default"] is None else str(option["default"])
