"""Views of a step program lie where torch's views lie."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.passes.step import values as v
from rewriter.passes.step.machine import collapsed
from rewriter.passes.step.values import Buffer, Draft, Value, plan_arena

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["permute", "slice", "select", "squeeze", "unsqueeze", "expand", "view"]),
        st.integers(0, 10**6),
    ),
    max_size=6,
)


def apply(x: torch.Tensor, value: Value, what: str, seed: int) -> tuple[torch.Tensor, Any]:
    rank = x.dim()
    d = seed % rank if rank else 0
    if what == "unsqueeze":
        return x.unsqueeze(d), v.unsqueezed(value, d)
    if rank == 0:
        return x, value
    if what == "permute":
        order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed)).tolist()
        return x.permute(order), v.permuted(value, order)
    if what == "slice":
        start = seed % x.shape[d]
        return x[(slice(None),) * d + (slice(start, None, 2),)], v.sliced(value, d, start, None, 2)
    if what == "select":
        return x.select(d, seed % x.shape[d]), v.selected(value, d, seed % x.shape[d])
    if what == "squeeze":
        return x.squeeze(d), v.squeezed(value, d)
    if what == "expand":
        shape = [3, *x.shape]
        return (x.expand(shape), v.expanded(value, shape)) if x.numel() < 500 else (x, value)
    shapes = [(-1,), (*x.shape[:d], -1, *x.shape[d + 2 :]), (*x.shape, 1)]
    shape = v.sized(shapes[seed % 3], x.numel())
    found = v.viewed(value, shape)
    return (x.reshape(shape), found) if found is not None else (x, value)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_views_are_those_of_torch(steps: list[tuple[str, int]]) -> None:
    x = torch.arange(2 * 3 * 1 * 4).reshape(2, 3, 1, 4)
    whole = x.flatten()
    value = Value(Buffer(x.numel()), tuple(x.shape), x.stride(), torch.float32)
    for what, seed in steps:
        x, value = apply(x, value, what, seed)
        assert torch.equal(whole.as_strided(value.shape, value.strides, value.offset), x)
        sizes, strides = collapsed(value.shape, [value.strides]) if len(value.shape) < 5 else (0, 0)
        if sizes:
            merged = whole.as_strided(sizes, strides, value.offset)
            assert torch.equal(merged.flatten(), x.flatten())


def test_buffers_share_room_only_when_no_longer_needed() -> None:
    def value(size: int, pinned: bool = False) -> Value:
        return Value(Buffer(size, pinned), (size,), (1,), torch.float32)

    x, chain = value(40, pinned=True), [value(40) for _ in range(6)]
    drafts = [Draft("copy", chain[0], (x,))]
    drafts += [Draft("copy", b, (a,)) for a, b in pairwise(chain)]
    floats = plan_arena(drafts)
    assert floats == 3 * 48
    places = [c.base.at for c in (x, *chain) if isinstance(c.base, Buffer)]
    assert all(a != b for a, b in pairwise(places))
    assert places.count(places[0]) == 1
