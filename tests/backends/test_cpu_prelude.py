"""The prelude of the generated C++ (vectors, functions, packing, GEMM) on every vector width."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.backends.cpu.build import NoKernel, Unit, built, find_compiler, load
from rewriter.backends.cpu.predicate import Printed, print_predicate
from rewriter.backends.cpu.source import assemble
from rewriter.backends.cpu.target import TARGETS, cpu_flags
from rewriter.ir.mask import H, I, J
from rewriter.ir.predicate import evaluate, lower

# Every kind of number and condition; most are true somewhere and false somewhere.
PREDICATE = sympy.Or(
    sympy.And(
        sympy.Eq(sympy.floor((I - 40) / 7), sympy.floor((J - 50) / 8)),
        sympy.Ne(sympy.Mod(I - 3 * J, 6), H),
    ),
    sympy.Lt(sympy.Max(I, 2 * J - 30), sympy.Min(J + 3, 25 + H)),
    sympy.And(sympy.Gt(sympy.Abs(I - J), 60), sympy.Not(sympy.Lt(J, 9))),
)

CODE = r"""
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int lanes_() { return LANES; }
EXPORT int flushes() {  // whether subnormal numbers become bf16 zeros, as the instruction has it
#if LANES == 16 && defined(__AVX512BF16__)
    return 1;
#endif
    return 0;
}
EXPORT void apply(int which, long n, const float* x, float* y) {
    for (long i = 0; i + LANES <= n; i += LANES) {
        vf v = load(x + i);
        store(y + i, which == 0   ? exp2_neg(v)
                     : which == 1 ? exp_neg(v)
                     : which == 2 ? tanh_(v)
                     : which == 3 ? sigmoid_(v)
                     : which == 4 ? log2_(v)
                     : which == 5 ? splat(sum_lanes(v))
                     : which == 6 ? splat(max_lanes(v))
                                  : exp2_rough(v));
    }
}
EXPORT void multiply(int add, int M, int N, int K, const float* A, long ars, long acs,
                     const float* B, long ldb, float* C, long ldc, float alpha) {
    if (add)
        gemm<Mode::Add>(M, N, K, A, ars, acs, B, ldb, C, ldc, alpha);
    else
        gemm<Mode::Set>(M, N, K, A, ars, acs, B, ldb, C, ldc, alpha);
}
// O[d][i] = sum_j V[j][d] P[j][i] for PANEL columns, on pairs of neighbours in j.
EXPORT void multiply_pairs(int n, int d, const bf16* V, const bf16* P, pair* v2, pair* p2,
                           float* O) {
    interleave_rows(n, d, V, d, v2);
    interleave_rows(n, PANEL, P, PANEL, p2);
    gemm_tiles<PANEL_VECTORS>(d, (n + 1) / 2, (const pair*)v2, 1L, (long)d, (const pair*)p2,
                              (long)PANEL, [=](int m, int v, vf s) INLINE_LAMBDA {
                                  store(O + m * PANEL + v * LANES, s);
                              });
}
EXPORT void round_trip(int n, int d, const float* x, float* turned, bf16* back) {
    long ld = (n + LANES - 1) / LANES * LANES;
    transpose_in(n, d, x, (long)d, turned, ld, 2.0f);
    transpose_out(n, d, turned, ld, back, (long)d);
}
EXPORT void turn_pairs(int n, int d, const bf16* x, pair* y) {
    transpose_pairs(n, d, x, d, y, (n + LANES - 1) / LANES * LANES);
}
EXPORT void pair_up(const float* even, const float* odd, int32_t* out) {
    store(out, make_pairs(load(even), load(odd)));
}
EXPORT void holds(int h, int i, int n, int32_t* out) {
    for (int j = 0; j < n; ++j) store(out + j * LANES, allowed(h, splat(i) + iota(), j, nullptr));
}
"""


def widths() -> list[str]:
    flags = cpu_flags()
    narrow = ["avx2", "wide_on_avx2"] if {"avx2", "fma"} <= flags else []
    return ["portable", *narrow, *(["avx512_bf16"] if "avx512_bf16" in flags else [])]


@pytest.fixture(scope="module", params=widths())
def prelude(request: pytest.FixtureRequest) -> ctypes.CDLL:
    target = TARGETS[request.param]
    target = replace(target, flags=(*target.flags, "-O1"))  # compiles in half the time
    printed = print_predicate(lower(PREDICATE))
    assert isinstance(printed, Printed)
    source = assemble(target, ["math", "pack", "predicate"], {}, code="")
    library = load(Unit("prelude_test", source + printed.code + CODE, target))
    if isinstance(library, NoKernel):
        pytest.skip(library.reason)
    assert library.lanes_() == target.lanes
    return library


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def applied(prelude: ctypes.CDLL, which: int, x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.empty_like(x)
    prelude.apply(which, ctypes.c_long(x.size), pointer(x), pointer(y))
    return y


def near(n: int, lo: float, hi: float) -> np.ndarray:
    return np.linspace(lo, hi, n - n % 16, dtype=np.float32)


FUNCTIONS: list[tuple[int, Callable[[np.ndarray], np.ndarray], float, float, float]] = [
    (0, np.exp2, -125.9, 0.0, 1.5e-7),
    (1, np.exp, -87.0, 0.0, 1.5e-7),
    (7, np.exp2, -125.9, 0.0, 4e-6),
    (2, np.tanh, -12.0, 12.0, 2.5e-7),
    (3, lambda x: 1 / (1 + np.exp(-x)), -80.0, 30.0, 3e-7),
]


@pytest.mark.parametrize(("which", "exact", "lo", "hi", "bound"), FUNCTIONS)
def test_functions(prelude, which, exact, lo, hi, bound):
    x = near(100_000, lo, hi)
    y = exact(x.astype(np.float64))
    assert np.max(np.abs(applied(prelude, which, x) - y) / np.maximum(np.abs(y), 1e-38)) < bound


def test_log2(prelude):
    x = np.exp(near(100_000, -80.0, 80.0).astype(np.float64)).astype(np.float32)
    y = np.log2(x.astype(np.float64))
    error = np.abs(applied(prelude, 4, x) - y) / np.maximum(np.abs(y), 1.0)
    assert error.max() < 2e-7


def test_exponentials_at_the_ends(prelude):
    x = np.full(16, -np.inf, dtype=np.float32)
    x[:4] = 0.0, -0.0, -1e30, np.nan
    for which in (0, 1, 7):
        y = applied(prelude, which, x)
        assert y[0] == y[1] == 1.0 and not y[2] and np.isnan(y[3]) and not y[4:].any()


def test_reductions(prelude):
    x = np.arange(16, dtype=np.float32) - 20
    lanes = prelude.lanes_()
    for start in range(0, 16, lanes):
        part = x[start : start + lanes]
        assert (applied(prelude, 5, x)[start : start + lanes] == part.sum()).all()
        assert (applied(prelude, 6, x)[start : start + lanes] == part.max()).all()


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 40),
    N=st.integers(0, 70),
    K=st.integers(0, 40),
    turned=st.booleans(),
    add=st.booleans(),
    gap=st.integers(0, 3),
)
def test_gemm(prelude, M, N, K, turned, add, gap):
    rng = np.random.default_rng(M * 5000 + N * 50 + K)
    A = rng.standard_normal((K, M) if turned else (M, K)).astype(np.float32)
    # B ends exactly where its last element does.
    B = rng.standard_normal(max(K - 1, 0) * (N + gap) + N).astype(np.float32)
    C = rng.standard_normal((M, N + gap)).astype(np.float32)
    rows = np.array([B[k * (N + gap) :][:N] for k in range(K)]).reshape(K, N)
    left = A.T if turned else A
    expected = C.astype(np.float64)
    expected[:, :N] = 0.5 * left.astype(np.float64) @ rows + (expected[:, :N] if add else 0)
    strides = (1, M) if turned else (K, 1)
    prelude.multiply(
        *(add, M, N, K, pointer(A), *map(ctypes.c_long, strides)),
        *(pointer(B), ctypes.c_long(N + gap), pointer(C), ctypes.c_long(N + gap)),
        ctypes.c_float(0.5),
    )
    assert np.allclose(C, expected, atol=1e-5, rtol=0)
    assert np.array_equal(C[:, N:], expected[:, N:].astype(np.float32))


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 8), (7, 13), (64, 20)])
def test_pairs(prelude, n, d):
    torch.manual_seed(n)
    panel = 2 * prelude.lanes_()
    V, P = torch.randn(n, d).bfloat16(), torch.randn(n, panel).bfloat16()
    v2, p2 = (torch.empty((n + 1) // 2, w, dtype=torch.int32) for w in (d, panel))
    out = torch.empty(d, panel)
    prelude.multiply_pairs(n, d, *(ctypes.c_void_p(t.data_ptr()) for t in (V, P, v2, p2, out)))
    assert torch.allclose(out.double(), V.double().T @ P.double(), atol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 19), (16, 16), (33, 48)])
def test_transposes(prelude, n, d):
    torch.manual_seed(n)
    lanes = prelude.lanes_()
    x = torch.randn(n, d)
    turned = torch.full((d, -(-n // lanes) * lanes), torch.nan)
    back = torch.empty(n, d, dtype=torch.bfloat16)
    prelude.round_trip(n, d, *(ctypes.c_void_p(t.data_ptr()) for t in (x, turned, back)))
    assert torch.equal(turned[:, :n], 2 * x.T) and not turned[:, n:].any()
    assert torch.equal(back, (2 * x).bfloat16())
    if d % 2 == 0:
        halves = torch.full((d // 2, turned.shape[1], 2), torch.nan, dtype=torch.bfloat16)
        prelude.turn_pairs(n, d, *(ctypes.c_void_p(t.data_ptr()) for t in (back, halves)))
        assert torch.equal(halves[:, :n], back.view(n, d // 2, 2).transpose(0, 1))
        assert not halves[:, n:].any()


def test_rounding_to_bf16_is_that_of_torch(prelude):
    lanes = prelude.lanes_()
    x = torch.tensor([1.00390625, 1.01171875, 3e38, -1e-40, torch.inf, -0.0, 7.3, torch.nan] * 2)
    even, odd = x[:lanes].contiguous(), x.flip(0)[:lanes].contiguous()
    out = torch.empty(lanes, 2, dtype=torch.bfloat16)
    prelude.pair_up(*(ctypes.c_void_p(t.data_ptr()) for t in (even, odd, out)))
    for found, expected in ((out[:, 0], even), (out[:, 1], odd)):
        if prelude.flushes():
            expected = torch.where(expected.abs() < 1e-38, 0 * expected, expected)
        torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_printed_predicate(prelude):
    lanes, n = prelude.lanes_(), 120
    for h in (0, 3):
        for start in range(0, 112, lanes):
            out = np.empty((n, lanes), dtype=np.int32)
            prelude.holds(h, start, n, pointer(out))
            i, j = torch.arange(start, start + lanes), torch.arange(n)[:, None]
            expected = evaluate(PREDICATE, i, j, torch.tensor(h)).expand(n, lanes)
            assert np.array_equal(out, -expected.int().numpy())


WIDE_CODE = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void single(int K, const float* A, const float* B, float* C) {
    gemm_tiles<PANEL_VECTORS>(ROWS, K, A, 64L, 1L, B, (long)PANEL,
                              [=](int m, int v, vf s) INLINE_LAMBDA {
                                  store(C + m * PANEL + v * LANES, s);
                              });
}
EXPORT void paired(int K, const pair* A, const pair* B, float* C) {
    gemm_tiles<PANEL_VECTORS>(ROWS, K, A, 64L, 1L, B, (long)PANEL,
                              [=](int m, int v, vf s) INLINE_LAMBDA {
                                  store(C + m * PANEL + v * LANES, s);
                              });
}
"""


def test_wide_kernels_stay_in_registers(tmp_path):
    """Cross-compiled for AVX-512: the right instructions, no accumulator spilled."""
    target, compiler = TARGETS["avx512_bf16"], find_compiler()
    if isinstance(compiler, NoKernel) or shutil.which("objdump") is None:
        pytest.skip("needs a compiler and objdump")
    unit = Unit("wide", assemble(target, ["gemm"], {}) + WIDE_CODE, target)
    path = built(unit, compiler, tmp_path)
    if isinstance(path, NoKernel):
        pytest.skip(path.reason)  # a compiler for another processor, or too old
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    wide = [line for line in text.splitlines() if "%zmm" in line]
    assert sum("vfmadd" in line for line in wide) >= 16
    assert sum("vdpbf16ps" in line for line in wide) >= 16
    assert not any("%rsp" in line or "%rbp" in line for line in wide)
