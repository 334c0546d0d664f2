"""Block-sparse attention, forward and backward, against dense scores in float64."""

from __future__ import annotations

import pytest
import sympy
import torch
from sympy import And, Mod, Or
from triton_attention_rows import FIELDS, AttentionCase, dense, make, wide
from triton_recurrence_cases import error

from rewriter.backends.triton import block_sparse
from rewriter.ir.block_sparse import CAUSAL, EVERYTHING, BlockSparse, causal_window
from rewriter.ir.lookup import lookup
from rewriter.ir.mask import H, I, J

TABLE = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(1)).numpy() < 0.4
HOOKS = {"softcap": 5.0, "sinks": True, "slopes": True, "bias": True, "temperature": True}

CASES = [
    AttentionCase("causal", BlockSparse(16, 24, 0.3), lambda h, i, j: j <= i),
    AttentionCase(
        "hooks, one row of keys hidden",
        BlockSparse(40, 16, 0.3, mask=EVERYTHING, **HOOKS),  # type: ignore[arg-type]
        lambda h, i, j: j >= 0,
        batch=2,
        heads=2,
        kv_heads=1,
        rows=70,
        keys=80,
        lengths=(80, 0),
        bias_shape=(2, 2),
    ),
    AttentionCase(
        "sigmoid window",
        BlockSparse(16, 16, 0.3, weight="sigmoid", mask=causal_window(20, 3), bias=True),
        lambda h, i, j: (j <= i) & ((i - j < 20) | (j < 3)),
        bias_shape=(1, 1),
    ),
    AttentionCase(
        "strided with an offset",
        BlockSparse(16, 16, 0.3, mask=And(CAUSAL, sympy.Eq(Mod(I - J, 3), 0)), offset=20),
        lambda h, i, j: (j <= i) & ((i - j) % 3 == 0),
        rows=50,
        keys=70,
    ),
    AttentionCase(
        "table by head",
        BlockSparse(
            *(16, 16, 0.3),
            mask=Or(lookup(TABLE, H, I // 16, J // 16), sympy.Lt(H, 2)),
            slopes=True,
        ),
        lambda h, i, j: torch.from_numpy(TABLE)[h, i // 16, j // 16] | (h < 2),
    ),
    AttentionCase(
        "packed", BlockSparse(16, 16, 0.3), lambda h, i, j: j <= i, cuts=(0, 3, 3, 50, 90)
    ),
    AttentionCase(
        "listed blocks",
        BlockSparse(16, 16, 0.3, block=32),
        lambda h, i, j: j <= i,
        rows=100,
        keys=100,
        heads=2,
        kv_heads=1,
        listed=[[0, 2, -1], [1, -1, -1], [0, 1, 3], [1, 3, -1]],
    ),
    AttentionCase(
        "large logits", BlockSparse(16, 16, 1.0), lambda h, i, j: j <= i, rows=40, keys=40, size=2e3
    ),
    AttentionCase(
        "nothing visible",
        BlockSparse(16, 16, 1.0, mask=sympy.Lt(J, I - 50)),
        lambda h, i, j: j < i - 50,
    ),
    AttentionCase("one token", BlockSparse(16, 16, 0.3), lambda h, i, j: j <= i, rows=1, keys=1),
]
# Logits of 1e4 are beyond float16 inputs of that size.
SMALL = [c for c in CASES if c.size < 10]
SLOW = pytest.mark.nightly


def label(value: AttentionCase | torch.dtype) -> str:
    return value.name if isinstance(value, AttentionCase) else str(value)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((c, torch.float32) for c in CASES),
        *((c, torch.float16) for c in SMALL[:3]),
        *(pytest.param(c, torch.float16, marks=SLOW) for c in SMALL[3:]),
    ],
    ids=label,
)
def test_outputs(case: AttentionCase, dtype: torch.dtype) -> None:
    x = make(case, dtype)
    out, lse = block_sparse.forward(case.spec, x)
    want, sums = dense(case, x)
    assert error(out, want) <= (1e-5 if dtype == torch.float32 else 2e-3)
    seen = torch.isfinite(sums)
    assert torch.equal(torch.isfinite(lse), seen)
    assert not torch.isnan(lse).any()
    if seen.any():
        assert error(lse[seen], sums[seen]) <= 1e-5


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=SLOW)
        if c.name in ("nothing visible", "strided with an offset")
        else c
        for c in SMALL
    ],
    ids=label,
)
def test_gradients(case: AttentionCase) -> None:
    x = make(case, torch.float32)
    names = [n for n in FIELDS if getattr(x, n) is not None]
    leaves = wide(x)
    for n in names:
        getattr(leaves, n).requires_grad_()
    want, _ = dense(case, leaves)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.grad(want, [getattr(leaves, n) for n in names], grad)
    out, lse = block_sparse.forward(case.spec, x)
    found = block_sparse.backward(case.spec, x, out, lse, grad.float())
    for n, y in zip(names, expected, strict=True):
        # Of a single token the gradients of q and k are differences of equal terms: scale 1.
        assert error(getattr(found, n), y, float(case.keys == 1)) <= 2e-5, n


def test_any_strides() -> None:
    case = CASES[0]
    x = make(case, torch.float32)
    turned = type(x)(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v)))
    sparse = type(x)(*(torch.stack((t, t), -1)[..., 0] for t in (x.q, x.k, x.v)))
    want, _ = block_sparse.forward(case.spec, x)
    for other in (turned, sparse):
        assert torch.equal(block_sparse.forward(case.spec, other)[0], want)
