"""What the catalogue warns of, section by section, where no other file tests it already.

Elsewhere: corrections with long keys, gates that forget everything, outputs that grow with the text
(test_gated_recurrences), phases of long texts (test_s4d), open blocks (test_kept_keys_and_skips).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixer_sites import BOTH_WAYS, make_site

from rewriter.ir.state import State
from rewriter.mixers.base import Mixer
from rewriter.mixers.channel.base import Dense
from rewriter.mixers.channel.lowrank_mlp import LowRankMlp
from rewriter.mixers.channel.monarch_mlp import MonarchMlp
from rewriter.mixers.linear.features import FLOOR
from rewriter.mixers.registry import get
from rewriter.mixers.tokens import Tokens
from rewriter.passes.verify.cores import sample

SITE = make_site(heads=(4, 2, 16), hidden_dim=24)
RECURRENT = ("hedgehog", "gla", "retnet", "gated_deltanet", "mamba2", "rwkv7", "s4d")


def build(name: str, site: Any = SITE, **options: Any) -> Mixer:
    return get(name)(site, get(name).Options(**options), layer=0).eval()


def low(x: Tokens) -> Tokens:
    assert x.hidden is not None
    return Tokens(*(t.bfloat16() for t in (x.q, x.k, x.v, x.hidden)))


def fresh(mixer: Mixer, dtype: torch.dtype = torch.float32) -> State:
    spec = mixer.state_spec(mixer.site, mixer.options)
    return spec.new(mixer.site, 2, dtype, torch.device("cpu"))


@pytest.mark.parametrize("name", RECURRENT)
def test_sums_over_a_text_are_float32_in_a_bfloat16_model(name: str) -> None:
    """In bfloat16 a running normaliser stops at 0.4 of its value after 4,096 tokens."""
    mixer = copy.deepcopy(build(name)).bfloat16()
    start = fresh(mixer, torch.bfloat16)
    summed = [n for n, t in start.items() if t.dtype == torch.float32]
    assert summed
    with torch.no_grad():
        _, after = mixer.mix(replace(low(sample(SITE, 9)), state=start))
    assert after is not None and all(after[n].dtype == torch.float32 for n in summed)


def test_features_keep_what_bfloat16_would_round_away() -> None:
    """hedgehog: at |x| near 8 most features lie below 2^-8 of the largest."""
    mixer = build("hedgehog")
    x = 8.0 * torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    features = mixer.map_q(x.bfloat16())  # type: ignore[operator]
    assert features.dtype == torch.float32
    assert float(features.min()) >= FLOOR and bool(features.isfinite().all())


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_a_strong_decay_overflows_nowhere(name: str) -> None:
    """A log decay of -1 over 256 tokens is e^256 if anything divides by it."""
    mixer = build(name)
    with torch.no_grad():
        mixer.decay.log_rate.fill_(3.0)  # type: ignore[union-attr, operator]
        x = sample(SITE, 300)
        x = replace(x, v=x.v.requires_grad_())
        with torch.enable_grad():
            out, _ = mixer.mix(x)
            (grad,) = torch.autograd.grad(out.square().sum(), x.v)
    assert bool(out.isfinite().all()) and bool(grad.isfinite().all())


def test_rwkv7_forgets_no_faster_than_a_chunk_can_bear() -> None:
    """However strong the gate, at least 0.545 of a channel stays, so 64 tokens stay in fp32."""
    mixer = build("rwkv7")
    kept = []
    with torch.no_grad():
        for bias in (1e4, -1e4):
            mixer.forget.bias.fill_(bias)  # type: ignore[union-attr, operator]
            mixer.erase.bias.fill_(-1e4)  # type: ignore[union-attr, operator]
            x = sample(SITE, 2)
            x = replace(x, v=torch.where(torch.arange(2)[:, None] < 1, x.v, 0.0))
            norms = []
            for n in (1, 2):
                _, after = mixer.mix(replace(x.cut(0, n), state=fresh(mixer)))
                assert after is not None
                norms.append(float(after["S"].norm()))
            kept.append(norms[1] / norms[0])
    assert kept[0] == pytest.approx(0.5453, abs=1e-3) and kept[1] == pytest.approx(1.0)


def test_retnet_starts_with_the_published_decays() -> None:
    rates = -build("retnet").log_rate.exp()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(rates.exp(), 1 - torch.tensor([2.0**-5, 2.0**-6]))


def test_hydra_with_no_decay_is_linear_attention_with_a_free_diagonal() -> None:
    site = make_site(BOTH_WAYS, heads=(4, 2, 16), hidden_dim=24)
    mixer = build("hydra", site, taps=1)
    with torch.no_grad():
        for rate in (mixer.ahead, mixer.back):
            rate.log_rate.fill_(-60.0)  # type: ignore[union-attr, operator]
        x = sample(site, 3)
        out = mixer.mix(x)[0]
        # The middle of three tokens reads the first with its own query moved by one place.
        k, v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
        before = (x.q[:, :, 0] * k[:, :, 0]).sum(-1, keepdim=True) * site.scale * v[:, :, 0]
        behind = (x.q[:, :, 2] * k[:, :, 2]).sum(-1, keepdim=True) * site.scale * v[:, :, 2]
        wanted = before + behind + v[:, :, 1]
        wanted = wanted * torch.rsqrt(wanted.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(out[:, :, 1], wanted, atol=1e-4, rtol=1e-4)


def test_sigmoid_weights_stay_finite_and_keep_their_bias_in_bfloat16() -> None:
    """-ln n has a rounding error of 2^-8 in bfloat16, which would scale every weight."""
    mixer = build("sigmoid_attention")
    x = sample(SITE, 300)
    with torch.no_grad():
        large = replace(x, q=100 * x.q)
        assert bool(mixer.mix(large)[0].isfinite().all())
        small = replace(x, q=0.0 * x.q)
        near, exact = mixer.mix(low(small))[0].float(), mixer.mix(small)[0]
    assert float((near - exact).norm() / exact.norm()) < 0.01


def test_of_equal_blocks_moba_reads_the_earlier() -> None:
    mixer = build("moba", block=4, blocks=2)
    x = sample(SITE, 16)
    x = replace(x, k=torch.ones_like(x.k), q=torch.ones_like(x.q))
    v = x.v.clone()
    v[:, :, 4:12] += 5.0  # the second and third block
    with torch.no_grad():
        out, other = (mixer.mix(t)[0][:, :, 12:] for t in (x, replace(x, v=v)))
    torch.testing.assert_close(out, other)


@pytest.mark.parametrize("mixer", [LowRankMlp, MonarchMlp])
def test_channels_that_were_never_seen_are_not_free(mixer: Any) -> None:
    """A second moment with zeros has no inverse, and a structure could put anything there."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    x = torch.randn(512, 16, generator=generator)
    x[:, 8:] = 0.0
    options = mixer.Options(ratio=0.9)
    dense = mixer.prepare(options, Dense(weight, x.mT @ x / len(x)))
    core = mixer.structure(24, 16, mixer.sizes(options, dense))
    core.fit(dense)
    unseen = torch.randn(64, 16, generator=generator)
    with torch.no_grad():
        got, wanted = core(unseen), unseen @ weight.mT
    assert float((got - wanted).norm() / wanted.norm()) < 1.0


def test_a_prime_width_has_blocks_too() -> None:
    sizes = MonarchMlp.sizes(MonarchMlp.Options(), Dense(torch.randn(24, 17)))
    core = MonarchMlp.structure(24, 17, sizes)
    core.fit(Dense(torch.randn(24, 17)))
    assert core(torch.randn(2, 17)).shape == (2, 24)
    with pytest.raises(ValueError, match="do not divide"):
        MonarchMlp.structure(24, 17, {"inner": 2, "outer": 2, "rank": 1})
