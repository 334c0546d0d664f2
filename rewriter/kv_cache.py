"""Key/value cache layers that are written in place.

The layers of transformers make new tensors of all keys and values for every token. These keep them
in buffers with room to grow and answer as the layers they replace in everything else: what is
asked of `keys` and `values` is a view of what has been written, and whatever is assigned to them is
taken over. Nothing that a caller still holds is ever overwritten by an update: only free room is
written to, and a buffer without room is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

GRANULE = 64  # tokens by which room is rounded up
GROWTH = 1.5


class _Buffers:
    """Keys and values (B, Hkv, room, D) of which columns [start, end) are in use."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self.start, self.end = 0, keys.shape[-2]

    @property
    def room(self) -> int:
        return self.keys.shape[-2]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[:, :, self.start : self.end]

    def writable(self, like: torch.Tensor) -> bool:
        """Whether columns may be written: not an inference tensor outside of inference mode."""
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()

    def moved(self, room: int) -> _Buffers:
        """The same columns at the front of new buffers."""
        size = self.end - self.start

        def move(old: torch.Tensor) -> torch.Tensor:
            new = old.new_empty((*old.shape[:2], room, old.shape[-1]))
            new[:, :, :size] = self.view(old)
            return new

        found = _Buffers(move(self.keys), move(self.values))
        found.end = size
        return found


def _rounded(tokens: int) -> int:
    return -(-tokens // GRANULE) * GRANULE


class _InPlace(DynamicLayer):
    """What both layers share; `_buffers` is None before the first token."""

    _buffers: _Buffers | None

    def take(self, layer: DynamicLayer) -> None:
        """Become `layer`: its keys, values and every other attribute."""
        for name, value in vars(layer).items():
            if name not in ("keys", "values"):
                setattr(self, name, value)
        self._buffers = None
        if layer.is_initialized and layer.keys.dim() == 4:
            self._buffers = _Buffers(layer.keys, layer.values)

    @property
    def buffers(self) -> _Buffers | None:
        """Where the tokens lie, for code that writes a token itself (see `claim`)."""
        return self._buffers

    def claim_copy(self) -> _Buffers:
        """The same tokens in buffers of this layer's own, row after row, with room for more."""
        assert self._buffers is not None
        size = self._buffers.end - self._buffers.start
        self._buffers = self._buffers.moved(_rounded(int(size * GROWTH) + 1))
        return self._buffers

    # The base class works on these two attributes.
    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._buffers is None else self._kept(self._buffers.keys)

    @keys.setter
    def keys(self, new: torch.Tensor | None) -> None:
        self._assign("keys", new)

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._buffers is None else self._kept(self._buffers.values)

    @values.setter
    def values(self, new: torch.Tensor | None) -> None:
        self._assign("values", new)

    def _kept(self, buffer: torch.Tensor) -> torch.Tensor:
        assert self._buffers is not None
        return self._buffers.view(buffer)

    def _assign(self, name: str, new: torch.Tensor | None) -> None:
        # Keys and values are assigned one after the other, keys first.
        if new is None or new.dim() != 4:
            self._buffers = None
            return
        if name == "keys" or self._buffers is None:
            self._pending = new
            if self._buffers is None:
                self._buffers = _Buffers(new, new)
            return
        keys = self.__dict__.pop("_pending", self._buffers.view(self._buffers.keys))
        self._buffers = _Buffers(keys, new)

    def get_seq_length(self) -> int:
        buffers = self._buffers
        return 0 if buffers is None else buffers.end - buffers.start

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device), ...])

    def _map(self, change: Any) -> None:
        """Change the rows of the whole buffers, so that the room stays."""
        old = self._buffers
        if old is not None:
            self._buffers = _Buffers(change(old.keys), change(old.values))
            self._buffers.start, self._buffers.end = old.start, old.end

    def reset(self) -> None:
        self._buffers = None
        self.is_initialized = False
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = 0

    def __copy__(self) -> _InPlace:
        """A copy that shares no free room with this layer."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        if self._buffers is not None:
            b = self._buffers
            other._buffers = _Buffers(b.view(b.keys), b.view(b.values))
        return other

    def _start(self, key: torch.Tensor, value: torch.Tensor, room: int) -> _Buffers:
        self.dtype, self.device = key.dtype, key.device
        self.is_initialized = True
        made = _Buffers(*(x.new_empty((*x.shape[:2], room, x.shape[-1])) for x in (key, value)))
        made.end = 0
        self._buffers = made
        return made

    @staticmethod
    def _append(to: _Buffers, key: torch.Tensor, value: torch.Tensor) -> None:
        end = to.end + key.shape[-2]
        to.keys[:, :, to.end : end] = key
        to.values[:, :, to.end : end] = value
        to.end = end


def _watched(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class GrowingLayer(_InPlace):
    """All keys and values, in buffers that grow by half of their size."""

    def __init__(self, replaced: DynamicLayer) -> None:
        """Args: the layer whose tokens and place it takes."""
        self._buffers = None
        self.take(replaced)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, Hkv, n, D) and return all keys and values."""
        held = self._buffers
        if _watched(key_states, value_states) or (held is not None and _watched(held.keys)):
            return self._concatenated(key_states, value_states)
        self.claim(key_states, value_states)
        assert self._buffers is not None
        self._append(self._buffers, key_states, value_states)
        return self._buffers.view(self._buffers.keys), self._buffers.view(self._buffers.values)

    def claim(self, key: torch.Tensor, value: torch.Tensor) -> _Buffers:
        """Buffers with room for these new tokens behind `end`; the caller may write them."""
        held, new = self._buffers, key.shape[-2]
        if held is None:
            return self._start(key, value, _rounded(new + GRANULE))
        if held.end + new > held.room or not held.writable(key):
            size = held.end - held.start + new
            held = self._buffers = held.moved(_rounded(int(size * GROWTH)))
        return held

    def _concatenated(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With gradients: as the base class does it, since a buffer cannot be changed then."""
        held = self._buffers
        if held is None:
            self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
            self._buffers = _Buffers(key, value)
        else:
            self._buffers = _Buffers(
                torch.cat([held.view(held.keys), key], dim=-2),
                torch.cat([held.view(held.values), value], dim=-2),
            )
        return self._buffers.keys, self._buffers.values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0 or self._buffers is None:
            super().crop(tokens_to_remove)  # nothing, or its error
            return
        end = max(0, self._buffers.end + tokens_to_remove)
        # What was handed out must not change: the room behind `end` is given up.
        self._buffers = _Buffers(self._buffers.keys[:, :, :end], self._buffers.values[:, :, :end])


class SlidingLayer(_InPlace, DynamicSlidingWindowLayer):
    """The last `sliding_window - 1` keys and values, moved to the front once in a while.

    Whenever the past has to be recorded for cropping, it works as the layer of transformers.
    """

    def __init__(self, replaced: DynamicSlidingWindowLayer) -> None:
        """Args: the layer whose tokens and place it takes."""
        self._buffers = None
        self.take(replaced)

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, Hkv, n, D) and return what a window of any of them can reach."""
        held = self._buffers
        grad = _watched(key_states, value_states) or (held is not None and _watched(held.keys))
        if self.record_past or grad:
            return self._recorded(key_states, value_states)
        new = key_states.shape[-2]
        held = self.claim(key_states, value_states)
        self.cumulative_length += new
        self._append(held, key_states, value_states)
        found = held.view(held.keys), held.view(held.values)
        held.start = max(held.start, held.end - self.sliding_window + 1)
        return found

    def claim(self, key: torch.Tensor, value: torch.Tensor) -> _Buffers:
        """Buffers with room for these new tokens behind `end`; the caller may write them."""
        held, new = self._buffers, key.shape[-2]
        room = _rounded(2 * self.sliding_window + new)
        if held is None:
            return self._start(key, value, room)
        if held.end + new > held.room or not held.writable(key):
            held = self._buffers = held.moved(room)
        return held

    def _recorded(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is None:
            self._start(key, value, 0)
        plain = DynamicSlidingWindowLayer(self.sliding_window)
        vars(plain).update({k: v for k, v in vars(self).items() if k != "_buffers"})
        plain.keys, plain.values = self.keys, self.values
        keys, values = plain.update(key, value)
        self.cumulative_length = plain.cumulative_length
        self._buffers = _Buffers(plain.keys, plain.values)
        return keys, values


def in_place(cache: Any, index: int) -> None:
    """Let a layer of a cache be written in place from now on, where it is of a kind known here.

    Args:
        cache: a transformers cache; anything but a plain one (static, offloaded, encoder-decoder,
            a subclass with layers of its own) is left as it is.
        index: the layer's index.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or isinstance(cache, EncoderDecoderCache):
        return
    if index >= len(layers):
        kind = getattr(cache, "layer_class_to_replicate", None)
        if kind is not DynamicLayer or not isinstance(cache, Cache):
            return
        while len(layers) <= index:
            layers.append(kind())
    found = layers[index]
    if getattr(cache, "offloading", False):
        return
    if type(found) is DynamicLayer:
        layers[index] = GrowingLayer(found)
    elif type(found) is DynamicSlidingWindowLayer:
        layers[index] = SlidingLayer(found)


__all__ = ["GrowingLayer", "SlidingLayer", "in_place"]
