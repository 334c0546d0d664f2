"""The kernels behind the custom operators: padding, states and autograd, as mixers call them."""

from __future__ import annotations

import torch
from triton_recurrence_cases import Shape, error, make
from triton_recurrence_rows import rows, wide

from rewriter.backends.generated import kernel
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.recurrence import Recurrence


def test_recurrence_with_padding() -> None:
    spec = Recurrence(16, 16, decay="head")
    x = make(spec, Shape(length=40, start=False))
    valid = torch.ones(1, 40, dtype=torch.bool)
    valid[:, :10] = False
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    out, _ = kernel("triton", spec)(*leaves, decay=x.decay, valid=valid)
    trimmed = make(spec, Shape(length=40, start=False))
    sources = [t.double().requires_grad_() for t in (trimmed.q, trimmed.k, trimmed.v)]
    short = wide(type(x)(*(t[:, :, 10:] for t in sources), decay=x.decay))
    want, _ = rows(spec, short)
    assert error(out[:, :, 10:], want) <= 1e-5
    assert not out[:, :, :10].any()
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.autograd.grad(want, sources, grad)
    found = torch.autograd.grad(out[:, :, 10:], leaves, grad.float())
    for got, y in zip(found, expected, strict=True):
        assert error(got, y) <= 2e-5


def test_attention() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=g, requires_grad=True) for _ in range(3))
    out, _ = kernel("triton", BlockSparse(16, 16, 0.25))(q, k, v)
    wide_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*wide_inputs, is_causal=True)
    assert error(out, want) <= 1e-5
    expected = torch.autograd.grad(want.sum(), wide_inputs)
    for got, y in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True):
        assert error(got, y, 1.0) <= 2e-5
