"""Random inputs for kernel tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from rewriter.ir.kernels import KernelSpec, state_of
from rewriter.ir.mask import Causal, KeyPadding, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Source
from rewriter.ir.state import State


@dataclass(frozen=True)
class Case:
    """Tensors of one call, with the padding pattern and the lengths of the pieces."""

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor
    pieces: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.q.shape[-2]


def make(
    seed: int = 0,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    n: int = 20,
    width: int = 4,
    value_width: int = 3,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, n, width, generator=g)
    k = torch.randn(batch, kv_heads, n, width, generator=g)
    v = torch.randn(batch, kv_heads, n, value_width, generator=g)
    return Case(q, k, v, torch.ones(batch, n, dtype=torch.bool), (n,))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n = draw(st.integers(1, 22))
    case = make(
        draw(st.integers(0, 10_000)),
        batch=2,
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 3])),
        n=n,
    )
    kind = draw(st.sampled_from(["none", "left", "right", "holes"]))
    cut = draw(st.integers(0, n))
    if kind == "left":
        case.valid[0, :cut] = False
    elif kind == "right":
        case.valid[0, cut:] = False
    elif kind == "holes":
        holes = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        case.valid[1] = torch.tensor(holes)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), max_size=4)) if n > 1 else set())
    edges = [0, *cuts, n]
    pieces = tuple(b - a for a, b in itertools.pairwise(edges))
    return Case(case.q, case.k, case.v, case.valid, pieces)


def start_state(spec: KernelSpec, case: Case, dtype: torch.dtype = torch.float32) -> State:
    heads = HeadGroups(case.q.shape[1], case.k.shape[1], case.q.shape[-1], case.v.shape[-1])
    site = AttentionSite(
        "block",
        0,
        heads,
        (Scale(1.0),),
        (),
        Mask((Causal(), KeyPadding())),
        "eager",
        Source("softmax"),
    )
    return state_of(spec).new(site, case.q.shape[0], dtype, torch.device("cpu"))


def in_pieces(
    call: Callable[[slice, State], tuple[Tensor, State]], state: State, pieces: tuple[int, ...]
) -> tuple[Tensor, State]:
    """Run `call` piece by piece; returns all outputs and the last state."""
    out, at = [], 0
    for length in pieces:
        piece, state = call(slice(at, at + length), state)
        out.append(piece)
        at += length
    return torch.cat(out, 2), state
