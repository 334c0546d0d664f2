"""Rotary embedding in generated C++ against the formula in float64, and which calls it serves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.backends.cpu import rotary as generated
from rewriter.backends.ops import rotary as operator
from rewriter.errors import UnsupportedError

if isinstance(generated.find(torch.float32), str):
    pytest.skip(f"no kernel here: {generated.find(torch.float32)}", allow_module_level=True)

ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As complex numbers: pairs (x[d], x[d + D / 2])."""
    first, second = x.double().chunk(2, -1)
    (c1, c2), (s1, s2) = (t.double().chunk(2, -1) for t in (cos, sin))
    return torch.cat((first * c1 - second * s1, second * c2 + first * s2), -1)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.sampled_from((0, 1, 5, 31, 32, 70)),
    half=st.one_of(st.integers(1, 20), st.sampled_from((32, 40, 64))),
    dtype=st.sampled_from(tuple(generated.NAMES)),
    beside=st.booleans(),
    shared=st.booleans(),
)
def test_the_kernel_equals_the_definition(
    batch: int,
    heads: int,
    tokens: int,
    half: int,
    dtype: torch.dtype,
    beside: bool,
    shared: bool,
) -> None:
    shape = (batch, tokens, heads, 2 * half) if beside else (batch, heads, tokens, 2 * half)
    x = random(*shape, dtype=dtype)
    x = x.transpose(1, 2) if beside else x
    cos, sin = (
        random(1 if shared else batch, 1, tokens, 2 * half, dtype=dtype, seed=s) for s in (1, 2)
    )
    got = generated.forward(x, cos, sin)
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
    if tokens:
        wanted = rotated(x, cos, sin)
        bound = ERROR[dtype] * max(1.0, float(wanted.abs().max()))
        assert float((got.double() - wanted).abs().max()) <= bound


@pytest.mark.parametrize("dtype", tuple(generated.NAMES))
def test_products_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    x, cos, sin = (random(1, 3, 40, 72, dtype=dtype, seed=s) for s in range(3))
    cos, sin = cos[:, :1], sin[:, :1]
    assert torch.equal(generated.forward(x, cos, sin), operator.formula(x, cos, sin))


def test_other_dtypes_are_refused() -> None:
    x = random(1, 1, 2, 4).double()
    with pytest.raises(UnsupportedError, match="float64"):
        generated.forward(x, x, x)


def test_what_no_kernel_serves_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_least_tokens", lambda *_: 0)
    served: list[Tensor] = []

    def spy(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        served.append(x)
        return operator.formula(x, cos, sin)

    monkeypatch.setattr(generated, "forward", spy)
    x, table = random(2, 3, 20, 8), random(1, 1, 20, 8, seed=1)
    with torch.no_grad():
        operator.rotary(x, table, table)
        assert len(served) == 1
        operator.rotary(x[:, :, :3], table[:, :, :3], table[:, :, :3])  # few tokens
        operator.rotary(x.transpose(1, 2), table.transpose(1, 2), table.transpose(1, 2))
        operator.rotary(x, table.double(), table.double())
        operator.rotary(x[:1], table.expand(4, 1, 20, 8), table)  # the tables widen x
        torch.vmap(operator.rotary, in_dims=(0, None, None))(x[None], table, table)
    leaf = x.clone().requires_grad_()
    operator.rotary(leaf, table, table).sum().backward()
    assert leaf.grad is not None and len(served) == 1
