"""The learned soft hash: its cells, and its start from data."""

from __future__ import annotations

import pytest
import torch
from mixer_sites import make_site, qkv
from torch import Tensor

from rewriter.backends.reference.factored import outer
from rewriter.mixers.hybrid.hedgehog_window import HedgehogWindow, HedgehogWindowOptions
from rewriter.mixers.linear.features import HashMap, hash_factors, hash_pair
from rewriter.mixers.tokens import Tokens

WIDTH = 16


def core(bits: int, window: int = 1) -> HedgehogWindow:
    site = make_site(heads=(4, 2, WIDTH))
    options = HedgehogWindowOptions(window=window, sinks=0, initial_log_ratio=0.0, bits=bits)
    return HedgehogWindow(site, options).eval()


def wide(hashed: HashMap, x: Tensor) -> Tensor:
    return outer(hashed(x), hash_factors(hashed.weight.shape[-1]))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_features_are_the_probabilities_of_the_cells(bits: int) -> None:
    """Cell by cell from the bits of its number, the first bit the highest; they sum to 1."""
    mixer = core(bits)
    q, _, _ = qkv(mixer.site, 7)
    with torch.no_grad():
        mixer.map_q.bias.normal_()
        p = (q * mixer.map_q.factor @ mixer.map_q.weight + mixer.map_q.bias).sigmoid()
        expected = torch.ones(*p.shape[:-1], 2**bits)
        for cell in range(2**bits):
            for bit in range(bits):
                taken = cell >> (bits - 1 - bit) & 1
                expected[..., cell] *= 1 - p[..., bit] if taken else p[..., bit]
        found = wide(mixer.map_q, q)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


def test_weights_stated_for_training_are_those_of_the_output() -> None:
    mixer = core(6, window=3)
    q, k, v = qkv(mixer.site, 21)
    valid = torch.ones(q.shape[0], 21, dtype=torch.bool)
    valid[0, :4] = False
    x = Tokens(q, k, v, valid=valid)
    rows = mixer.attention_rows(x, slice(0, 21))
    out = x.shown(rows @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(out, mixer.mix(x)[0], atol=1e-5, rtol=1e-5)


def looking_back(n: int = 200) -> Tokens:
    """Every query of the second half looks, through a form and noise, at one early key."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(2, 2, n, WIDTH, generator=g)
    seen = torch.cat((k[:, :, : n // 2], k[:, :, : n // 2]), 2)
    root = torch.randn(2, WIDTH, WIDTH, generator=g) / WIDTH**0.5
    form = 0.3 * torch.eye(WIDTH) + root @ root.mT  # positive, so that the key itself wins
    q = 12 * (seen @ form + 0.1 * torch.randn(2, 2, n, WIDTH, generator=g))
    return Tokens(q.repeat_interleave(2, 1), k, torch.randn(2, 2, n, WIDTH, generator=g))


def agreement(mixer: HedgehogWindow, x: Tokens) -> float:
    """Share of the queries of the second half in the very cell of the key they look at."""
    half = x.count // 2
    of_q = wide(mixer.map_q, x.q[:, :, half:]).argmax(-1)
    of_k = wide(mixer.map_k, x.k[:, :, :half]).argmax(-1)
    return float((of_q == of_k.repeat_interleave(2, 1)).float().mean())


@torch.no_grad()
def test_a_fit_makes_queries_agree_with_the_keys_they_look_at() -> None:
    mixer, x = core(8), looking_back()
    before = agreement(mixer, x)
    mixer.fit(x, x.v)
    after = agreement(mixer, x)
    assert before < 0.3 < 0.5 < after
    cells = wide(mixer.map_k, x.k).argmax(-1).flatten(0, 1)
    assert all(len(set(row.tolist())) > 60 for row in cells)  # 200 keys are spread over 256


@torch.no_grad()
def test_a_fit_without_far_keys_changes_nothing() -> None:
    mixer = core(4, window=64)
    before = {n: p.clone() for n, p in mixer.state_dict().items()}
    q, k, v = qkv(mixer.site, 12)
    mixer.fit(Tokens(q, k, v), q)
    assert all(torch.equal(p, before[n]) for n, p in mixer.state_dict().items())


def test_more_bits_than_channels_are_drawn_and_not_fitted() -> None:
    site = make_site(heads=(4, 2, 3))
    options = HedgehogWindowOptions(window=1, sinks=0, bits=6)
    mixer = HedgehogWindow(site, options)
    before = mixer.map_k.weight.detach().clone()
    q, k, v = qkv(site, 12)
    mixer.fit(Tokens(q, k, v), q)
    assert torch.equal(mixer.map_k.weight, before)


def test_queries_and_keys_of_a_group_start_alike() -> None:
    for_q, for_k = hash_pair(make_site(heads=(4, 2, WIDTH)), 6, 0.7)
    assert torch.equal(for_q.weight, for_k.weight.repeat_interleave(2, 0))
