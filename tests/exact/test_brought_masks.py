"""Masks in chunks, with a prefix, with documents: found, run block-sparse, equal end to end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewriter

pytestmark = pytest.mark.usefixtures("generated_kernels")

N, CHANNELS, HEADS = 24, 32, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.q, self.k, self.v, self.o = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return x + self.o(out.transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    """Two blocks; `kind` says which keys a query sees."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(50, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        allowed = seen(self.kind, ids.shape[1], given)
        for block in self.blocks:
            x = block(x, allowed)
        return x


def seen(kind: str, n: int, given: Tensor | None) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    if kind == "chunks":
        return ((j <= i) & (i // 5 == j // 5))[None, None]
    if kind == "prefix":
        return ((j <= i) | (j < 7))[None, None]
    assert given is not None
    if kind == "given prefix":
        return ((j <= i)[None] | (j[None] < given[:, None, None]))[:, None]
    same = (given[:, :, None] == given[:, None, :])[:, None]
    return same & (j <= i) if kind == "causal documents" else same


def call(kind: str, n: int = N) -> tuple[Tensor, ...]:
    ids = torch.randint(0, 50, (2, n), generator=torch.Generator().manual_seed(n))
    if kind in ("chunks", "prefix"):
        return (ids,)
    if kind == "given prefix":
        return ids, torch.tensor([n // 3, 2])
    ends = torch.tensor([[n // 4, n // 2], [n // 3, n - 2]])
    return ids, (torch.arange(n)[None, None] >= ends[..., None]).sum(1)


MASKS = {
    "chunks": "causal & chunk(5)",
    "prefix": "causal_or_prefix(7)",
    "given prefix": "causal_or_group",
    "causal documents": "causal & documents",
    "documents": "documents",
}


@pytest.mark.parametrize("kind", MASKS)
def test_end_to_end(kind: str, served: list[str]) -> None:
    torch.manual_seed(0)
    model = Tiny(kind).eval()
    faster = rewriter.rewrite(model, "exact", call(kind))
    report = rewriter.report_of(faster)
    assert [s.mask.describe() for s in report.sites] == [MASKS[kind]] * 2
    assert not report.failures, report.failures
    served.clear()
    for n in (N, 61):
        with torch.no_grad():
            torch.testing.assert_close(
                faster(*call(kind, n)), model(*call(kind, n)), atol=2e-5, rtol=1e-4
            )
    assert set(served) == {"cpu"}
