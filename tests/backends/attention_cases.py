"""Specs, inputs and instruction sets of the tests of generated block-sparse attention."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import sympy
import torch
from attention_oracles import close
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch import Tensor

from rewriter.backends.cpu import block_sparse as cpu
from rewriter.backends.cpu.target import VARIABLE, Target, cpu_flags, host_target
from rewriter.backends.inputs import BlockSparseGrads, BlockSparseInputs
from rewriter.ir.block_sparse import CAUSAL, BlockSparse, causal_window
from rewriter.ir.lookup import lookup
from rewriter.ir.mask import H, I, J

HEADS = 4
TABLE = np.random.default_rng(7).random((HEADS, 10, 10)) < 0.4
# Window or, for the first heads, every fifth key, or blocks of a random table.
MIXED = sympy.And(
    sympy.Le(J, I),
    sympy.Or(
        sympy.Lt(sympy.Abs(I - J - 3), 17),
        sympy.And(sympy.Lt(H, 2), sympy.Eq(sympy.Mod(J - 2 * I, 5), sympy.Mod(H, 5))),
        lookup(TABLE, H, sympy.floor(I / 33), sympy.floor((J - 6) / 33)),
    ),
)
DENSE = BlockSparse(64, 64, 0.125)
HOOKS = {"sinks": True, "slopes": True, "bias": True, "temperature": True}
EVERY = BlockSparse(24, 40, 0.2, MIXED, softcap=5.0, offset=3, **HOOKS)
LISTED = BlockSparse(80, 96, 0.1, CAUSAL, weight="sigmoid", block=32)
NARROW = BlockSparse(32, 16, 0.2, causal_window(50, 3))


def mixed(M: int, N: int, offset: int) -> Tensor:
    """MIXED in plain numpy."""
    h, i, j = np.ogrid[:HEADS, offset : offset + M, :N]
    rows, columns = i // 33, (j - 6) // 33
    inside = (rows < 10) & (columns >= 0) & (columns < 10)
    listed = inside & TABLE[h, np.minimum(rows, 9), np.clip(columns, 0, 9)]
    strided = (h < 2) & ((j - 2 * i) % 5 == h % 5)
    return torch.from_numpy((j <= i) & ((abs(i - j - 3) < 17) | strided | listed))


def causal(M: int, N: int) -> Tensor:
    return torch.ones(M, N, dtype=torch.bool).tril()


def same_sequence(ends: list[int], n: int) -> Tensor:
    out = torch.zeros(n, n, dtype=torch.bool)
    for start, end in pairwise(ends):
        out[start:end, start:end] = True
    return out


def qkv(spec: BlockSparse, B: int, kv: int, M: int, N: int, dtype=torch.float32):
    """Strided in different ways: heads inside tokens, rows with gaps, dense."""
    q = torch.randn(B, M, HEADS, spec.key_dim).transpose(1, 2)
    k = torch.randn(B, kv, N, spec.key_dim + 3)[..., 1:-2]
    v = torch.randn(B, kv, N, spec.value_dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(spec: BlockSparse, x: dict[str, Tensor], grad: Tensor, **integers: Tensor):
    inputs = BlockSparseInputs(**x, **integers)
    out, lse = cpu.forward(spec, inputs)
    return out, lse, cpu.backward(spec, inputs, out, lse, grad)


def agree(x: dict[str, Tensor], found: BlockSparseGrads, out: Tensor, grad: Tensor) -> None:
    """Gradients within 1e-4 of float64 autograd; `close` scales by at least 1."""
    expected = torch.autograd.grad(out, list(x.values()), grad.double(), allow_unused=True)
    for name, g in zip(x, expected, strict=True):
        mine = getattr(found, name)
        close(mine, torch.zeros_like(mine).double() if g is None else g, 1e-4)


def double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double().requires_grad_() for name, t in x.items()}


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An instruction set by name; `tiles` is the real one where the processor has it."""
    isa = request.param
    if isa == "host":
        yield
        return
    if isa == "tiles":
        host = host_target()
        isa = host.isa if isinstance(host, Target) and host.tiles else "tiles_on_avx2"
    needed = {"avx512_bf16"} if isa == "avx512_bf16" else {"avx2", "fma"}
    if not needed <= cpu_flags():
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv(VARIABLE, isa)
    # float32 on tiles wherever it is possible, not only where it is faster.
    monkeypatch.setattr(cpu, "_least_keys", lambda *_: 0.0)
    monkeypatch.setattr(cpu.forms, "FEW", 0)
    monkeypatch.setattr(cpu.forms, "fits", lambda spec: spec.block % 32 == 0)
    yield


drawn = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def everywhere(test):
    """On this processor as it would be, and on tile registers wherever that is possible."""
    both = pytest.mark.parametrize("target", ["host", "tiles"], indirect=True)
    return both(pytest.mark.usefixtures("target")(test))


sizes = {"B": st.integers(1, 2), "kv": st.sampled_from([1, 2, 4]), "n": st.integers(1, 300)}
