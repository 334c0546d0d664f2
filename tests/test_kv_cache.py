"""Layers written in place answer as the layers of transformers, whatever is done to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rewriter.kv_cache import GrowingLayer, SlidingLayer, in_place

HEADS, WIDTH, WINDOW = 2, 3, 7
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 5, 30, 90])),
        st.tuples(st.just("reorder"), st.just(0)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.just(0)),
        st.tuples(st.just("crop"), st.integers(-4, 0)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("swap"), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


def fresh(sliding: bool, recorded: bool) -> Any:
    if not sliding:
        return DynamicLayer()
    layer = DynamicSlidingWindowLayer(WINDOW)
    if recorded:
        layer.activate_past_recording()
    return layer


def swapped(layer: Any) -> Any:
    cache = DynamicCache()
    cache.layers = [layer]
    in_place(cache, 0)
    return cache.layers[0]


@given(STEPS, st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_answers_as_the_layer_it_replaces(steps: Any, sliding: bool, recorded: bool) -> None:
    plain = fresh(sliding, recorded)
    ours = swapped(fresh(sliding, recorded))
    generator = torch.Generator().manual_seed(0)
    rows = 2
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for what, how in steps:
        if what == "update":
            k, v = torch.randn(2, rows, HEADS, how, WIDTH, generator=generator)
            expected, got = plain.update(k, v), ours.update(k, v)
            for a, b in zip(expected, got, strict=True):
                assert torch.equal(a, b)
                held.append((b, a))
        elif what == "swap":  # a layer that holds tokens already
            ours = swapped(copy.deepcopy(plain))
        elif what == "crop" and ((sliding and not recorded) or plain.get_seq_length() <= -how):
            continue  # refused once the window is full; nothing may be left
        elif what == "reset":
            plain.reset(), ours.reset()
            rows = 2
        elif what in ("repeat", "select", "reorder"):
            if plain.get_seq_length() == 0 or rows > 8 or (what == "select" and rows < 2):
                continue
            for layer in (plain, ours):
                if what == "repeat":
                    layer.batch_repeat_interleave(how)
                elif what == "select":
                    layer.batch_select_indices(torch.arange(rows // 2))
                else:
                    layer.reorder_cache(torch.arange(rows).flip(0))
            rows = rows * how if what == "repeat" else rows // 2 if what == "select" else rows
        else:
            plain.crop(how), ours.crop(how)
        assert ours.get_seq_length() == plain.get_seq_length()
        assert ours.get_mask_sizes(3) == plain.get_mask_sizes(3)
        assert ours.get_max_length() == plain.get_max_length()
        if plain.keys is not None and plain.keys.numel():
            assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)
    assert all(torch.equal(ours_then, then) for ours_then, then in held)


@pytest.mark.parametrize("kind", [GrowingLayer, SlidingLayer])
def test_a_token_does_not_move_the_others(kind: type) -> None:
    ours = swapped(fresh(kind is SlidingLayer, False))
    assert type(ours) is kind
    one = torch.zeros(1, HEADS, 1, WIDTH)
    places = set()
    for _ in range(60):
        ours.update(one, one)
        places.add(ours.buffers.keys.data_ptr())
    assert len(places) <= 6


def test_gradients_pass() -> None:
    ours = swapped(fresh(False, False))
    first = torch.randn(1, HEADS, 2, WIDTH, requires_grad=True)
    ours.update(first, first)
    keys, values = ours.update(first, first)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(first.grad, torch.full_like(first, 4.0))


def test_copies_do_not_share_room() -> None:
    ours = swapped(fresh(False, False))
    one = torch.ones(1, HEADS, 1, WIDTH)
    ours.update(one, one)
    for other in (copy.copy(ours), copy.deepcopy(ours)):
        other.update(2 * one, 2 * one)
        ours.update(3 * one, 3 * one)
        assert other.keys[0, 0, -1, 0] == 2 and ours.keys[0, 0, -1, 0] == 3


def test_inference_mode_may_end() -> None:
    ours = swapped(fresh(False, False))
    one = torch.ones(1, HEADS, 1, WIDTH)
    with torch.inference_mode():
        ours.update(one, one)
    keys, _ = ours.update(one, one)
    assert keys.shape[-2] == 2 and not keys.is_inference()


def test_other_caches_are_left_alone() -> None:
    class Own(DynamicLayer):
        """A layer that may do anything."""

    cache = DynamicCache()
    cache.layers = [Own()]
    in_place(cache, 0)
    assert type(cache.layers[0]) is Own
    offloaded = DynamicCache(offloading=True)
    offloaded.layers = [DynamicLayer()]
    in_place(offloaded, 0)
    assert type(offloaded.layers[0]) is DynamicLayer
    in_place(object(), 0)
