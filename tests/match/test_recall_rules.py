"""Rules that few families need, each on the smallest graph that needs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core_oracle import canonical, values_of
from torch import nn

from rewriter.ir.site import SinkTerm
from rewriter.mixers.exact.keep import Keep, KeepOptions
from rewriter.passes.capture import Captured, capture
from rewriter.passes.match import MatchResult, match

X = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """q, k, v of (B, H, N, D) go into `mix`."""

    def __init__(self, mix: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.sink, self.table = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(12, 16))
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, 4, 16).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        return self.mix(self, q, k, v)


def look(mix: Callable[..., torch.Tensor]) -> tuple[Captured, MatchResult]:
    captured = capture(Block(mix), (X,), fixed={"args.0": frozenset({1, 2})})
    assert isinstance(captured, Captured), captured
    return captured, match(captured)


def column(self, q):
    return self.sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)


def sink_behind(self, q, k, v):
    return torch.softmax(torch.cat([q @ k.mT / 4, column(self, q)], -1), -1)[..., :-1] @ v


def sink_before(self, q, k, v):
    return torch.softmax(torch.cat([column(self, q), q @ k.mT / 4], -1), -1)[..., 1:] @ v


def wrong_column_dropped(self, q, k, v):
    return torch.softmax(torch.cat([q @ k.mT / 4, column(self, q)], -1), -1)[..., 1:] @ v


def two_products(self, q, k, v):
    both = torch.cat([q @ k.mT / 4, q @ k.flip(2).mT / 4], -1)
    return torch.softmax(both, -1) @ torch.cat([v, v.flip(2)], 2)


def single_query(self, q, k, v):
    return torch.softmax(q[:, :, -1:] @ k.mT / 4, -1) @ v


def picked_queries(self, q, k, v):
    best = q.pow(2).sum(-1).topk(4).indices
    q = q.gather(2, best[..., None].expand(-1, -1, -1, 16))
    return torch.softmax(q @ k.mT / 4, -1) @ v


def blocks(self, q, k, v):
    halves = (torch.softmax(h @ k.mT / 4, -1) @ v for h in (q[:, :, :6], q[:, :, 6:]))
    return torch.cat(list(halves), 2)


def relative_to_queries(self, q, k, v):
    distance = (torch.arange(12)[:, None] - torch.arange(12)).clamp(0, 11)
    bias = (q @ self.table.mT).gather(-1, distance.expand(q.shape[0], 4, 12, 12))
    return torch.softmax(q @ k.mT / 4 + bias, -1) @ v


SEEN = torch.ones(12, 12, dtype=torch.bool).tril()


def where_viewed(self, q, k, v):
    s = q @ k.mT / 4
    return torch.softmax(torch.where(SEEN, s.view_as(s), -1e9), -1) @ v


def where_reshaped(self, q, k, v):
    s = q @ k.mT / 4
    return torch.softmax(torch.where(~SEEN, torch.tensor(-1e9), s.reshape_as(s)), -1) @ v


def where_flattened(self, q, k, v):
    s = (q @ k.mT / 4).flatten(0, 1)
    return torch.softmax(torch.where(SEEN, s, -1e9).unflatten(0, (-1, 4)), -1) @ v


def fill_expanded(self, q, k, v):
    s = q @ k.mT / 4
    return torch.softmax(s.expand_as(s).masked_fill(~SEEN, -1e9), -1) @ v


def mask_like_scores(self, q, k, v):
    s = q @ k.mT / 4
    mask = torch.zeros(2, 4, 12, 12).masked_fill(~SEEN, -1e9)
    return torch.softmax(s.view_as(mask) + mask, -1) @ v


@pytest.mark.parametrize(
    "mix", [where_viewed, where_reshaped, where_flattened, fill_expanded, mask_like_scores]
)
def test_a_tensor_that_lends_its_sizes_is_no_data(mix):
    _, result = look(mix)
    assert [m.site.mask.describe() for m in result.matches] == ["causal"], result.misses


@pytest.mark.parametrize("mix", [sink_behind, sink_before])
def test_a_learned_sink_is_a_term_and_keep_replays_it(mix):
    captured, result = look(mix)
    (found,) = result.matches
    assert (found.site.sinks, found.site.terms) == (True, ("sink",))
    assert found.site.score[-1] == SinkTerm(0)
    values = values_of(captured, {"args.0": X})
    heads = {"head": 4, "kv_head": 4, "group": 1}
    nodes = found.nodes
    q, k, v = (canonical(values[o.node], o, heads) for o in (nodes.query, nodes.key, nodes.value))
    core = Keep(found.site, KeepOptions())
    out, _ = core(q, k, v, tuple(values[t.node] for t in nodes.terms))
    wanted = canonical(values[nodes.output.node], nodes.output, heads)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (wrong_column_dropped, "stands between the softmax and any product"),
        (two_products, "several products joined side by side"),
        (picked_queries, "picked by the largest of some scores"),
    ],
)
def test_what_is_no_attention_is_refused(mix, reason):
    _, result = look(mix)
    assert not result.matches
    assert [reason in m.reason for m in result.misses] == [True]


def test_attention_block_by_block_is_refused_as_a_whole():
    _, result = look(blocks)
    assert not result.matches
    assert ["block by block" in m.reason for m in result.misses] == [True, True]


def test_a_single_query_needs_no_axis():
    _, result = look(single_query)
    (found,) = result.matches
    assert (found.site.heads.query, found.site.heads.key_dim) == (4, 16)


def test_a_bias_made_of_queries_hides_nothing():
    _, result = look(relative_to_queries)
    (found,) = result.matches
    assert (found.site.terms, found.site.position) == (("bias",), "content_bias")
    assert found.site.mask.describe() == "full"


def test_self_and_cross_attention_are_told_apart():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x, memory):
            return (
                self.inner(x, memory, memory, need_weights=False)[0]
                + self.inner(x, x, x, need_weights=False)[0]
            )

    captured = capture(Cross(), (X, torch.randn(2, 12, 64)))
    assert isinstance(captured, Captured), captured
    assert [m.site.cross for m in match(captured).matches] == [True, False]


class Bucketed(Block):
    """Causal, with a bias of the distance from a table of 32, at a fixed length of 12."""

    def __init__(self, far: float) -> None:
        super().__init__(sink_behind)
        self.buckets = nn.Embedding(32, 4)
        with torch.no_grad():
            self.buckets.weight[20:] = far

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, 4, 16).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        at = torch.arange(n)
        distance = at[:, None] - at[None, :]
        bias = self.buckets(distance.clamp(min=0, max=31)).permute(2, 0, 1)[None]
        bias = torch.where(distance >= 0, bias, torch.finfo(x.dtype).min).contiguous()
        return nn.functional.scaled_dot_product_attention(q, k, v, bias)


@pytest.mark.parametrize(
    ("far", "mask"),
    [(0.5, "causal"), (-1e9, "the sequence length was fixed by the capture")],
)
def test_a_bias_table_hides_beyond_a_fixed_length_only_if_it_is_large(
    far: float, mask: str
) -> None:
    captured = capture(Bucketed(far), (X,), fixed={"args.0": frozenset({0, 1, 2})})
    assert isinstance(captured, Captured)
    site = match(captured).matches[0].site
    assert (site.mask.opaque or site.mask.describe()) == mask


def test_a_view_says_that_two_sizes_are_one() -> None:
    """Without it, keys of another batch symbol would be 16 * s // t channels wide."""
    layer = nn.TransformerDecoderLayer(64, 4, 96, dropout=0.1)
    layer.register_forward_pre_hook(lambda _, args: (args[0].view(torch.float32), *args[1:]))
    memory = torch.randn(9, 2, 64)
    captured = capture(layer.train(), (torch.randn(12, 2, 64), memory))
    assert isinstance(captured, Captured)
    widths = [(m.site.heads.key_dim, m.site.heads.value_dim) for m in match(captured).matches]
    assert widths == [(16, 16), (16, 16)]
