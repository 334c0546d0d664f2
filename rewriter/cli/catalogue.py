"""`rewriter mixers`: what a site can become, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import getdoc
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli.session import Json, Threads, Traceback, session

if TYPE_CHECKING:
    from rewriter.ir.site import AttentionSite
    from rewriter.mixers.base import Mixer, MixerOptions
    from rewriter.mixers.channel.base import ChannelMixer

LENGTH = 4096  # tokens at which costs are compared
HEADS, KV_HEADS, WIDTH = 9, 3, 64  # of the block the figures are for
MLP_WIDTH = 1536  # outputs of the projection they are for


def mixers(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Tell all about this one.", show_default=False),
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """List what attention and MLP blocks can be rewritten to, or explain one of them."""
    with session(as_json, threads) as out:
        from rewriter.cli.show_mixers import channel_view, mixer_view, mixers_view
        from rewriter.mixers.channel import registry as channel
        from rewriter.mixers.registry import available, get

        if name is not None and name in channel.names():
            described = describe_channel(channel.get(name))
            out.show(*channel_view(described))
            out.result(described)
            return
        if name is not None:
            described = describe(get(name))
            out.show(*mixer_view(described))
            out.result(described)
            return
        listed = [describe(mixer) for mixer in available().values()]
        blocks = [describe_channel(mixer) for mixer in channel.available().values()]
        out.show(*mixers_view(listed, blocks))
        figures = figures_for()
        out.result({"mixers": listed, "channel_mixers": blocks, "figures_for": figures})


def figures_for() -> dict[str, int]:
    """The attention block and length that costs are computed for."""
    heads = {"query_heads": HEADS, "kv_heads": KV_HEADS, "width": WIDTH}
    return {"tokens": LENGTH, **heads, "mlp_inputs": HEADS * WIDTH, "mlp_outputs": MLP_WIDTH}


def describe(mixer: type[Mixer]) -> dict[str, Any]:
    """Everything there is to tell about a mixer, as plain values."""
    info = mixer.info
    options = _defaults(mixer)
    causal = "causal" in info.directions
    site = reference_site(causal)
    cost = None if options is None else _cost(mixer, site, options)
    state = None if options is None or not causal else _state(mixer, site, options)
    return {
        "name": info.name,
        "family": info.family,
        "tier": info.tier,
        "summary": info.summary,
        "maths": info.maths,
        "source": info.source,
        "directions": sorted(info.directions, reverse=True),
        "branches": list(mixer.branches),
        "needs": needs(mixer),
        "options": _options(mixer.Options),
        "cost": cost,
        "state": state,
    }


def describe_channel(mixer: type[ChannelMixer]) -> dict[str, Any]:
    """Everything there is to tell about a mixer of MLP blocks, as plain values."""
    import torch

    from rewriter.mixers.channel.base import Dense

    options, inputs = mixer.Options(), HEADS * WIDTH
    sizes = mixer.sizes(options, Dense(torch.zeros(MLP_WIDTH, inputs)))
    kept = sum(p.numel() for p in mixer.structure(MLP_WIDTH, inputs, sizes).parameters())
    info = mixer.info
    return {
        "name": info.name,
        "family": info.family,
        "tier": info.tier,
        "summary": info.summary,
        "maths": info.maths,
        "source": info.source,
        "needs": ["calibration"],
        "options": _options(mixer.Options),
        "cost": {"share_of_dense": kept / (MLP_WIDTH * inputs), "sizes": sizes},
    }


def needs(mixer: type[Mixer]) -> list[str]:
    """What a mixer asks for beyond queries, keys and values."""
    from rewriter.mixers.base import Mixer as Base

    wanted = {
        "stream": mixer.needs_hidden,
        "fit": mixer.fit is not Base.fit,
        "training": mixer.info.tier == "distilled",
    }
    return [name for name, asked in wanted.items() if asked]


def reference_site(causal: bool) -> AttentionSite:
    """The attention block that figures are computed for."""
    from rewriter.ir.mask import Causal, Mask
    from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Source

    return AttentionSite(
        fqn="attention",
        index=0,
        heads=HeadGroups(HEADS, KV_HEADS, WIDTH, WIDTH),
        score=(Scale(WIDTH**-0.5),),
        terms=(),
        mask=Mask((Causal(),) if causal else ()),
        spelling="sdpa",
        source=Source("attention"),
        hidden_dim=HEADS * WIDTH,
    )


def _defaults(mixer: type[Mixer]) -> MixerOptions | None:
    """Default options, or None where an option has none."""
    from pydantic import ValidationError

    try:
        return mixer.Options()
    except ValidationError:
        return None


def _cost(
    mixer: type[Mixer], site: AttentionSite, options: MixerOptions
) -> Mapping[str, Any] | None:
    """Operations of the core: the growth with length N, and the share of full softmax at LENGTH."""
    from rewriter.ir.state import TOKENS, bindings

    try:
        formula = mixer.flops(site, options)
    except NotImplementedError:
        return None

    def at(tokens: int) -> float:
        return float(formula.subs(bindings(site, 1, tokens)))

    far = 1 << 20
    growth = "none" if at(far) == 0 else "N^2" if at(2 * far) / at(far) > 3 else "N"
    softmax = 2 * HEADS * LENGTH**2 * 2 * WIDTH
    return {
        "growth": growth,
        "share_of_softmax": at(LENGTH) / softmax,
        "formula": str(formula).replace(str(TOKENS), "N"),
    }


def _state(
    mixer: type[Mixer], site: AttentionSite, options: MixerOptions
) -> Mapping[str, Any] | None:
    """What is carried between tokens, in bytes a sequence with float32 values."""
    from rewriter.ir.state import bindings

    try:
        spec = mixer.state_spec(site, options)
    except NotImplementedError:
        return None
    formula = spec.bytes()
    at = [int(formula.subs(bindings(site, 1, n))) for n in (LENGTH, LENGTH + 1)]
    return {
        "bounded": spec.bounded,
        "croppable": spec.croppable,
        "bytes": at[0],
        "bytes_per_token": at[1] - at[0],
        "tensors": {t.name: f"({', '.join(map(str, t.shape))}) {t.dtype}" for t in spec.tensors},
    }


def _options(kind: type[MixerOptions]) -> list[dict[str, Any]]:
    """Name, type and default of every option."""
    meanings: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        meanings |= _meanings(getdoc(owner) or "")
    schema = kind.model_json_schema().get("properties", {})
    out = []
    for name, field in kind.model_fields.items():
        out.append(
            {
                "name": name,
                "type": _type(schema.get(name, {})),
                "default": None
                if field.is_required()
                else field.get_default(call_default_factory=True),
                "required": field.is_required(),
                "description": field.description or meanings.get(name, ""),
            }
        )
    return out


def _meanings(docstring: str) -> dict[str, str]:
    """Option name -> text, of a docstring in the form '`window`: tokens in it; `sinks`: ...', or
    with a section 'Attributes:'."""
    found = re.findall(r"`(\w+)`:\s*(.+?)(?=[;,.]?\s*`\w+`:|\.?\s*\Z)", docstring, re.DOTALL)
    _, _, listed = docstring.partition("Attributes:\n")
    entry = r"^ {4}(\w+): (.+?)\.?\s*(?=^ {4}\w|\Z)"
    found += re.findall(entry, listed, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _type(schema: Mapping[str, Any]) -> str:
    """'integer >= 1', 'integer >= 1 or null', '"a" or "b"'."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"])
    text = str(schema.get("type", "value"))
    signs = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
    }
    limits = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return f"{text} {' and '.join(limits)}" if limits else text
