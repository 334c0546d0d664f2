"""The reference of `BlockSparse` against whole-matrix float64 attention and stock kernels."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import sympy
import torch
from attention_oracles import attention, close
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import Case, named
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from rewriter.backends.reference.block_sparse import block_sparse
from rewriter.backends.registry import resolve
from rewriter.ir.block_sparse import CAUSAL, EVERYTHING, BlockSparse, causal_window
from rewriter.ir.mask import H, I, J


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def allowed_pairs(case: Case, heads: int, M: int, N: int, offset: int = 0) -> torch.Tensor:
    h = torch.arange(heads)[:, None, None]
    i, j = torch.arange(M)[:, None] + offset, torch.arange(N)
    return case.plain(h, i, j).expand(1, heads, M, N)


def sequences(cu: list[int], n: int) -> torch.Tensor:
    """(n, n) bool: both tokens lie in the same packed sequence."""
    out = torch.zeros(n, n, dtype=torch.bool)
    for start, end in pairwise(cu):
        out[start:end, start:end] = True
    return out


HOOKS = ["plain", "softcap", "sinks", "slopes", "bias", "temperature", "sigmoid", "all"]


def hooks_of(hook: str, B: int, heads: int, M: int, N: int) -> tuple[dict, dict]:
    """Fields of the spec and tensors of the call."""
    every = hook == "all"
    fields: dict = {}
    tensors: dict = {}
    if hook == "softcap" or every:
        fields["softcap"] = 2.0
    if hook == "sigmoid":
        fields["weight"] = "sigmoid"
    if hook == "sinks" or every:
        tensors["sinks"] = normal(heads)
    if hook == "slopes" or every:
        tensors["slopes"] = torch.rand(heads) * 0.3
    if hook == "bias" or every:
        tensors["bias"] = normal(*((B, 1, M, N) if every else (1, heads, M, N)))
    if hook == "temperature" or every:
        tensors["temperature"] = torch.rand(heads, M) + 0.5
    return {**fields, **dict.fromkeys(tensors, True)}, tensors


def expected_of(spec: BlockSparse, q, k, v, pairs, tensors):
    return attention(
        *(q, k, v, pairs),
        scale=spec.scale,
        softcap=spec.softcap,
        sigmoid=spec.weight == "sigmoid",
        offset=spec.offset,
        **tensors,
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_masks_and_hooks(data):
    pick = data.draw
    torch.manual_seed(pick(st.integers(0, 1000)))
    B, kv, group = pick(st.integers(1, 2)), pick(st.integers(1, 2)), pick(st.integers(1, 3))
    M, N = pick(st.integers(1, 300)), pick(st.integers(1, 300))
    key_dim, value_dim = pick(st.sampled_from([(4, 4), (8, 3), (16, 24)]))
    offset = pick(st.sampled_from([0, max(N - M, 0), 5]))
    case = pick(st.sampled_from(named(60)))
    fields, tensors = hooks_of(pick(st.sampled_from(HOOKS)), B, kv * group, M, N)
    spec = BlockSparse(key_dim, value_dim, key_dim**-0.5, case.mask, offset=offset, **fields)
    q = normal(B, kv * group, M, key_dim)
    k, v = normal(B, kv, N, key_dim), normal(B, kv, N, value_dim)
    pairs = allowed_pairs(case, kv * group, M, N, offset)
    call = dict(tensors)
    if pick(st.booleans()):
        call["key_lengths"] = torch.randint(0, N + 1, (B,), dtype=torch.int32)
        pairs = pairs & (torch.arange(N) < call["key_lengths"][:, None])[:, None, None]
    out, lse = block_sparse(spec, q, k, v, **call)
    o, total = expected_of(spec, q, k, v, pairs, tensors)
    assert lse.dtype == torch.float32
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=5), st.integers(0, 9), st.booleans())
def test_packed_sequences(lengths, tail, causal):
    """Tokens behind the last sequence, if any, see nothing."""
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    n = max(cu[-1] + tail, 1)
    torch.manual_seed(n)
    q, k, v = normal(1, 4, n, 8), normal(1, 2, n, 8), normal(1, 2, n, 8)
    spec = BlockSparse(8, 8, 0.3, CAUSAL if causal else EVERYTHING)
    out, lse = block_sparse(spec, q, k, v, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    same = sequences(cu, n)
    pairs = same.tril() if causal else same
    o, total = attention(q, k, v, pairs, scale=0.3)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([8, 16, 32]), st.booleans())
def test_run_time_block_lists(M, N, block, causal):
    torch.manual_seed(M * 300 + N)
    B, kv, group = 2, 2, 2
    rows, columns = -(-M // block), -(-N // block)
    chosen = torch.rand(B, kv, rows, columns) < 0.5
    width = max(int(chosen.sum(-1).max()), 1) + 1
    lists = torch.full((B, kv, rows, width), -1, dtype=torch.int32)
    for b, g, r in torch.cartesian_prod(*(torch.arange(n) for n in (B, kv, rows))).tolist():
        numbers = chosen[b, g, r].nonzero()[:, 0].int()
        lists[b, g, r, : numbers.numel()] = numbers
    pairs = chosen.repeat_interleave(block, 2)[:, :, :M].repeat_interleave(block, 3)[..., :N]
    pairs = pairs.repeat_interleave(group, 1)
    if causal:
        pairs = pairs & (torch.arange(N) <= torch.arange(M)[:, None])
    q, k, v = normal(B, kv * group, M, 8), normal(B, kv, N, 8), normal(B, kv, N, 8)
    spec = BlockSparse(8, 8, 0.3, CAUSAL if causal else EVERYTHING, block=block)
    out, lse = block_sparse(spec, q, k, v, blocks=lists)
    o, total = attention(q, k, v, pairs, scale=0.3)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


def test_gradients_are_those_of_stock_attention():
    torch.manual_seed(0)
    M, N, offset = 150, 170, 20
    q = normal(2, 4, M, 8, dtype=torch.float64).requires_grad_()
    k, v = (normal(2, 2, N, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    spec = BlockSparse(8, 8, 0.4, causal_window(30, 2), offset=offset)
    lengths = torch.tensor([N, 11])
    i, j = torch.arange(M)[:, None] + offset, torch.arange(N)
    pairs = (j <= i) & ((i - j < 30) | (j < 2)) & (j < lengths[:, None, None, None])
    out, _ = block_sparse(spec, q, k, v, key_lengths=lengths)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=0.4, enable_gqa=True)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    for a, b in zip((out, *found), (expected, *wanted), strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("hook", HOOKS)
def test_gradcheck(hook):
    torch.manual_seed(1)
    M, N, heads = 5, 6, 4
    fields, tensors = hooks_of(hook, 1, heads, M, N)
    # Row 0 sees nothing; its outputs and gradients must be finite all the same.
    mask = sympy.And(J < I, sympy.Or(I - J < 3, sympy.Lt(H, 2)))
    spec = BlockSparse(3, 2, 0.5, mask, **fields)
    shapes = ((1, heads, M, 3), (1, 2, N, 3), (1, 2, N, 2))
    inputs = [normal(*s, dtype=torch.float64).requires_grad_() for s in shapes]
    names = list(tensors)
    inputs += [tensors[n].double().requires_grad_() for n in names]

    def run(q, k, v, *rest):
        out, lse = block_sparse(spec, q, k, v, **dict(zip(names, rest, strict=True)))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("size", [0, 1, 1e4])
def test_large_logits_and_empty_rows(size):
    q = (normal(1, 2, 40, 8) * size**0.5).requires_grad_()
    k, v = (normal(1, 2, 40, 8) * size**0.5).requires_grad_(), normal(1, 2, 40, 8)
    spec = BlockSparse(8, 8, 1.0, sympy.And(CAUSAL, I >= 5))
    out, lse = block_sparse(spec, q, k, v)
    o, total = attention(
        q, k, v, (torch.ones(40, 40).tril() > 0) & (torch.arange(40) >= 5)[:, None], scale=1.0
    )
    close(out, o, 1e-5 * max(1, size))
    close(lse, total, 1e-5)
    out.square().sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
    assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == -torch.inf).all()


def test_learned_sinks_are_those_of_gpt_oss():
    torch.manual_seed(2)
    q, k, v = normal(2, 6, 50, 16), normal(2, 2, 50, 16), normal(2, 2, 50, 16)
    sinks = normal(6)
    steps = torch.arange(50)
    seen = (steps <= steps[:, None]) & (steps[:, None] - steps < 20)
    module = SimpleNamespace(num_key_value_groups=3, sinks=sinks, training=False)
    added = torch.zeros(50, 50).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected, _ = eager_attention_forward(module, q, k, v, added[None, None], 0.25)
    spec = BlockSparse(16, 16, 0.25, causal_window(20), sinks=True)
    out, _ = block_sparse(spec, q, k, v, sinks=sinks)
    close(out, expected.transpose(1, 2).double(), 1e-5)


def test_bfloat16_accumulates_wide():
    torch.manual_seed(3)
    q, k, v = (normal(1, 2, 200, 16).bfloat16() for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = block_sparse(BlockSparse(16, 16, 0.25), q, k, v)
    o, total = attention(q, k, v, torch.ones(200, 200).tril() > 0, scale=0.25)
    assert out.dtype == torch.bfloat16
    close(out, o, 1e-2)
    close(lse, total, 1e-5)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


def test_nothing_of_the_size_of_the_matrix_is_allocated():
    n = 2304
    q, k, v = (normal(1, 1, n, 4).requires_grad_() for _ in range(3))
    with Largest() as seen:
        out, _ = block_sparse(BlockSparse(4, 4, 0.5), q, k, v)
        out.sum().backward()
    assert seen.size <= 128 * n
    with Largest() as seen:
        block_sparse(BlockSparse(4, 4, 0.5, causal_window(128)), q, k, v)
    assert seen.size <= 128 * 256


def test_recomputed_scores_give_the_same_gradients(monkeypatch):
    torch.manual_seed(4)
    q, k, v = (normal(1, 2, 300, 8).requires_grad_() for _ in range(3))
    spec = BlockSparse(8, 8, 0.3, causal_window(100))
    kept = torch.autograd.grad(block_sparse(spec, q, k, v)[0].square().sum(), (q, k, v))
    monkeypatch.setattr("rewriter.backends.reference.block_sparse._KEEP_PAIRS", 0)
    again = torch.autograd.grad(block_sparse(spec, q, k, v)[0].square().sum(), (q, k, v))
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


def test_the_reference_backend_serves_it(monkeypatch):
    monkeypatch.setenv("ATTENTION_REWRITER_BACKENDS", "reference")
    spec = BlockSparse(8, 8, 0.3)
    kernel = resolve(spec, "cpu", torch.float32)
    q, k, v = (normal(1, 2, 30, 8) for _ in range(3))
    assert kernel.backend == "reference"
    assert torch.equal(kernel.run(q, k, v)[0], block_sparse(spec, q, k, v)[0])


def test_it_compiles_in_one_graph_for_any_length(monkeypatch):
    monkeypatch.setenv("ATTENTION_REWRITER_BACKENDS", "reference")
    spec = BlockSparse(8, 8, 0.3, causal_window(20, 2))

    def run(q, k, v):
        return resolve(spec, q.device, q.dtype).run(q, k, v)[0]

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for n in (30, 47):
        q, k, v = (normal(1, 2, n, 8) for _ in range(3))
        assert torch.equal(compiled(q, k, v), block_sparse(spec, q, k, v)[0])
