"""Idioms met in models of other people's packages, each written anew here and small."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import rewriter

N = 12
FUSED = {"rules": [{"use": "fused"}]}


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def tokens():
    return (torch.randn(2, N, 64),)


def found(model, inputs):
    result = rewriter.inspect(model.eval(), inputs)
    assert [m.reason for m in result.misses] == []
    return result.sites


def stays(model, inputs, policy="identity", atol=0.0):
    """The rewritten model gives the same, and an object of the same class."""
    model = model.eval()
    with torch.no_grad():
        wanted = model(*inputs)
        after = rewriter.rewrite(model, policy, inputs, verify="quick")(*inputs)
    torch.testing.assert_close(after, wanted, atol=atol, rtol=0)


class Biased(nn.Module):
    """The bias of the scores comes from an MLP over offsets, which has dropout."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(N, dtype=x.dtype)
        bias = self.mlp((at[:, None] - at[None]).unsqueeze(-1)).permute(2, 0, 1)
        return self.out(joined(((q @ k.mT) / 4 + bias).softmax(-1) @ v))


def test_dropout_that_rests_draws_no_mask():
    (site,) = found(Biased(), tokens())
    assert (site.mask.describe(), site.position) == ("full", "relative_bias")


class OneHead(nn.Module):
    """One head in the layout of several, keys from a grid made smaller."""

    def __init__(self, fused, reduce):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)
        self.smaller = nn.Conv2d(32, 32, 2, 2) if reduce else None
        self.fused = fused

    def forward(self, x):
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, 1, c).permute(0, 2, 1, 3)
        if self.smaller is not None:
            x = (
                self.smaller(x.transpose(1, 2).reshape(b, c, 4, 4))
                .reshape(b, c, -1)
                .transpose(1, 2)
            )
        k, v = self.kv(x).reshape(b, -1, 2, 1, c).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * c**-0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, n, c))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
def test_one_head(fused, reduce):
    model, x = OneHead(fused, reduce), (torch.randn(2, 16, 32),)
    (site,) = found(model, x)
    assert (site.heads.query, site.heads.key_value, site.cross) == (1, 1, reduce)
    stays(model, x)
    if not reduce:
        stays(model, x, FUSED, 1e-5)


@dataclass
class Halfway:
    """What an attention hands on beside its output, known to nobody else."""

    scores: torch.Tensor | None = None
    values: torch.Tensor | None = None
    name: str = "halfway"


class Telling(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x, before=None):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / 4
        if before is not None:
            v = v + before.values
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return self.out(joined(mixed)), Halfway(values=v)


class Told(nn.Module):
    """Layers that hand an object of a dataclass on, also to the caller."""

    def __init__(self, pass_on):
        super().__init__()
        self.layers = nn.ModuleList(Telling() for _ in range(3))
        self.pass_on = pass_on

    def forward(self, x):
        told = None
        for layer in self.layers:
            y, told = layer(x, told if self.pass_on else None)
            x = x + y
        return x, told.values


@pytest.mark.parametrize("pass_on", [False, True])
def test_results_that_are_objects(pass_on):
    model = Told(pass_on)
    sites = found(model, tokens())
    assert [s.mask.describe() for s in sites] == ["causal"] * 3
    if not pass_on:
        stays(model, tokens())
        rewritten = rewriter.rewrite(model, "identity", tokens(), verify="quick")
        told = rewritten.layers[0](*tokens())[1]
        assert type(told) is Halfway and told.name == "halfway" and told.scores is None


class Convolved(nn.Module):
    """Queries, keys and values by 1x1 convolutions of a normalised image."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.GroupNorm(1, 32), nn.Conv2d(32, 32, 1)
        self.q, self.k, self.v = (nn.Conv2d(32, 32, 1) for _ in range(3))

    def forward(self, x):
        b, c, h, w = x.shape
        y = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (c,)).permute(0, 3, 1, 2)
        q, k, v = (f(y).view(b, 2, 16, h * w).transpose(-1, -2) for f in (self.q, self.k, self.v))
        mixed = (q @ k.mT / 4).softmax(-1) @ v
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, h, w))


def test_a_norm_before_a_convolution_is_none_of_the_queries():
    (site,) = found(Convolved(), (torch.randn(2, 32, 4, 4),))
    assert (site.heads.query, site.qk_norm, site.cross) == (2, False, False)


class Windowed(nn.Module):
    """Windows of an image folded into rows, the mask of each in an axis of its own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.table = nn.Parameter(torch.randn(2, 16, 16))
        part = torch.arange(8).div(3, rounding_mode="floor")
        part = (part[:, None] * 3 + part).view(2, 4, 2, 4).transpose(1, 2).reshape(4, 16)
        apart = part[:, None] != part[:, :, None]
        self.apart = nn.Buffer(torch.zeros(apart.shape).masked_fill(apart, -100.0))

    def forward(self, x):  # (B, 8, 8, 32)
        b = x.shape[0]
        y = x.view(b, 2, 4, 2, 4, 32).transpose(2, 3).reshape(b * 4, 16, 32)
        qkv = self.qkv(y).reshape(b * 4, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * 16**-0.5) @ k.mT + self.table.unsqueeze(0)
        scores = scores.view(b, 4, 2, 16, 16) + self.apart.unsqueeze(1).unsqueeze(0)
        mixed = scores.view(-1, 2, 16, 16).softmax(-1) @ v
        y = self.out(mixed.transpose(1, 2).reshape(b * 4, 16, 32))
        return y.view(b, 2, 2, 4, 4, 32).transpose(2, 3).reshape(b, 8, 8, 32)


def test_windows_with_a_mask_each():
    model, x = Windowed(), (torch.randn(2, 8, 8, 32),)
    (site,) = found(model, x)
    assert site.heads.query == 2 and "between the windows of one row" in site.mask.describe()
    stays(model, x)


class Apart(nn.Module):
    """Attention in each of four parts of the tokens, which keep an axis of their own."""

    def __init__(self, merged):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.merged = merged

    def forward(self, x):  # (B, 32, 8, 8)
        b = x.shape[0]
        y = x.view(b, 32, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, 4, 16, 32)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(2, 3) for t in self.qkv(y).chunk(3, -1))
        if self.merged:
            q, k, v = (t.reshape(b * 16, 16, 8) for t in (q, k, v))
        mixed = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        mixed = mixed.view(b, 4, 4, 16, 8).transpose(2, 3).reshape(b, 4, 16, 32)
        return self.out(mixed)


@pytest.mark.parametrize("merged", [False, True])
def test_windows_are_no_heads(merged):
    model, x = Apart(merged), (torch.randn(2, 32, 8, 8),)
    (site,) = found(model, x)
    assert (site.heads.query, site.heads.key_value, site.mask.describe()) == (4, 4, "full")
    stays(model, x)
    stays(model, x, FUSED, 1e-5)


class Strange:
    """No tensor, no dataclass: an object that no tracer can hand on."""

    def __init__(self, x):
        self.x = x


class Opaque(OneHead):
    def forward(self, x):
        return Strange(super().forward(x))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.strange = nn.ModuleList(Opaque(False, False) for _ in range(2))
        self.plain = OneHead(False, False)

    def forward(self, x):
        for layer in self.strange:
            x = x + layer(x).x
        return self.plain(x)


def test_a_module_that_cannot_be_traced_alone_is_left_out():
    x = (torch.randn(2, 16, 32),)
    assert len(found(Mixed(), x)) == 3
    model = rewriter.rewrite(Mixed().eval(), FUSED, x, verify="quick")
    states = [d.status for d in rewriter.plan_of(model).decisions]
    assert states == ["refused", "refused", "done"]
    refused = rewriter.plan_of(model).decisions[0]
    assert "cannot trace 'strange.0'" in refused.reason


class Recording(nn.Module):
    """Gives its scores away before and after they are masked; the model above drops them."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / 4
        raw = scores.clone()
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        masked, weights = scores.clone(), scores.softmax(-1)
        return self.out(joined(weights @ v)), Halfway(raw, masked), weights


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Recording() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def test_scores_that_are_given_away():
    model, x = Dropping(), tokens()
    assert [s.mask.describe() for s in found(model, x)] == ["causal"] * 2
    stays(model, x)
    stays(model, x, FUSED, 1e-5)
    stays(model, x, {"rules": [{"use": "sink_window", "options": {"window": 32}}]}, 1e-5)
    same = rewriter.rewrite(model, "identity", x, verify="quick").layers[0](*x)
    wanted = model.layers[0](*x)
    assert torch.equal(same[1].scores, wanted[1].scores) and torch.equal(same[2], wanted[2])


def test_windows_in_a_compiled_graph_stay():
    model, x = Apart(False).eval(), torch.randn(2, 32, 8, 8)
    compiled = torch.compile(model, backend="rewriter", options={"inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=0)


class Sized(nn.Linear):
    def forward(self, x, *, size):
        return super().forward(x) * size


class Asking(nn.Module):
    """The query's projection needs a number beside the tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = Sized(64, 64), nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x):
        q, (k, v) = self.q(x, size=2), self.kv(x).chunk(2, -1)
        q, k, v = (heads(t, 4) for t in (q, k, v))
        return self.out(joined((q @ k.mT / 4).softmax(-1) @ v))


def test_children_that_need_more_than_a_tensor():
    model = Asking()
    assert len(found(model, tokens())) == 1
    stays(model, tokens())
