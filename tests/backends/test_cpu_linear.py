"""Linear layers in generated C++ against products in float64, and the operator around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rewriter.backends import fastest
from rewriter.backends.cpu import linear as kernel
from rewriter.backends.cpu.build import NoKernel, load
from rewriter.backends.cpu.target import TARGETS, cpu_flags
from rewriter.backends.ops import linear as ops

if isinstance(kernel.find(torch.float32), str):
    pytest.skip(f"no kernel here: {kernel.find(torch.float32)}", allow_module_level=True)

ERROR = {torch.float32: 3e-6, torch.bfloat16: 8e-3}  # of the largest output


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = kernel.forward(x, weight, bias)
    assert got.shape == wanted.shape and got.dtype == x.dtype and got.is_contiguous()
    if wanted.numel():
        scale = max(1.0, float(wanted.abs().max()))
        assert float((got.double() - wanted).abs().max()) <= ERROR[x.dtype] * scale


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 20), st.integers(90, 210)),
    columns=st.integers(1, 70),
    inner=st.one_of(st.integers(0, 40), st.sampled_from((383, 384, 385, 800))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    with_bias=st.booleans(),
    transposed=st.booleans(),
    threads=st.sampled_from((1, 3)),
)
def test_any_size_equals_the_product_in_float64(
    rows: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    with_bias: bool,
    transposed: bool,
    threads: int,
) -> None:
    weight = random(columns, inner, dtype=dtype, seed=1)
    if transposed:
        weight = weight.t().contiguous().t()
    bias = random(columns, dtype=dtype, seed=2) if with_bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(random(rows, inner, dtype=dtype), weight, bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", kernel.NAMES)
def test_weights_wider_than_one_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PACKED", 2**12)
    check(random(130, 70, dtype=dtype), random(333, 70, dtype=dtype), random(333, dtype=dtype))


def test_strides_and_leading_axes() -> None:
    wide = random(3, 5, 80)
    check(wide[..., 8:48], random(24, 100)[:, 30:70], random(48)[::2])
    check(wide.transpose(0, 1)[..., :40], random(24, 40), None)
    check(random(40, 9).t(), random(24, 40), None)
    check(random(40), random(24, 40), None)


def test_what_is_not_finite_stays_where_it_is() -> None:
    x = random(12, 20)
    x[3, 4] = float("nan")
    out = kernel.forward(x, random(17, 20), None)
    assert out[3].isnan().all() and out[torch.arange(12) != 3].isfinite().all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "wide_on_avx2", "tiles_on_avx2"])
def test_every_instruction_set_compiles_to_the_same_function(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa != "portable" and not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("this processor has no AVX2")
    monkeypatch.setenv("ATTENTION_REWRITER_ISA", isa)
    target = TARGETS[isa]
    unit = kernel.unit_of(torch.float32, target, kernel.parts_of(torch.float32, target))
    assert not isinstance(unit, str) and not isinstance(load(unit), NoKernel)
    found = kernel.find(torch.float32)
    assert not isinstance(found, str) and (found.tiles is not None) == target.tiles
    for rows in (37, 3):
        check(random(rows, 50), random(41, 50), random(41))
        check(random(rows, 50), random(50, 41).t(), None)
    if target.tiles:
        check(random(37, 50).bfloat16(), random(41, 50).bfloat16(), None)


def test_tiles_keep_all_bits_unless_less_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bfloat16 numbers hold a float32; two do where torch was told that this is enough."""
    if not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("this processor has no AVX2")
    if not {"amx_tile", "amx_bf16"} <= cpu_flags():
        monkeypatch.setenv("ATTENTION_REWRITER_ISA", "tiles_on_avx2")
    x, weight = random(40, 200), random(50, 200, seed=1)
    x[:, :7] *= 1e30  # what the other numbers add is lost in any float32 sum
    wanted = x.double() @ weight.double().t()
    errors = {}
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            got = kernel.forward(x, weight, None)
        finally:
            torch.set_float32_matmul_precision(before)
        errors[precision] = float((got.double() - wanted).abs().max() / wanted.abs().max())
    assert errors["highest"] <= 1e-6 and 1e-7 < errors["high"] <= 2e-5
    huge = torch.full((9, 3), 3e38)
    assert kernel.forward(huge, torch.full((5, 3), 0.25), None).isfinite().all()


def test_other_dtypes_are_declined_with_a_reason() -> None:
    assert "float64" in str(kernel.find(torch.float64))
    x = random(2, 3).double()
    assert torch.equal(ops.linear(x, x), F.linear(x, x))


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "linear", lambda x, weight, bias=None: "generated")


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("dtype", kernel.NAMES)
def test_the_operator_keeps_torchs_rules(dtype: torch.dtype) -> None:
    x = random(2, 5, 12, dtype=dtype).requires_grad_()
    weight = random(7, 12, dtype=dtype, seed=1).requires_grad_()
    bias = random(7, dtype=dtype, seed=2).requires_grad_()
    bound = ERROR[dtype]
    for args in ((x, weight, bias), (x, weight, None)):
        torch.library.opcheck(ops.operator, args, atol=bound, rtol=bound)


@pytest.mark.usefixtures("generated")
def test_gradients_equal_torchs_also_of_second_order() -> None:
    def grads(function: object) -> list[Tensor]:
        x, weight, bias = random(3, 9, 12), random(7, 12, seed=1), random(7, seed=2)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)  # type: ignore[operator]
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [out, *first, *second]

    for a, b in zip(grads(ops.linear), grads(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("generated")
def test_it_compiles_and_maps() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return ops.linear(x, weight).relu()

    x, weight = random(2, 9, 12), random(7, 12, seed=1)
    wanted = F.linear(x, weight).relu()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, weight), wanted, rtol=1e-5, atol=1e-5)
    mapped = torch.func.vmap(ops.linear, in_dims=(1, None))(x, weight)
    torch.testing.assert_close(mapped, F.linear(x, weight).transpose(0, 1), rtol=1e-5, atol=1e-5)
    each = random(2, 7, 12)
    mapped = torch.func.vmap(ops.linear)(x, each)
    torch.testing.assert_close(mapped, x @ each.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "winner"), [(0.5, "generated"), (0.99, "stock"), (2.0, "stock")])
def test_the_faster_code_is_chosen_and_remembered(
    ours: float, winner: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATTENTION_REWRITER_CACHE", str(tmp_path))
    monkeypatch.delenv("ATTENTION_REWRITER_BACKENDS", raising=False)
    measured: list[object] = []

    def measure(*what: object) -> tuple[float, float]:
        measured.append(what)
        return ours, 1.0

    monkeypatch.setattr(fastest, "_measure", measure)
    x, weight = random(33, 12), random(7, 12)
    assert fastest.linear(x, weight) == winner
    fastest._seconds.cache_clear()  # another process
    assert fastest.linear(random(60, 12), weight) == winner  # of the same range
    assert len(measured) == 1
    [file] = (tmp_path / "measured").iterdir()
    assert list(json.loads(file.read_text()).values()) == [[ours, 1.0]]
    fastest.linear(random(65, 12), weight)
    assert len(measured) == 2


def test_generated_code_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_REWRITER_BACKENDS", "reference")
    assert fastest.linear(random(3, 12), random(7, 12)) == "stock"


def test_code_that_gives_other_values_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fastest.generated, "forward", lambda x, weight, bias: x.new_zeros(len(x), len(weight))
    )
    assert fastest._measure(torch.float32, 7, 12, 2, False)[0] == float("inf")
