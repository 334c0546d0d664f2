"""FlexAttention is read like attention written out: score and mask functions give the facts."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

import rewriter

LENGTH = 12


class Flexible(nn.Module):
    def __init__(self, score=None, mask=None, kv=4, attend=flex_attention):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, kv * 32), nn.Linear(64, 64)
        self.heads, self.score, self.mask, self.attend = kv, score, mask, attend
        self.table = nn.Parameter(torch.randn(4, 33))
        self.dense = nn.Parameter(torch.randn(4, 32, 32))
        self.slopes = nn.Buffer(torch.tensor([0.25**i for i in range(1, 5)]))

    def forward(self, x, documents=None):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 16).transpose(1, 2)
        k, v = (t.view(b, n, self.heads, 16).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        mask = None
        if self.mask is not None:
            rows = None if documents is None else b
            mask = create_block_mask(self.mask(documents), rows, None, n, n, device=x.device)
        score = self.score(self) if self.score is not None else None
        mixed = self.attend(q, k, v, score, mask, enable_gqa=self.heads != 4)
        return self.out(mixed.transpose(1, 2).reshape(b, n, 64))


def softcap(m):
    return lambda s, b, h, i, j: 20 * torch.tanh(s / 20)


def alibi(m):
    return lambda s, b, h, i, j: s + m.slopes[h] * (j - i)


def relative(m):
    return lambda s, b, h, i, j: s + m.table[h, (i - j).clamp(-16, 16) + 16]


def chained(m):
    return lambda s, b, h, i, j: s + m.dense[h][i][j]


def hidden_by_score(m):
    return lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf)


def row_sums(m):
    return lambda s, b, h, i, j: s + m.dense[h][i].sum()


def causal(_):
    return lambda b, h, i, j: i >= j


def window(_):
    return lambda b, h, i, j: (i >= j) & (i - j < 4)


def prefix(_):
    return lambda b, h, i, j: (i >= j) | (j < 3)


def documents(ids):
    return and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: ids[b, i] == ids[b, j])


CASES = {
    "plain": (Flexible(), "full", "external", None),
    "softcap in a window": (Flexible(softcap, window), "causal & window(4)", "external", 20.0),
    "alibi": (Flexible(alibi, causal), "causal", "alibi", None),
    "relative bias": (Flexible(relative), "full", "relative_bias", None),
    "chained index": (Flexible(chained), "full", "relative_bias", None),
    "causal by scores": (Flexible(hidden_by_score), "causal", "external", None),
    "grouped": (Flexible(None, causal, 2), "causal", "external", None),
    "prefix": (Flexible(None, prefix), "causal_or_prefix(3)", "external", None),
    "documents": (Flexible(None, documents), "causal & documents", "external", None),
    "compiled": (
        Flexible(softcap, causal, 4, torch.compile(flex_attention)),
        "causal",
        "external",
        20.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_facts(name):
    model, mask, position, cap = CASES[name]
    ids = torch.arange(LENGTH).expand(2, -1) // torch.tensor([[5], [3]])
    given = (torch.randn(2, LENGTH, 64), *([ids] if name == "documents" else []))
    found = rewriter.inspect(model.eval(), given)
    (site,) = found.sites
    assert (site.mask.describe(), site.position, site.softcap) == (mask, position, cap)
    assert site.scale == 0.25 and not found.misses
    assert (site.heads.query, site.heads.key_value) == (4, model.heads)


def test_rewritten():
    model, x = CASES["softcap in a window"][0].eval(), torch.randn(2, LENGTH, 64)
    with torch.no_grad():
        wanted = model(x)
        same = rewriter.rewrite(model, "identity", (x,), verify="quick")
        assert torch.equal(same(x), wanted)
        policy = {"rules": [{"use": "fused"}]}
        faster = rewriter.rewrite(model, policy, (x,), verify="quick")
        torch.testing.assert_close(faster(x), wanted, atol=1e-6, rtol=1e-5)


def test_what_mixes_scores_is_refused():
    found = rewriter.inspect(Flexible(row_sums).eval(), (torch.randn(2, LENGTH, 64),))
    (miss,) = found.misses
    assert not found.sites and "uses rows of a table in a function of scores" in miss.reason


def test_block_mask_made_inside_a_model():
    config = transformers.MistralConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        attn_implementation="flex_attention",
    )
    found = rewriter.inspect(transformers.MistralForCausalLM(config).eval())
    assert [s.mask.describe() for s in found.sites] == ["causal & window(4) & key_padding"]
    assert [s.rotary_dim for s in found.sites] == [16] and not found.misses
