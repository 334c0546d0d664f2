"""Which cache layers each owner fills: found by watching `update` calls, not by attribute names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from rewriter.passes.examples import Examples
from rewriter.passes.realise.calls import removing


def new_cache(model: nn.Module) -> Cache:
    """The cache that `generate` would make for this model."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    cache = DynamicCache(config=text)
    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(cache, DynamicCache(config=text))
    return cache


def cache_layers(
    model: nn.Module, owners: Sequence[str], examples: Examples
) -> dict[str, list[int]]:
    """Cache layers by owner path, in the order they are filled; owners without one are left out.

    Of an encoder-decoder model they are layers of the cache of the decoder's own tokens.
    """
    if not examples.cached:
        return {}
    running: list[str] = []
    found: dict[str, list[int]] = {}
    cache = new_cache(model)
    own: Any = getattr(cache, "self_attention_cache", cache)
    update = own.update

    def watched(keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if running:
            found.setdefault(running[-1], []).append(layer_idx)
        return update(keys, values, layer_idx, *args, **kwargs)

    own.update = watched
    with ExitStack() as stack, torch.no_grad():
        for fqn in owners:
            module = model.get_submodule(fqn)
            enter = module.register_forward_pre_hook(lambda *_, f=fqn: running.append(f))
            leave = module.register_forward_hook(lambda *_: running.pop() and None)
            stack.enter_context(removing(enter))
            stack.enter_context(removing(leave))
        kwargs = {**examples.primary.kwargs, "past_key_values": cache, "use_cache": True}
        model(*examples.primary.args, **kwargs)
    return found
