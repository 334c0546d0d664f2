"""Learned temperatures, biases of positions and windows as other packages write them, anew."""

import pytest
import torch
from test_held_out import FUSED, heads, joined, stays, tokens
from test_sizes_and_sources import agrees, lengths, sites
from torch import nn

import rewriter
from rewriter.ir.site import AttentionSite, TemperatureTerm

F = nn.functional


class Cosine(nn.Module):
    """Normalised queries and keys, a learned factor of each head or of all, bounded."""

    def __init__(self, each, divide=False, late=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.temperature = nn.Parameter(torch.rand((4, 1, 1) if each else ()) + 1.0)
        self.divide, self.late = divide, late

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        factor = self.temperature.clamp(max=4.0).exp()
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.late:
            scores = scores.masked_fill(hidden, -1e9)
        scores = scores / factor if self.divide else scores * factor
        return self.out(joined(scores.masked_fill(hidden, -1e9).softmax(-1) @ v))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("divide", [False, True])
def test_learned_temperature(each, divide):
    (site,) = sites(Cosine(each, divide), tokens())
    assert site.temperature == TemperatureTerm(0, divide)
    assert (site.mask.describe(), site.scale, site.qk_norm) == ("causal", 1.0, True)
    assert AttentionSite.from_json(site.to_json()) == site
    others = lengths((2, 12), (1, 21), (3, 8))
    agrees(Cosine(each, divide), tokens(), others)
    agrees(Cosine(each, divide), tokens(), others, FUSED, 1e-5)


def test_learned_temperature_is_trained_and_not_approximated():
    model = Cosine(True)
    after = rewriter.rewrite(model.eval(), FUSED, tokens(), verify="quick")
    x = tokens()[0]
    grads = [torch.autograd.grad(m(x).square().sum(), model.temperature) for m in (model, after)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    window = {"rules": [{"use": "sink_window", "options": {"window": 4}}]}
    with pytest.raises(rewriter.errors.NoSiteError, match="learned temperature"):
        rewriter.rewrite(model, window, tokens(), verify="quick")


def test_temperature_behind_a_mask_is_refused():
    (miss,) = rewriter.inspect(Cosine(True, late=True).eval(), tokens()).misses
    assert miss.reason == "the masked scores are scaled by a learned factor"


class Forgetting(nn.Module):
    """A bias of sums of gates: it falls with the distance, as fast as the tokens say."""

    def __init__(self, spelled):
        super().__init__()
        self.embed = nn.Embedding(99, 64)
        self.qkv, self.gate, self.out = nn.Linear(64, 192), nn.Linear(64, 4), nn.Linear(64, 64)
        self.spelled = spelled

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        gates = self.gate(x).transpose(1, 2)
        if self.spelled:
            gates = (1 / (1 + torch.exp(-gates))).log().cumsum(-1)
        else:
            gates = F.logsigmoid(gates).cumsum(-1)
        scores = q @ k.mT / 4 + (gates[..., :, None] - gates[..., None, :])
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.out(joined(scores.masked_fill(hidden, -1e9).softmax(-1) @ v))


@pytest.mark.parametrize("spelled", [False, True])
def test_a_bias_of_token_values_is_none_of_positions(spelled):
    ids = (torch.randint(0, 99, (2, 12)),)
    (site,) = sites(Forgetting(spelled), ids)
    assert (site.position, site.mask.describe()) == ("content_bias", "causal")
    agrees(Forgetting(spelled), ids, [(torch.randint(0, 99, (3, 17)),)])


class Related(nn.Module):
    """Queries meet a table of offsets: a bias, added to the scores before or after them."""

    def __init__(self, first):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.table, self.first = nn.Embedding(31, 16), first

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(x.shape[1])
        offsets = (at[:, None] - at[None]).clamp(-15, 15) + 15
        bias = torch.einsum("bhnd,nrd->bhnr", q, self.table(offsets)) * 0.25
        scores = q @ k.mT * 0.25
        scores = bias + scores if self.first else scores + bias
        return self.out(joined(scores.softmax(-1) @ v))


@pytest.mark.parametrize("first", [False, True])
def test_queries_times_a_table_are_a_bias(first):
    (site,) = sites(Related(first), tokens())
    assert (site.position, site.terms, site.mask.describe()) == ("content_bias", ("bias",), "full")
    agrees(Related(first), tokens(), lengths((2, 12), (3, 17)))


def test_a_large_bias_that_all_keys_share_hides_no_shape():
    class Offset(nn.Module):
        """16 * sigmoid: near 8 everywhere, no line in the keys."""

        def __init__(self):
            super().__init__()
            self.qkv, self.table = nn.Linear(64, 192), nn.Parameter(torch.randn(4, 23) * 0.05)

        def forward(self, x):
            q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
            at = torch.arange(12)
            bias = 16 * torch.sigmoid(self.table[:, at[:, None] - at[None] + 11])
            return joined((q @ k.mT / 4 + bias).softmax(-1) @ v)

    (site,) = sites(Offset(), tokens())
    assert site.position == "relative_bias"


class Partitioned(nn.Module):
    """Windows of an image in an axis of their own, and one head."""

    def __init__(self, count):
        super().__init__()
        self.qkv, self.out, self.count = nn.Linear(16, 48), nn.Linear(16, 16), count

    def forward(self, x):  # (B, G, P, C)
        b, g, p, c = x.shape
        q, k, v = (
            t.reshape(b, g, p, self.count, c // self.count).permute(0, 1, 3, 2, 4)
            for t in self.qkv(x).chunk(3, -1)
        )
        scores = torch.einsum("bghid,bghjd->bghij", q, k * 0.25)
        mixed = torch.einsum("bghij,bghjd->bghid", scores.softmax(-1), v)
        return self.out(mixed.permute(0, 1, 3, 2, 4).reshape(b, g, p, c))


@pytest.mark.parametrize("count", [1, 2])
def test_windows_of_one_head_are_no_heads(count):
    x = (torch.randn(2, 9, 4, 16),)
    (site,) = sites(Partitioned(count), x)
    assert (site.heads.query, site.heads.key_value) == (count, count)
    stays(Partitioned(count), x)
    stays(Partitioned(count), x, FUSED, 1e-5)


class Many(nn.Module):
    """`nn.MultiheadAttention` with settings, and with what a call of it may ask for."""

    def __init__(self, causal=False, weights=False, **settings):
        super().__init__()
        self.attend = nn.MultiheadAttention(64, 4, **settings)
        self.out, self.causal, self.weights = nn.Linear(64, 64), causal, weights

    def forward(self, x):
        n = x.shape[1 if self.attend.batch_first else 0]
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1) if self.causal else None
        mixed, weights = self.attend(x, x, x, attn_mask=hidden, need_weights=self.weights)
        return (self.out(mixed), weights) if self.weights else self.out(mixed)


@pytest.mark.parametrize("more", ["add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_beside_the_tokens(more, causal):
    model = Many(causal, batch_first=True, **{more: True}).eval()
    (site,) = sites(model, tokens())
    assert site.cross and (site.mask.describe() == "full") == (not causal)
    others = lengths((2, 12), (1, 21))
    agrees(model, tokens(), others, atol=1e-6)
    if causal:
        with pytest.raises(rewriter.errors.NoSiteError):
            rewriter.rewrite(model, FUSED, tokens(), verify="none")
    else:
        agrees(model, tokens(), others, FUSED, 1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_averaged_weights_that_are_handed_on(batch_first):
    model = Many(True, True, batch_first=batch_first)
    (site,) = sites(model, tokens())
    assert (site.mask.describe(), site.cross, site.heads.query) == ("causal", False, 4)
    agrees(model, tokens(), lengths((2, 12), (3, 17)), FUSED, 1e-5)


class Grown(nn.Module):
    """Slopes times distances, kept for the longest call so far and cut for shorter ones."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("slopes", 0.5 ** torch.arange(1, 5).view(4, 1, 1), persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def distances(self, n):
        if self.bias is None or self.bias.shape[-1] < n:
            at = torch.arange(n)
            self.register_buffer("bias", -(at[None] - at[:, None]).abs() * self.slopes, False)
        return self.bias[..., -n:, -n:]

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / 4 + self.distances(x.shape[1])
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.out(joined(scores.masked_fill(hidden, -1e9).softmax(-1) @ v))


def test_a_bias_that_is_kept_and_grows():
    (site,) = sites(Grown(), tokens())
    assert (site.position, site.mask.describe()) == ("alibi", "causal")
    agrees(Grown(), tokens(), lengths((2, 12), (3, 16), (1, 31), (2, 8)))


class Channels(nn.Module):
    """Channels attend to channels over all tokens, projected by a linear map or a convolution."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.qkv = nn.Conv2d(32, 96, 1) if kind == "conv" else nn.Linear(32, 96)
        self.factor = nn.Parameter(torch.ones(2, 1, 1)) if kind != "plain" else 0.25

    def forward(self, x):  # (B, 32, 4, 4) or (B, 16, 32)
        y = self.qkv(x)
        if self.kind == "conv":
            q, k, v = (t.reshape(x.shape[0], 2, 16, 16) for t in y.chunk(3, 1))
        elif self.kind == "unbound":
            q, k, v = y.reshape(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 4, 1).unbind(0)
        else:
            q, k, v = (heads(t, 2).mT for t in y.chunk(3, -1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return ((q @ k.mT) * self.factor).softmax(-1) @ v


@pytest.mark.parametrize("kind", ["conv", "linear", "plain", "unbound"])
def test_attention_among_channels_is_none_of_tokens(kind):
    x = torch.randn((2, 32, 4, 4) if kind == "conv" else (2, 16, 32))
    found = rewriter.inspect(Channels(kind).eval(), (x,))
    assert not found.sites and "not over tokens" in found.misses[0].reason
