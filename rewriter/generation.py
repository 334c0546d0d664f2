"""Mixer states inside the transformers cache: one cache layer per rewritten site.

A rewritten module receives the ordinary cache of its model. On first use it puts its own layer in
the place of the empty one; the layer holds the mixer's state and counts tokens, so positions,
masks, beam search and batch operations go on working. What needs a past to be cut back (assisted
decoding, for one) is refused, since a recurrent state cannot forget its last tokens.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from rewriter.errors import UnsupportedError
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import Owned, State, StateSpec

_COUNTERS = ("cumulative_length", "cumulative_length_int")


class MixerCacheLayer(CacheLayerMixin):
    """The state of one mixer and the number of tokens it has seen.

    The layer answers for the shape of masks as the layer it replaced would: a model makes one mask
    for all layers of a kind, and those that were not rewritten still keep their keys.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, spec: StateSpec, replaced: CacheLayerMixin) -> None:
        """Args: the state to hold, and the empty layer whose place it takes."""
        super().__init__()
        self.spec = spec
        self.seen = 0
        self.state: State | None = None
        self.is_sliding: bool = getattr(replaced, "is_sliding", False)
        self._replaced = replaced
        replaced.keys = replaced.values = None  # a static layer may have allocated them

    def load(
        self, site: AttentionSite, batch: int, dtype: torch.dtype, device: torch.device
    ) -> State:
        """The state for `batch` rows; initial values on first use.

        The layer owns its tensors, so where no gradient is recorded a step may write the new state
        over them. Reordering, repeating and copying a cache make new tensors.

        Raises:
            UnsupportedError: the cache holds another number of rows.
        """
        if self.state is None:
            self.state = self.spec.new(site, batch, dtype, device)
            self.is_initialized = True
        rows = next(iter(self.state.values())).shape[0]
        if rows != batch:
            raise UnsupportedError(
                f"the cache of '{site.fqn}' holds {rows} sequences but {batch} were passed; "
                "start a new cache for another batch"
            )
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return self.state if recorded else Owned(self.state)

    def store(self, state: State, new: int) -> None:
        """Keep the state after `new` more tokens."""
        self.state = dict(state)
        self._count(self.seen + new)

    def _count(self, seen: int) -> None:
        self.seen = seen
        for name in _COUNTERS:
            if isinstance(getattr(self._replaced, name, None), int):
                setattr(self._replaced, name, seen)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key columns, position of the first column) of the next mask."""
        if self.is_sliding or hasattr(self._replaced, "max_cache_len"):
            length, offset = self._replaced.get_mask_sizes(query_length)
            return length, offset
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: the state never fills up."""
        return -1

    def reset(self) -> None:
        self.state = None
        self.is_initialized = False
        self._count(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def _map(self, change: Any) -> None:
        if self.state is not None:
            self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def offload(self) -> None:
        """Nothing: a bounded state is small and stays where it is used."""

    def prefetch(self) -> None:
        """Nothing, as it is never offloaded."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raises UnsupportedError unless there is nothing to remove."""
        if tokens_to_remove != 0:
            raise UnsupportedError(
                "a rewritten layer keeps a recurrent state that cannot be cropped; use greedy, "
                "sampled or beam decoding instead of assisted or speculative decoding"
            )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises UnsupportedError: other modules find no keys and values here."""
        raise UnsupportedError(
            "another module asked a rewritten layer's cache for its keys and values, but it holds "
            "a mixer state; rewrite every module that shares this cache layer, or none of them"
        )

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `load` makes the state on first use."""


def layer_of(cache: Any, index: int, spec: StateSpec) -> MixerCacheLayer:
    """The mixer's layer of a transformers cache, put there on first use.

    Args:
        cache: DynamicCache, StaticCache or another `Cache` with a list of layers.
        index: the layer's index in the cache.
        spec: what the layer will hold.

    Raises:
        UnsupportedError: the cache is of another kind, or the place already holds tokens.
    """
    if isinstance(cache, EncoderDecoderCache):  # attention to the source keeps no mixer state
        cache = cache.self_attention_cache
    layers = cache.layers if isinstance(cache, Cache) and hasattr(cache, "layers") else None
    if layers is None:
        raise UnsupportedError(
            f"layer {index}: a rewritten layer cannot keep its state in a "
            f"{type(cache).__name__}; pass a DynamicCache or StaticCache, or use_cache=False"
        )
    if index < len(layers) and isinstance(layers[index], MixerCacheLayer):
        return _checked(layers[index], index, spec)
    while len(layers) <= index:
        layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    found = layers[index]
    if not isinstance(found, CacheLayerMixin):
        raise UnsupportedError(
            f"layer {index}: the cache keeps a {type(found).__name__} here, which counts no "
            "tokens; a rewritten layer cannot take its place"
        )
    if int(found.get_seq_length()) > 0:
        raise UnsupportedError(
            f"layer {index}: the cache already holds keys and values of the original model; "
            "start with an empty cache"
        )
    layer = MixerCacheLayer(spec, found)
    layers[index] = layer
    return layer


def _checked(layer: MixerCacheLayer, index: int, spec: StateSpec) -> MixerCacheLayer:
    if layer.spec is not spec and layer.spec != spec:
        raise UnsupportedError(
            f"layer {index}: the cache holds the state of another mixer; start with an empty cache"
        )
    return layer
