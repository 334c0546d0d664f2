"""`BlockSparse` against FlexAttention, the stock kernel with the same hooks."""

from __future__ import annotations

import warnings

import pytest
import torch
from attention_oracles import close
from mask_cases import named
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from rewriter.backends.reference.block_sparse import block_sparse
from rewriter.ir.block_sparse import BlockSparse

N = 60
HEADS, KV = 4, 2


def flex(q, k, v, case, offset, score_mod=None, lengths=None):
    M, n = q.shape[2], k.shape[2]
    h, i = torch.arange(HEADS)[:, None, None], torch.arange(M)[:, None] + offset
    pairs = case.plain(h, i, torch.arange(n)).expand(HEADS, M, n)

    def seen(b, h, i, j):
        return pairs[h, i, j] if lengths is None else pairs[h, i, j] & (j < lengths[b])

    batch = None if lengths is None else q.shape[0]
    mask = create_block_mask(seen, batch, HEADS, M, n, device="cpu", BLOCK_SIZE=(16, 16))
    with warnings.catch_warnings():
        # It advises to compile; as an oracle it need not be fast.
        warnings.simplefilter("ignore")
        out, extra = flex_attention(
            *(q.double(), k.double(), v.double()),
            score_mod=score_mod,
            block_mask=mask,
            scale=0.3,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
    return out, extra.lse


def inputs(M: int, n: int):
    torch.manual_seed(M + n)
    return torch.randn(2, HEADS, M, 16), torch.randn(2, KV, n, 16), torch.randn(2, KV, n, 16)


@pytest.mark.parametrize("case", named(N), ids=lambda c: c.name)
@pytest.mark.parametrize(("M", "n", "offset"), [(N, N, 0), (20, 50, 30)])
def test_masks(case, M, n, offset):
    q, k, v = inputs(M, n)
    out, lse = block_sparse(BlockSparse(16, 16, 0.3, case.mask, offset=offset), q, k, v)
    o, total = flex(q, k, v, case, offset)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


CAUSAL = next(c for c in named(N) if c.name == "causal")
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
BIAS = torch.randn(HEADS, N, N, generator=torch.Generator().manual_seed(0))
TEMPERATURE = torch.rand(HEADS, N, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize(
    ("fields", "tensors", "score_mod"),
    [
        ({"softcap": 2.0}, {}, lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0)),
        ({}, {"slopes": SLOPES}, lambda s, b, h, i, j: s - SLOPES[h] * (i - j)),
        ({}, {"bias": BIAS[None]}, lambda s, b, h, i, j: s + BIAS[h, i, j]),
        ({}, {"temperature": TEMPERATURE}, lambda s, b, h, i, j: s * TEMPERATURE[h, i]),
        (
            {"softcap": 3.0},
            {"temperature": TEMPERATURE, "slopes": SLOPES, "bias": BIAS[None]},
            lambda s, b, h, i, j: (
                3.0 * torch.tanh(s * TEMPERATURE[h, i] / 3.0) - SLOPES[h] * (i - j) + BIAS[h, i, j]
            ),
        ),
    ],
    ids=["softcap", "slopes", "bias", "temperature", "all"],
)
def test_hooks(fields, tensors, score_mod):
    q, k, v = inputs(N, N)
    given = dict.fromkeys(tensors, True)
    spec = BlockSparse(16, 16, 0.3, CAUSAL.mask, **fields, **given)
    out, lse = block_sparse(spec, q, k, v, **tensors)
    o, total = flex(q, k, v, CAUSAL, 0, score_mod)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)


def test_key_lengths():
    q, k, v = inputs(N, N)
    lengths = torch.tensor([17, 0], dtype=torch.int32)
    out, lse = block_sparse(BlockSparse(16, 16, 0.3), q, k, v, key_lengths=lengths)
    o, total = flex(q, k, v, CAUSAL, 0, lengths=lengths)
    close(out, o, 1e-5)
    close(lse, total, 1e-5)
