"""What was found in a model, as tables: sites, what they have in common, and near misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from rewriter.cli.tables import (
    Column,
    bullets,
    facts,
    heading,
    number,
    place,
    plural,
    ranges,
    table,
)
from rewriter.ir.advice import mask_advice
from rewriter.ir.mask import Mask
from rewriter.ir.site import AttentionSite, NearMiss

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Acceptance:
    """Whether a mixer with default options can serve a site: None, or why not."""

    mixer: str
    refusal: str | None


def sites_view(
    sites: Sequence[AttentionSite],
    misses: Sequence[NearMiss],
    others: Sequence[RenderableType] = (),
) -> list[RenderableType]:
    """All sites one a line, the facts that many of them share below, then the near misses.

    Args:
        others: what else was found, shown before the summary.
    """
    parts: list[RenderableType] = []
    if sites:
        details = {site.index: _details(site) for site in sites}
        kinds = list(dict.fromkeys(details.values()))
        label = {detail: _letter(n) for n, detail in enumerate(kinds)}
        columns: list[Column] = [("#", "right"), "module", "heads", "mask", "position", "scale"]
        rows = [[*_row(site), label[details[site.index]]] for site in sites]
        several = len(kinds) > 1
        columns += ["kind"] if several else []
        cut = [row[: len(columns)] for row in rows]
        parts.append(table(columns, cut, fold=("module", "mask")))
        for detail in kinds:
            members = [s.index for s in sites if details[s.index] == detail]
            title = f"kind {label[detail]}: {plural(len(members), 'site')} ({ranges(members)})"
            parts += [heading(title if several else "all of them"), facts(detail)]
    if misses:
        parts.append(heading(plural(len(misses), "near miss", "near misses")))
        parts.append(bullets(miss_lines(misses)))
    parts += [*others, heading(summary(sites, misses))]
    return parts


def summary(sites: Sequence[AttentionSite], misses: Sequence[NearMiss]) -> str:
    """'30 attention sites in 30 modules (30 causal), 0 near misses'."""
    text = plural(len(sites), "attention site")
    if sites:
        modules = len({site.fqn for site in sites})
        causal = sum(site.kind == "causal" for site in sites)
        counts = {"causal": causal, "bidirectional": len(sites) - causal}
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        text += f" in {plural(modules, 'module')} ({kinds})"
    return f"{text}, {plural(len(misses), 'near miss', 'near misses')}"


def story(
    sites: Sequence[AttentionSite],
    misses: Sequence[NearMiss],
    alike: Mapping[int, Sequence[int]],
    accepted: Mapping[int, Sequence[Acceptance]],
) -> list[RenderableType]:
    """Everything that is known about the attention of one module.

    Args:
        sites, misses: those at or below the module.
        alike: indices of the sites with the same graph, by site index.
        accepted: what each mixer says about the site, by site index.
    """
    parts: list[RenderableType] = []
    for site in sites:
        title = f"site {site.index}: {site.label} - understood"
        parts += [heading(title), facts(_everything(site, alike.get(site.index, ())))]
        parts.append(heading("mixers"))
        lines = [
            (a.mixer, "can serve it" if a.refusal is None else f"refuses: {a.refusal}")
            for a in accepted.get(site.index, ())
        ]
        parts.append(facts(lines))
    for miss in misses:
        parts += miss_story(miss)
    return parts


_STEPS = ("softmax", "scores", "values", "axes", "tokens")


def miss_story(miss: NearMiss) -> list[RenderableType]:
    """A near miss from what was understood first to what to do about it."""
    title = f"near miss in {miss.source.module or 'the model itself'} - not understood"
    rows: list[tuple[str, str]] = []
    steps = _STEPS[: _STEPS.index(miss.step) + 1] if miss.step in _STEPS else (miss.step,)
    for step in steps:
        known = [f.removeprefix(f"{step}: ") for f in miss.facts if f.startswith(f"{step}: ")]
        stopped = ["stopped here"] if step == miss.step else []
        rows.append((step or miss.stage, "; ".join(known + stopped) or "nothing in the way"))
    rows += [(" ", fact) for fact in miss.facts if fact.partition(": ")[0] not in _STEPS]
    rows += [
        ("reason", f"{miss.stage}: {miss.reason}"),
        ("node", miss.source.node),
        ("source", place(miss.source.file, miss.source.line)),
        ("what to do", miss.advice),
    ]
    parts: list[RenderableType] = [heading(title), facts(rows)]
    if miss.graph:
        parts += [Text("the graph around it:"), Text("\n".join(f"  {x}" for x in miss.graph))]
    return parts


def mask_words(mask: Mask) -> str:
    """'causal, window(256), padding'; an opaque mask is explained elsewhere."""
    if mask.opaque is not None:
        return "opaque"
    return mask.describe().replace(" & ", ", ").replace("key_padding", "padding")


def miss_lines(misses: Sequence[NearMiss]) -> list[tuple[str, str]]:
    """What stopped each near miss, and below it what to do."""
    lines: list[tuple[str, str]] = []
    for miss in misses:
        where = f"node '{miss.source.node}' in '{miss.source.module or 'the model itself'}'"
        at = place(miss.source.file, miss.source.line)
        lines.append(("-", f"{miss.stage}: {miss.reason}; {where} ({at})"))
        lines.append((" ", miss.advice))
    return lines


def _row(site: AttentionSite) -> list[str]:
    return [
        str(site.index),
        site.label if site.slots * site.runs > 1 else site.fqn or "(the model)",
        _heads(site),
        mask_words(site.mask),
        _position(site),
        f"{site.scale:.4g}",
    ]


def _heads(site: AttentionSite) -> str:
    """Query heads / key-value heads x width, both widths where they differ."""
    heads = site.heads
    counts = str(heads.query) if heads.group == 1 else f"{heads.query}/{heads.key_value}"
    width = str(heads.key_dim)
    if heads.value_dim != heads.key_dim:
        width += f"+{heads.value_dim}"
    return f"{counts} x {width}"


def _position(site: AttentionSite) -> str:
    if site.position == "rotary" and 0 < site.rotary_dim < site.heads.key_dim:
        return f"rotary {site.rotary_dim}"
    return site.position.replace("_", " ")


def _details(site: AttentionSite) -> tuple[tuple[str, str], ...]:
    """Facts that whole groups of sites share."""
    rows = [
        ("source", place(site.source.file, site.source.line)),
        ("projections", _projections(site)),
        ("softmax", _softmax(site)),
    ]
    if site.mask.opaque is not None:
        rows.append(("mask", f"opaque: {site.mask.opaque}"))
    if site.softcap is not None:
        rows.append(("softcap", number(site.softcap)))
    return tuple(rows)


def _softmax(site: AttentionSite) -> str:
    words: list[str] = [site.spelling]
    if site.normaliser != "softmax":
        words.append(site.normaliser)
    if site.softmax_dtype:
        words.append(f"in {site.softmax_dtype}")
    if site.qk_norm:
        words.append("QK-norm")
    if site.dropout:
        words.append(f"dropout {number(site.dropout)}")
    return ", ".join(words)


def _projections(site: AttentionSite) -> str:
    """'q_proj, k_proj, v_proj, o_proj', fused ones once."""
    names: list[str] = []
    prefix = f"{site.fqn}." if site.fqn else ""
    for role, projection in (site.projections or {}).items():
        short = projection.module.removeprefix(prefix) or role
        text = f"{short} (fused)" if projection.fused else short
        if text not in names:
            names.append(text)
    return ", ".join(names) or "none identified"


def _everything(site: AttentionSite, alike: Sequence[int]) -> list[tuple[str, str]]:
    heads = site.heads
    sharing = f", {heads.group} query heads share one key/value head" if heads.group > 1 else ""
    masks = site.mask.describe()
    predicate = "" if site.mask.opaque is not None else f"  i.e. {site.mask.predicate}"
    rows = [
        ("kind", f"{site.kind}, cross" if site.cross else site.kind),
        ("spelling", site.spelling),
        ("heads", f"{heads.query} query, {heads.key_value} key/value{sharing}"),
        ("widths", f"keys {heads.key_dim}, values {heads.value_dim}"),
        ("mask", masks + predicate),
        ("position", _position(site)),
        ("scores", " -> ".join(_step(site, n) for n in range(len(site.score))) or "as they are"),
        ("scale in all", number(site.scale)),
        ("run-time terms", ", ".join(site.terms) or "none"),
        ("softmax", _softmax(site)),
        ("projections", _projections(site)),
        ("source", f"{site.source.file or 'unknown file'}:{site.source.line or '?'}"),
        ("node", site.source.node),
    ]
    if site.mask.opaque is not None:
        rows.append(("what to do", mask_advice(site.mask.opaque)))
    if site.prescaled != 1.0:
        rows.append(("query prescaled", number(site.prescaled)))
    if site.fingerprint:
        others = [n for n in alike if n != site.index]
        same = f"; the same graph as sites {ranges(others)}" if others else "; a graph of its own"
        rows.append(("fingerprint", site.fingerprint + same))
    return rows


def _step(site: AttentionSite, at: int) -> str:
    values = site.score[at].to_json()
    name = values.pop("step")
    return f"{name}({', '.join(f'{k}={v}' for k, v in values.items())})"


def _letter(n: int) -> str:
    return _LETTERS[n] if n < len(_LETTERS) else str(n + 1)
