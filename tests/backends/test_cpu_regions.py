"""Gated layers and normalisations in generated C++ against torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rewriter.backends.cpu import gated_block, linear, norm
from rewriter.backends.cpu.norm import NormForm
from rewriter.backends.cpu.target import cpu_flags
from rewriter.backends.ops import regions
from rewriter.errors import UnsupportedError

if isinstance(norm.find(torch.float32), str):
    pytest.skip(f"no kernel here: {norm.find(torch.float32)}", allow_module_level=True)

FUNCTIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if not {"amx_tile", "amx_bf16"} <= cpu_flags():
        if not {"avx2", "fma"} <= cpu_flags():
            pytest.skip("this processor has no AVX2 to emulate tiles on")
        monkeypatch.setenv("ATTENTION_REWRITER_ISA", "tiles_on_avx2")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("activation", linear.GATES)
@pytest.mark.parametrize("dtype", linear.NAMES)
@pytest.mark.parametrize(
    ("rows", "columns", "inner", "bias", "threads"),
    [(1, 1, 1, True, 1), (45, 70, 33, True, 3), (300, 33, 800, False, 2)],
)
def test_gated_layers_equal_their_parts(
    activation: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    inner: int,
    bias: bool,
    threads: int,
) -> None:
    x = random(rows, inner, dtype=dtype)
    gate, up = (random(columns, inner, dtype=dtype, seed=s) / inner**0.5 for s in (1, 2))
    shifts = [random(columns, dtype=dtype, seed=s) if bias else None for s in (3, 4)]
    wide = [None if s is None else s.double() for s in shifts]
    wanted = FUNCTIONS[activation](F.linear(x.double(), gate.double(), wide[0]))
    wanted = wanted * F.linear(x.double(), up.double(), wide[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = linear.gated(x, up, shifts[1], linear.Gate(gate, shifts[0], activation))
    finally:
        torch.set_num_threads(before)
    assert got.dtype == dtype and got.shape == wanted.shape
    scale = max(1.0, float(wanted.abs().max()))
    assert float((got.double() - wanted).abs().max()) <= ERROR[dtype] * scale


@pytest.mark.usefixtures("tiles")
def test_gated_layers_keep_what_is_not_finite_and_refuse_odd_orders() -> None:
    x, gate, up = random(12, 20), random(7, 20), random(7, 20, seed=1)
    x[3, 4] = float("nan")
    out = linear.gated(x, up, None, linear.Gate(gate, None, "relu"))
    assert out[3].isnan().all() and out[torch.arange(12) != 3].isfinite().all()
    with pytest.raises(UnsupportedError, match="different orders"):
        linear.gated(x, up, None, linear.Gate(random(20, 7).t(), None, "silu"))
    with pytest.raises(UnsupportedError, match="without inputs"):
        linear.gated(x[:, :0], up[:, :0], None, linear.Gate(up[:, :0], None, "silu"))
    with pytest.raises(UnsupportedError, match="float64"):
        linear.gated(x.double(), up, None, linear.Gate(gate, None, "silu"))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("activation", linear.GATES)
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "outputs", "bias", "threads"),
    [(33, 5, 40, 7, True, 1), (300, 33, 700, 96, True, 2), (64, 610, 32, 33, False, 3)],
)
def test_whole_gated_blocks_equal_their_parts(
    activation: str, rows: int, inner: int, columns: int, outputs: int, bias: bool, threads: int
) -> None:
    """Not further from float64 than stock torch, which rounds every part."""
    dtype = torch.bfloat16
    x = random(2, rows, inner, dtype=dtype)[:1]
    gate, up = (random(columns, inner, seed=s).to(dtype) / inner**0.5 for s in (1, 2))
    down = (random(columns, outputs, seed=3).to(dtype) / columns**0.5).t()
    shifts = [
        random(n, dtype=dtype, seed=4 + i) if bias else None
        for i, n in enumerate((columns, columns, outputs))
    ]

    def block(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *b: Tensor | None) -> Tensor:
        hidden = FUNCTIONS[activation](F.linear(x, gate, b[0])) * F.linear(x, up, b[1])
        return F.linear(hidden, down, b[2])

    matrices = (x, gate, up, down)
    wanted = block(
        *(t.double() for t in matrices), *(s if s is None else s.double() for s in shifts)
    )
    stock = block(*matrices, *shifts).double() - wanted
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = gated_block.forward(
            x, linear.Gate(gate, shifts[0], activation), up, shifts[1], down, shifts[2]
        )
    finally:
        torch.set_num_threads(before)
    assert got.dtype == dtype and got.shape == (1, rows, outputs) and got.is_contiguous()
    error = got.double() - wanted
    assert float(error.abs().max()) <= ERROR[dtype] * max(1.0, float(wanted.abs().max()))
    assert float(error.square().mean()) <= 1.1 * float(stock.square().mean())


@pytest.mark.usefixtures("tiles")
def test_whole_gated_blocks_keep_what_is_not_finite_and_decline_others() -> None:
    x, gate, up, down = (
        random(*size, dtype=torch.bfloat16) for size in ((70, 20), (7, 20), (7, 20), (9, 7))
    )
    x[3, 4] = float("nan")
    out = gated_block.forward(x, linear.Gate(gate, None, "silu"), up, None, down, None)
    assert out[3].isnan().all() and out[torch.arange(70) != 3].isfinite().all()
    assert "few rows" in str(gated_block.decline(x[:3], up, down))
    assert "bfloat16" in str(gated_block.decline(x.float(), up.float(), down.float()))
    wide = random(40, 16384, dtype=torch.bfloat16)
    assert "too large" in str(gated_block.decline(wide, wide, wide.t()))
    with pytest.raises(UnsupportedError, match="different orders"):
        turned = linear.Gate(gate.t().contiguous().t(), None, "silu")
        gated_block.forward(x, turned, up, None, down, None)
    with pytest.raises(UnsupportedError, match="few rows"):
        gated_block.forward(x[:3], linear.Gate(gate, None, "silu"), up, None, down, None)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.one_of(st.integers(1, 40), st.sampled_from((64, 129, 576))),
    dtype=st.sampled_from(tuple(norm.NAMES)),
    centred=st.booleans(),
    offset=st.sampled_from((0.0, 1.0)),
    early=st.booleans(),
    scale=st.sampled_from((1e-3, 1.0, 100.0)),
)
def test_norms_equal_their_definition(
    rows: int,
    width: int,
    dtype: torch.dtype,
    centred: bool,
    offset: float,
    early: bool,
    scale: float,
) -> None:
    x = scale * random(2, rows, width, dtype=dtype)
    weight, bias = random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
    got = norm.forward(x, weight, bias, NormForm(1e-5, centred, offset, early))
    wide = x.double() - (x.double().mean(-1, keepdim=True) if centred else 0.0)
    wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    wanted = wanted * (weight.double() + offset) + bias.double()
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
    if rows:
        bound = ERROR[dtype] * max(1.0, float(wanted.abs().max()))
        assert float((got.double() - wanted).abs().max()) <= bound


def test_norms_round_where_the_model_rounds() -> None:
    x, weight = random(50, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    early = norm.forward(x, weight, None, NormForm(1e-6, early=True))
    late = norm.forward(x, weight, None, NormForm(1e-6))
    assert float((early != weight * wide.bfloat16()).float().mean()) < 0.01
    assert float((late != (weight.float() * wide).bfloat16()).float().mean()) < 0.01
    assert float((early != late).float().mean()) > 0.1


def test_norms_take_any_strides() -> None:
    x = random(6, 8, 30).transpose(0, 1)[..., 3:23]
    wanted = F.layer_norm(x, (20,))
    torch.testing.assert_close(norm.forward(x, None, None, NormForm(1e-5, True)), wanted)
    turned = random(20, 7).t()
    wanted = F.rms_norm(turned, (20,), eps=1e-5)
    torch.testing.assert_close(norm.forward(turned, None, None, NormForm(1e-5)), wanted)
    with pytest.raises(UnsupportedError, match="float64"):
        norm.forward(x.double(), None, None, NormForm(1e-5))


@pytest.mark.usefixtures("tiles")
def test_the_operators_trace() -> None:
    x, gate, up = random(4, 20), random(7, 20), random(7, 20, seed=1)
    with torch.no_grad():
        for run in (
            lambda x: regions.gated_linear(x, (gate, None), (up, None), "silu"),
            lambda x: regions.norm(x, gate[0], None, NormForm(1e-5)),
        ):
            compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(x), run(x))


def test_which_calls_are_plain() -> None:
    x = random(3, 4)
    assert not regions.plain(x)  # gradients are on
    with torch.no_grad():
        assert regions.plain(x, x[0], None) and not regions.plain(None)
        assert not regions.plain(x, x[0].bfloat16()) and not regions.plain(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not regions.plain(x)
