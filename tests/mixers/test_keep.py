"""keep replays the original operations: equality here is bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from mixer_sites import BOTH_WAYS, bool_mask, float_mask, make_site, qkv
from torch import Tensor
from transformers import DynamicCache

from rewriter.ir.mask import Mask
from rewriter.ir.site import AddTerm, FillTerm, Scale, Softcap
from rewriter.mixers.exact.keep import Keep, KeepOptions


def valid_rows(n: int = 9) -> Tensor:
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0, :4] = False
    return valid


def repeat(x: Tensor, group: int = 2) -> Tensor:
    return x.repeat_interleave(group, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_with_a_mask(dtype: torch.dtype) -> None:
    site = make_site()
    q, k, v = (x.to(dtype) for x in qkv(site, 9))
    for mask in (bool_mask(valid_rows()), float_mask(bool_mask(valid_rows()), dtype)):
        out, weights = Keep(site, KeepOptions())(q, k, v, (mask,))
        expected = F.scaled_dot_product_attention(
            q, repeat(k), repeat(v), attn_mask=mask, scale=site.scale
        )
        assert torch.equal(out, expected)
        assert weights is None


def test_sdpa_without_a_mask() -> None:
    causal, both = make_site(), make_site(BOTH_WAYS)
    q, k, v = qkv(causal, 9)
    for site, flag in [(causal, True), (both, False)]:
        out, _ = Keep(site, KeepOptions())(q, k, v, (None,))
        expected = F.scaled_dot_product_attention(
            q, repeat(k), repeat(v), is_causal=flag, scale=site.scale
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("splits", [(9,), (4, 5), (5, 1, 1, 2)])
def test_causal_flag_with_a_cache(splits: tuple[int, ...]) -> None:
    """After the first piece the flag would mean the wrong corner; the mask must not."""
    site = make_site(terms=(), score=(Scale(0.3),), causal_flag=True)
    q, k, v = qkv(site, 9)
    keep, cache, at, out = Keep(site, KeepOptions(), layer=0), DynamicCache(), 0, []
    for n in splits:
        piece = slice(at, at + n)
        out.append(keep(q[:, :, piece], k[:, :, piece], v[:, :, piece], (), cache)[0])
        at += n
    expected = F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True, scale=0.3)
    torch.testing.assert_close(torch.cat(out, 2), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softmax_dtype", [None, "float32"])
def test_eager_steps_in_order(dtype: torch.dtype, softmax_dtype: str | None) -> None:
    score = (
        Scale(3.0, on="query", divide=True),
        Scale(0.7),
        Softcap(5.0),
        AddTerm(0),
        FillTerm(1, -math.inf, keep=False),
    )
    site = make_site(
        spelling="eager", score=score, terms=("bias", "mask"), softmax_dtype=softmax_dtype
    )
    q, k, v = (x.to(dtype) for x in qkv(site, 9))
    bias = torch.randn(1, 4, 9, 9).to(dtype)
    hide = torch.ones(9, 9, dtype=torch.bool).triu(1)
    out, weights = Keep(site, KeepOptions())(q, k, v, (bias, hide), need_weights=True)
    s = torch.matmul(q / 3.0, repeat(k).transpose(-1, -2)) * 0.7
    s = torch.tanh(s / 5.0) * 5.0 + bias
    s = s.masked_fill(hide, -math.inf)
    kind = None if softmax_dtype is None else torch.float32
    expected = torch.softmax(s, -1, dtype=kind).to(dtype)
    assert torch.equal(weights, expected)
    assert torch.equal(out, torch.matmul(expected, repeat(v)))


@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
def test_dropout_follows_the_mode(spelling: str) -> None:
    site = make_site(BOTH_WAYS, spelling=spelling, dropout=0.5)  # type: ignore[arg-type]
    q, k, v = qkv(site, 9)
    keep = Keep(site, KeepOptions())
    keep.eval()
    assert torch.equal(keep(q, k, v, (None,))[0], keep(q, k, v, (None,))[0])
    keep.train()
    torch.manual_seed(7)
    first = keep(q, k, v, (None,))[0]
    assert not torch.equal(first, keep(q, k, v, (None,))[0])
    torch.manual_seed(7)
    assert torch.equal(first, keep(q, k, v, (None,))[0])


def test_gradients_are_those_of_the_original() -> None:
    site = make_site(spelling="eager")
    mine = [x.requires_grad_() for x in qkv(site, 9)]
    theirs = [x.detach().clone().requires_grad_() for x in mine]
    mask = float_mask(bool_mask(valid_rows()))
    Keep(site, KeepOptions())(*mine, (mask,))[0].square().sum().backward()
    q, k, v = theirs
    s = torch.matmul(q, repeat(k).transpose(-1, -2)) * site.scale + mask
    torch.matmul(torch.softmax(s, -1), repeat(v)).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6)


def test_opaque_masks_are_replayed() -> None:
    site = make_site(Mask(opaque="it comes from a table"))
    assert Keep.refuse(site, KeepOptions()) is None
    mask = torch.rand(2, 1, 9, 9) > 0.3
    mask[..., 0] = True
    q, k, v = qkv(site, 9)
    expected = F.scaled_dot_product_attention(
        q, repeat(k), repeat(v), attn_mask=mask, scale=site.scale
    )
    assert torch.equal(Keep(site, KeepOptions())(q, k, v, (mask,))[0], expected)
    longer = F.pad(mask, (0, 5))
    assert torch.equal(Keep(site, KeepOptions())(q, k, v, (longer,))[0], expected)
