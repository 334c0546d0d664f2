"""Code that fixes sizes, branches on them or pools tokens, each idiom written anew and small."""

import pytest
import torch
from test_held_out import FUSED, heads, joined, tokens
from torch import nn

import rewriter


def sites(model, inputs):
    return rewriter.inspect(model.eval(), inputs).sites


def agrees(model, inputs, others, policy="identity", atol=0.0):
    """The rewritten model gives what the original gives, on further calls of other sizes."""
    model = model.eval()
    after = rewriter.rewrite(model, policy, inputs, verify="quick")
    with torch.no_grad():
        for call in (inputs, *others):
            torch.testing.assert_close(after(*call), model(*call), atol=atol, rtol=0)


def lengths(*sizes, width=64):
    return [(torch.randn(rows, n, width),) for rows, n in sizes]


class Sized(nn.Module):
    """The mask of a window is made of the length as a plain number, and filled in a loop."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        n = int(x.shape[1])
        hidden = torch.full((n, n), -torch.inf)
        for i in range(n):
            hidden[i, max(0, i - 4) : i + 1] = 0.0
        return self.out(joined((q @ k.mT / 4 + hidden).softmax(-1) @ v))


class Kept(nn.Module):
    """A table of positions is kept for the longest call so far."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.longest, self.table = 0, None

    def turned(self, x):
        n = x.shape[-2]
        if n != self.longest:
            self.longest = n
            self.table = torch.arange(n)[:, None] * 0.5 ** torch.arange(8)
        cos, sin = self.table.cos(), self.table.sin()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        return self.out(joined((self.turned(q) @ self.turned(k).mT / 4).softmax(-1) @ v))


class Filled(nn.Module):
    """Lengths that four does not divide are filled up."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        n = x.shape[1]
        if n % 4:
            x = nn.functional.pad(x, (0, 0, 0, 4 - n % 4))
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        return self.out(joined((q @ k.mT / 4).softmax(-1) @ v))[:, :n]


@pytest.mark.parametrize("kind", [Sized, Kept, Filled])
@pytest.mark.parametrize("policy", ["identity", FUSED])
def test_code_that_holds_for_some_sizes_is_traced_again(kind, policy):
    others = lengths((2, 12), (3, 12), (1, 12), (2, 17), (1, 21), (3, 8))
    agrees(kind(), tokens(), others, policy, 0.0 if policy == "identity" else 1e-5)


def test_a_size_that_cannot_be_traced_runs_the_original():
    class Odd(Filled):
        def forward(self, x):
            return super().forward(x) if x.shape[1] < 15 else x.sort(1).values

    others = lengths((2, 12), (2, 13), (2, 30))
    agrees(Odd(), tokens(), others)


class Overlapping(nn.Module):
    """Windows of four tokens that also see the window before; their number is that of a call."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (heads(t, 4).reshape(b * 4, n, 16) for t in self.qkv(x).chunk(3, -1))
        if n % 4:
            q, k, v = (nn.functional.pad(t, (0, 0, 0, 4 - n % 4)) for t in (q, k, v))
        at = torch.arange(q.shape[1])
        windows = q.shape[1] // 4
        q, k, v = (t.reshape(b * 4, windows, 4, 16) for t in (q, k, v))
        rows = at.view(1, windows, 4)

        def around(t, value):
            before = nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (1, 0), value=value)
            return torch.cat([before[:, :-1], t], 2)

        k, v, columns = around(k, -1.0), around(v, -1.0), around(rows, -1)
        scores = torch.einsum("bhie,bhje->bhij", q / 4, k)
        scores = scores.masked_fill(rows[..., None] < columns[..., None, :], -1e9)
        scores = scores.masked_fill(columns[..., None, :] == -1, -1e9)
        mixed = torch.einsum("bhij,bhje->bhie", scores.softmax(-1), v)
        mixed = mixed.reshape(b * 4, windows * 4, 16)[:, :n]
        return self.out(joined(mixed.reshape(b, 4, n, 16)))


def test_windows_of_free_number_are_no_heads():
    (site,) = sites(Overlapping(), tokens())
    assert site.heads.query < 5 and "between the windows of one row" in site.mask.describe()
    agrees(Overlapping(), tokens(), lengths((2, 12), (2, 21), (3, 12)))


class Reduced(nn.Module):
    """Keys and values from an image that a convolution makes smaller."""

    def __init__(self, by):
        super().__init__()
        self.q, self.kv = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 64, by, by)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = (self.q(x), *self.kv(x).chunk(2, 1))
        q, k, v = (t.reshape(b, 2, 16, -1).transpose(-1, -2) for t in (q, k, v))
        mixed = (q @ k.mT / 4).softmax(-1) @ v
        return mixed.transpose(-1, -2).reshape(b, c, h, w)


class Summed(nn.Module):
    """Keys and values are sums over the tokens with learned weights."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(64, 64)
        self.over = nn.Parameter(torch.randn(12, 5))

    def forward(self, x):
        k, v = (torch.einsum("bnd,nk->bkd", t, self.over) for t in self.kv(x).chunk(2, -1))
        q, k, v = (heads(t, 4) for t in (self.q(x), k, v))
        return self.out(joined((q @ k.mT / 4).softmax(-1) @ v))


class Landmarks(nn.Module):
    """Queries are means over three tokens each."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        q = q.reshape(x.shape[0], 4, -1, 3, 16).mean(3)
        return self.out(joined((q @ k.mT / 4).softmax(-1) @ v))


@pytest.mark.parametrize(
    ("model", "shape", "cross"),
    [
        (Reduced(1), (2, 32, 4, 4), False),
        (Reduced(2), (2, 32, 4, 4), True),
        (Summed(), (2, 12, 64), True),
        (Landmarks(), (2, 12, 64), True),
    ],
)
def test_keys_of_pooled_tokens_are_another_sequence(model, shape, cross):
    x = (torch.randn(shape),)
    (site,) = sites(model, x)
    assert site.cross == cross
    agrees(model, x, [(torch.randn(shape),)])


class AnyNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Filled()

    def forward(self, *args, **kwargs):
        return self.attend(*args, **kwargs)

    def attend(self, x, scale=1.0):
        q, k, v = (heads(t, 4) for t in self.inner.qkv(x).chunk(3, -1))
        return joined((q @ k.mT / 4 * scale).softmax(-1) @ v)


def test_a_forward_of_any_number_of_arguments_is_refused_in_words():
    model = nn.Sequential(AnyNumber(), nn.Linear(64, 64)).eval()
    with pytest.raises(rewriter.errors.NoSiteError, match="any number of arguments"):
        rewriter.rewrite(model, "identity", tokens(), verify="quick")


class Asked:
    """What an attention is asked for: made anew in each call, and no tensor."""

    def __init__(self, hidden):
        self.hidden = hidden


class Answering(Filled):
    def forward(self, x, asked):
        q, k, v = (heads(t, 4) for t in self.qkv(x).chunk(3, -1))
        scores = (q @ k.mT / 4).masked_fill(asked.hidden, -torch.inf)
        return self.out(joined(scores.softmax(-1) @ v))


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Answering() for _ in range(2))

    def forward(self, x):
        asked = Asked(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1))
        for layer in self.layers:
            x = x + layer(x, asked)
        return x


def test_objects_made_in_each_call_are_refused_in_words():
    assert [s.mask.describe() for s in sites(Asking(), tokens())] == ["causal"] * 2
    with pytest.raises(rewriter.errors.NoSiteError, match="brings a new Asked"):
        rewriter.rewrite(Asking().eval(), "identity", tokens(), verify="quick")
