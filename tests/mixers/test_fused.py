"""fused is keep in another order of sums: equal to rounding, and keep itself where it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from mixer_sites import BOTH_WAYS, CAUSAL, bool_mask, float_mask, make_site, qkv
from torch import Tensor
from transformers import DynamicCache

from rewriter.ir.mask import Atom, Causal, KeyPadding, Mask, SymmetricWindow, Window
from rewriter.ir.site import AddTerm, AttentionSite, FillTerm, Scale, SinkTerm, Softcap
from rewriter.mixers.exact.fused import Fused, FusedOptions
from rewriter.mixers.exact.keep import Keep, KeepOptions

pytestmark = pytest.mark.usefixtures("generated_kernels")

N = 37
WINDOWED: tuple[Atom, ...] = (Causal(), Window(9))
SITES: dict[str, AttentionSite] = {
    "causal": make_site(heads=(4, 2, 16)),
    "eager": make_site(heads=(4, 2, 16), spelling="eager"),
    "window": make_site(Mask((*WINDOWED, KeyPadding())), heads=(4, 2, 16)),
    "both ways": make_site(BOTH_WAYS, heads=(4, 2, 16)),
    "local both ways": make_site(Mask((SymmetricWindow(4), KeyPadding())), heads=(4, 2, 16)),
    "softcap": make_site(
        heads=(4, 2, 16),
        spelling="eager",
        score=(Scale(0.25), Softcap(3.0), FillTerm(0, -math.inf, keep=True)),
    ),
}


def pair(site: AttentionSite, layer: int | None = None) -> tuple[Fused, Keep]:
    return Fused(site, FusedOptions(), layer).eval(), Keep(site, KeepOptions(), layer).eval()


def mask_for(site: AttentionSite, valid: Tensor, seen: int = 0) -> Tensor:
    atoms = tuple(a for a in site.mask.atoms if not isinstance(a, KeyPadding))
    total = valid.shape[1]
    keys = torch.arange(total)
    allow = Mask(atoms).dense(torch.arange(seen, total), keys)[None, None]
    mask = allow & valid[:, None, None, :]
    return mask if site.spelling == "sdpa" or "Fill" in str(site.score) else float_mask(mask)


def every(batch: int = 2, n: int = N) -> Tensor:
    return torch.ones(batch, n, dtype=torch.bool)


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("padding", ["no mask", "none", "right", "left"])
def test_equals_the_original(name: str, padding: str, served: list[str]) -> None:
    site = SITES[name]
    fused, keep = pair(site)
    q, k, v = qkv(site, N)
    valid = every()
    if padding == "right":
        valid[1, 20:] = False
    if padding == "left":
        valid[1, :11] = False
    terms = (None if padding == "no mask" else mask_for(site, valid),)
    got, expected = fused(q, k, v, terms)[0], keep(q, k, v, terms)[0]
    rows = valid[:, None, :].expand(2, 4, N)
    torch.testing.assert_close(got[rows], expected[rows], rtol=1e-5, atol=1e-5)
    # Left padding has no key lengths, and some spellings hide nothing without their mask tensor.
    bare = padding == "no mask" and name in ("eager", "softcap", "local both ways")
    assert served == ([] if padding == "left" or bare else ["cpu"])


@pytest.mark.parametrize("name", ["causal", "window", "softcap"])
@pytest.mark.parametrize("masked", [False, True])
def test_with_a_cache(name: str, masked: bool, served: list[str]) -> None:
    site = SITES[name]
    fused, keep = pair(site, layer=0)
    q, k, v = qkv(site, N)
    caches = DynamicCache(), DynamicCache()
    at = 0
    for new in (30, 1, 1, 1, 1, 3):
        piece = slice(at, at + new)
        term = mask_for(site, every(n=at + new), at) if masked else None
        outs = [
            core(q[:, :, piece], k[:, :, piece], v[:, :, piece], (term,), cache)[0]
            for core, cache in zip((fused, keep), caches, strict=True)
        ]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
        at += new
    # Masked tokens together and a mask that is missing but needed leave it to the original.
    fallback = {
        ("window", True): 1,
        ("softcap", True): 1,
        ("causal", True): 1,
        ("softcap", False): 6,
    }
    assert served == ["cpu"] * (6 - fallback.get((name, masked), 0))


def gradients_agree(
    site: AttentionSite, terms: tuple[Tensor | None, ...], trained: Sequence[Tensor] = ()
) -> None:
    """Those of q, k, v and of `trained`, which are among the terms."""
    results = []
    for core in pair(site):
        tensors = [x.requires_grad_() for x in (*qkv(site, N), *trained)]
        out = core(*tensors[:3], terms)[0]
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append(torch.autograd.grad((out * weight).sum(), tensors))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal(served: list[str]) -> None:
    gradients_agree(SITES["causal"], (None,))
    assert served == ["cpu"]


def test_bfloat16(served: list[str]) -> None:
    site = SITES["causal"]
    fused, keep = pair(site)
    q, k, v = qkv(site, N)
    got = fused(q.bfloat16(), k.bfloat16(), v.bfloat16(), (None,))[0]
    torch.testing.assert_close(got.float(), keep(q, k, v, (None,))[0], rtol=2e-2, atol=2e-2)
    assert served == ["cpu"]


def test_what_needs_the_original_gets_it(served: list[str]) -> None:
    """Custom masks, float64, dropout in training: bit for bit."""
    site = SITES["eager"]
    fused, keep = pair(site)
    q, k, v = qkv(site, N)
    packed = bool_mask(every()) & (torch.arange(N)[:, None] // 12 == torch.arange(N) // 12)
    assert torch.equal(
        fused(q, k, v, (float_mask(packed),))[0], keep(q, k, v, (float_mask(packed),))[0]
    )
    wide = [core(q.double(), k.double(), v.double(), (None,))[0] for core in (fused, keep)]
    assert torch.equal(*wide)
    dropping = make_site(heads=(4, 2, 16), dropout=0.5)
    core = Fused(dropping, FusedOptions()).train()
    core(q, k, v, (None,))
    assert served == []


def test_refusals() -> None:
    opaque = make_site(Mask((), "it was not understood"))
    assert "opaque" in (Fused.refuse(opaque, FusedOptions()) or "")
    looking_back = make_site(CAUSAL, cross=True)
    assert "cross" in (Fused.refuse(looking_back, FusedOptions()) or "")
    assert Fused.refuse(make_site(), FusedOptions()) is None


BIASED: dict[str, AttentionSite] = {
    "bias beside a mask": make_site(
        spelling="eager",
        score=(Scale(0.25), AddTerm(0), AddTerm(1)),
        terms=("mask", "bias"),
        heads=(4, 2, 16),
    ),
    "scaled later": make_site(
        BOTH_WAYS,
        spelling="eager",
        score=(AddTerm(0), AddTerm(1), Scale(0.25)),
        terms=("mask", "bias"),
        heads=(4, 2, 16),
    ),
    "in one tensor": make_site(spelling="eager", terms=("mask_and_bias",), heads=(4, 2, 16)),
    "both ways": make_site(BOTH_WAYS, "eager", terms=("mask_and_bias",), heads=(4, 2, 16)),
}


def bias_terms(name: str, valid: Tensor) -> tuple[Tensor, ...]:
    site = BIASED[name]
    bias = torch.randn(1, 4, N, N, generator=torch.Generator().manual_seed(3))
    mask = mask_for(site, valid)
    mask = mask if mask.is_floating_point() else float_mask(mask)
    return (mask + bias,) if len(site.terms) == 1 else (mask, bias)


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_a_bias_enters_the_scores(name: str, padding: str, served: list[str]) -> None:
    fused, keep = pair(BIASED[name])
    q, k, v = qkv(BIASED[name], N)
    valid = every()
    if padding != "none":
        valid[1, slice(20, None) if padding == "right" else slice(11)] = False
    terms = bias_terms(name, valid)
    got, expected = fused(q, k, v, terms)[0], keep(q, k, v, terms)[0]
    rows = valid[:, None, :].expand(2, 4, N)
    torch.testing.assert_close(got[rows], expected[rows], rtol=1e-5, atol=1e-5)
    # A tensor of mask and bias is added as it is, wherever the padding is.
    assert served == ([] if padding == "left" and len(terms) == 2 else ["cpu"])


def test_hidden_keys_of_any_value_stay_hidden(served: list[str]) -> None:
    """-inf, the dtype's least number, and a mask of the model's own that the site never had."""
    site = BIASED["in one tensor"]
    fused, keep = pair(site)
    q, k, v = qkv(site, N)
    bias = torch.randn(1, 4, N, N)
    for hidden in (-math.inf, torch.finfo(torch.float32).min, -1e9):
        odd = (torch.arange(N)[:, None] - torch.arange(N)) % 3 == 0
        terms = (bias.masked_fill(~odd, hidden),)
        torch.testing.assert_close(
            fused(q, k, v, terms)[0], keep(q, k, v, terms)[0], rtol=1e-5, atol=1e-5
        )
    assert served == ["cpu"] * 3


def test_a_trained_bias_gets_its_gradient(served: list[str]) -> None:
    mask, bias = bias_terms("bias beside a mask", every())
    gradients_agree(BIASED["bias beside a mask"], (mask, bias), [bias])
    assert served == ["cpu"]


def test_a_missing_bias_is_left_to_the_original(served: list[str]) -> None:
    site = BIASED["bias beside a mask"]
    fused, keep = pair(site)
    q, k, v = qkv(site, N)
    assert torch.equal(fused(q, k, v, (None, None))[0], keep(q, k, v, (None, None))[0])
    assert served == []


SUNK = make_site(
    Mask((*WINDOWED, KeyPadding())),
    spelling="eager",
    score=(Scale(0.25), AddTerm(0), SinkTerm(1)),
    terms=("mask", "sink"),
    heads=(4, 2, 16),
)


def test_a_sink_takes_its_share_with_and_without_a_cache(served: list[str]) -> None:
    fused, keep = pair(SUNK, layer=0)
    q, k, v = qkv(SUNK, N)
    sink = torch.randn(4).reshape(1, -1, 1, 1)
    caches = DynamicCache(), DynamicCache()
    at = 0
    for new in (30, 1, 1, 1):
        piece = slice(at, at + new)
        mask = float_mask(mask_for(SUNK, every(n=at + new), at) == 0)
        terms = (mask, sink.expand(2, 4, new, 1))
        outs = [
            core(q[:, :, piece], k[:, :, piece], v[:, :, piece], terms, cache)[0]
            for core, cache in zip((fused, keep), caches, strict=True)
        ]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
        at += new
    assert served == ["cpu"] * 4


def test_a_sink_of_every_query_is_left_to_the_original(served: list[str]) -> None:
    fused, keep = pair(SUNK)
    q, k, v = qkv(SUNK, N)
    terms = (mask_for(SUNK, every()), torch.randn(1, 4, N, 1))
    assert torch.equal(fused(q, k, v, terms)[0], keep(q, k, v, terms)[0])
    assert served == []


@pytest.mark.parametrize("new", [1, 5, 60])
@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["no mask", "none", "right", "left"])
def test_another_sequence(new: int, spelling: str, padding: str, served: list[str]) -> None:
    site = make_site(Mask((KeyPadding(),)), spelling, heads=(4, 2, 16), cross=True)
    fused, keep = pair(site)
    q, (_, k, v) = qkv(site, new)[0], qkv(site, N, seed=1)
    valid = every()
    if padding in ("right", "left"):
        valid[1, slice(20, None) if padding == "right" else slice(11)] = False
    allow = valid[:, None, None, :]
    mask = allow if spelling == "sdpa" else float_mask(allow)
    terms = (None if padding == "no mask" else mask,)
    got, expected = fused(q, k, v, terms)[0], keep(q, k, v, terms)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert served == ([] if padding == "left" else ["cpu"])


def test_a_mask_that_differs_between_queries_of_another_sequence(served: list[str]) -> None:
    site = make_site(Mask((KeyPadding(),)), heads=(4, 2, 16), cross=True)
    fused, keep = pair(site)
    q, (_, k, v) = qkv(site, 5)[0], qkv(site, N, seed=1)
    allow = (torch.arange(N) - torch.arange(5)[:, None])[None, None] >= 0
    assert torch.equal(fused(q, k, v, (allow,))[0], keep(q, k, v, (allow,))[0])
    assert served == []
