"""Example calls of a model: derived from its config where that is possible, else given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewriter.errors import UsageError

BATCH, LENGTH, SOURCE = 2, 13, 11


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """How to call a model.

    Attributes:
        primary: the call that is captured; batch 2, length 13 where these can be chosen.
        resized: the same call at another batch and another length.
        variants: further calls the rewritten model must agree on (padding, no mask, batch 1 ...).
        cached: the model takes `past_key_values` and `use_cache`.
        padded: name of the (batch, tokens) padding mask argument, or None.
        tokens: name of the (batch, tokens) integer input, or None.
        vocabulary: number of token ids, or 0.
        source: names of the arguments that another sequence comes in by (encoder-decoder models);
            `tokens` is then the input of the decoder.
    """

    primary: Call
    resized: Call
    variants: Mapping[str, Call] = field(default_factory=dict)
    cached: bool = False
    padded: str | None = None
    tokens: str | None = None
    vocabulary: int = 0
    source: tuple[str, ...] = ()

    def with_tokens(self, ids: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments for other token ids (batch, tokens), with the source of the primary
        call for the same rows; no padding mask of the tokens.

        Raises:
            UsageError: the model takes no tokens, or more rows are asked for than there are.
        """
        rows = ids.shape[0]
        if self.tokens is None or (self.source and rows > BATCH):
            raise UsageError("the example call cannot be repeated with these token ids")
        given = {name: self.primary.kwargs[name][:rows] for name in self.source}
        return {self.tokens: ids, **given}


def examples_for(model: nn.Module, given: Any = None) -> Examples:
    """Examples for `model`.

    Args:
        given: None (derive from the config), a tensor, a tuple of positional arguments, or a dict
            of keyword arguments. Batch is dimension 0; tokens are dimension 1 of 2-D and 3-D
            tensors.

    Raises:
        UsageError: nothing was given and the config does not say how to call the model.
    """
    if given is not None:
        return _from_given(model, given)
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    parameters = _parameters(model)
    vocabulary: Any = getattr(config, "vocab_size", None)
    if "decoder_input_ids" in parameters and vocabulary and main in _SOURCES:
        return _for_pairs(model, int(vocabulary), main, parameters)
    if main == "input_ids" and vocabulary:
        return _for_tokens(model, int(vocabulary), parameters)
    if config is not None and main == "pixel_values" and hasattr(config, "image_size"):
        return _for_images(config)
    raise UsageError(
        f"cannot derive example inputs for {type(model).__name__}: its config does not tell how it "
        "is called; pass example_inputs=(...) or example_inputs={...}"
    )


_SOURCES = ("input_ids", "input_features")


def _for_pairs(model: Any, vocabulary: int, main: str, parameters: frozenset[str]) -> Examples:
    """Encoder-decoder models: two sequences of different lengths; only the source is padded."""
    first = next(model.parameters())
    masked = "attention_mask" in parameters and main == "input_ids"

    def call(batch: int, length: int, source: int, pads: bool) -> Call:
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        kwargs: dict[str, Any] = {"decoder_input_ids": ids.to(first.device)}
        if main == "input_ids":
            values = torch.randint(0, vocabulary, (batch, source), generator=generator)
            kwargs[main] = values.to(first.device)
        else:  # spectra of a fixed length
            config = model.config
            frames = 2 * int(config.max_source_positions)
            spectra = torch.randn(batch, int(config.num_mel_bins), frames, generator=generator)
            kwargs[main] = spectra.to(first)
        if masked:
            mask = torch.ones(batch, source, dtype=torch.long)
            for row in range(batch if pads else 0):
                mask[row, source - 2 * row :] = 0
            kwargs["attention_mask"] = mask.to(first.device)
        if "use_cache" in parameters:
            kwargs["use_cache"] = False
        return Call((), kwargs)

    variants = {
        "longer than captured, batch 3": call(3, 29, 23, False),
        "batch 1": call(1, 11, 7, False),
    }
    if masked:
        variants["padded source"] = call(3, 17, 19, True)
    return Examples(
        primary=call(BATCH, LENGTH, SOURCE, False),
        resized=call(BATCH + 1, LENGTH + 4, SOURCE + 4, False),
        variants=variants,
        cached={"past_key_values", "use_cache"} <= parameters and _fills_a_cache(model),
        tokens="decoder_input_ids",
        vocabulary=vocabulary,
        source=(main, "attention_mask") if masked else (main,),
    )


def _parameters(model: nn.Module) -> frozenset[str]:
    """Names that a call may use; some decoders hand `use_cache` on without naming it."""
    parameters = inspect.signature(model.forward).parameters
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    config = getattr(model, "config", None)
    decoder = "past_key_values" in parameters and "decoder_input_ids" not in parameters
    cached = decoder and hasattr(config, "use_cache")
    return frozenset({*parameters, *(["use_cache"] if hands_on and cached else [])})


def _for_tokens(model: nn.Module, vocabulary: int, parameters: frozenset[str]) -> Examples:
    device = next(model.parameters()).device

    def call(batch: int, length: int, pads: str | None) -> Call:
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        kwargs: dict[str, Any] = {"input_ids": ids.to(device)}
        if "use_cache" in parameters:
            kwargs["use_cache"] = False
        if pads is not None and "attention_mask" in parameters:
            mask = torch.ones(batch, length, dtype=torch.long)
            for row in range(batch):
                width = min(length - 1, 2 * row + (1 if batch == 1 else 0))
                if pads == "left":
                    mask[row, :width] = 0
                elif pads == "right" and width:
                    mask[row, -width:] = 0
            kwargs["attention_mask"] = mask.to(device)
        return Call((), kwargs)

    has_mask = "attention_mask" in parameters
    unpadded = "none" if has_mask else None
    variants = {
        "no mask": call(BATCH, LENGTH, None),
        "longer than captured, batch 3": call(3, 29, unpadded),
        "batch 1": call(1, 11, None),
    }
    if has_mask:
        variants["left padding"] = call(3, 17, "left")
        variants["right padding"] = call(3, 17, "right")
    cached = "past_key_values" in parameters and "use_cache" in parameters
    return Examples(
        primary=call(BATCH, LENGTH, unpadded),
        resized=call(BATCH + 1, LENGTH + 4, unpadded),
        variants=variants,
        cached=cached and _fills_a_cache(model),
        padded="attention_mask" if has_mask else None,
        tokens="input_ids",
        vocabulary=vocabulary,
    )


def _fills_a_cache(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def _for_images(config: Any) -> Examples:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = int(getattr(config, "num_channels", 3))

    def call(batch: int) -> Call:
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(batch, channels, height, width, generator=generator)
        return Call((), {"pixel_values": images})

    return Examples(primary=call(2), resized=call(3), variants={"batch 1": call(1)})


def _from_given(model: nn.Module, given: Any) -> Examples:
    if isinstance(given, torch.Tensor):
        given = (given,)
    if isinstance(given, Mapping):
        primary = Call((), dict(given))
    elif isinstance(given, tuple | list):
        primary = Call(tuple(given), {})
    else:
        raise UsageError(
            f"example_inputs must be a tensor, a tuple or a dict, not {type(given).__name__}"
        )
    for name, lengthen in (("another batch and length", True), ("another batch", False)):
        resized = _resize(primary, lengthen)
        if _runs(model, resized):
            return Examples(primary=primary, resized=resized, variants={name: resized})
    return Examples(primary=primary, resized=primary)


def _runs(model: nn.Module, call: Call) -> bool:
    """Whether the model takes a call: many are made for one length, or for one batch."""
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    except Exception:  # whatever a model may raise on a call that it was not made for
        return False
    return True


def calls_of(given: Any) -> tuple[Call, ...]:
    """One call from a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(given, torch.Tensor):
        return (Call((given,)),)
    return (Call((), dict(given)) if isinstance(given, Mapping) else Call(tuple(given)),)


def _resize(call: Call, lengthen: bool) -> Call:
    """One more batch row, and four more tokens where dimension 1 is a token dimension."""
    tensors = [
        t for t in (*call.args, *call.kwargs.values()) if isinstance(t, torch.Tensor) and t.dim()
    ]
    lengths = {t.shape[1] for t in tensors if t.dim() in (2, 3)}
    batches = {t.shape[0] for t in tensors}
    length = lengths.pop() if lengthen and len(lengths) == 1 else None

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        square = length is not None and tuple(value.shape) == (length, length)
        if len(batches) == 1 and not square:
            value = torch.cat([value, value[:1]], dim=0)
        if length is not None and value.dim() in (2, 3) and value.shape[1] == length:
            value = torch.cat([value, value[:, :4]], dim=1)
            if square:
                value = torch.cat([value, value[:4]], dim=0)
        return value

    return Call(tuple(resize(a) for a in call.args), {k: resize(v) for k, v in call.kwargs.items()})
