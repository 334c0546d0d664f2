"""Mixer states inside the transformers cache: one cache layer per rewritten site."""

from __future__ import annotations

from typing import Any

import torch

from rewriter.ir.site import AttentionSite
from rewriter.ir.state import State, StateSpec


class MixerCacheLayer:  # to become a transformers CacheLayerMixin
    seen: int

    def load(self, site: AttentionSite, batch: int, dtype: torch.dtype, device: torch.device) -> State:
        raise NotImplementedError

    def store(self, state: State, new: int) -> None:
        raise NotImplementedError


def layer_of(cache: Any, index: int, spec: StateSpec) -> MixerCacheLayer:
    """The mixer's layer of a transformers cache, put there on first use."""
    raise NotImplementedError
