"""What the gated recurrences promise beyond their formulas: contracts, neutral starts, hazards."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import Agreement
from mixer_sites import BOTH_WAYS, CAUSAL, bool_mask, make_site
from transformers import DynamicCache

from rewriter.ir.mask import Causal, Mask, Window
from rewriter.ir.site import Scale
from rewriter.ir.state import TOKENS, bindings
from rewriter.mixers.base import Mixer
from rewriter.mixers.linear.gla import Gla
from rewriter.mixers.registry import get
from rewriter.mixers.shared.recurrent import GatedRecurrence
from rewriter.mixers.ssm.hydra import Hydra, HydraOptions
from rewriter.mixers.tokens import Tokens, run
from rewriter.passes.verify.cores import check_core, sample

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gla": ("gla", {"rank": 4}),
    "retnet": ("retnet", {}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet-silu": ("gated_deltanet", {"activation": "silu", "conv": 3}),
    "rwkv7": ("rwkv7", {"rank": 4}),
    "mamba2": ("mamba2", {}),
    "mamba2-published": ("mamba2", {"start": "published"}),
    "mamba2-discrete": ("mamba2", {"form": "discrete", "conv": 1}),
    "s4d": ("s4d", {"modes": 6}),
    "s4d-published": ("s4d", {"modes": 6, "start": "published"}),
}
NAMES = sorted({name for name, _ in KINDS.values()})
SITE = make_site(heads=(4, 2, 16), hidden_dim=24)


def build(kind: str, moved: float = 0.3) -> Mixer:
    """A mixer whose parameters are away from their start."""
    name, options = KINDS[kind]
    cls = get(name)
    mixer = cls(SITE, cls.Options(**options), layer=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return mixer.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_core_contracts(kind: str) -> None:
    results = list(check_core(build(kind), kind))
    assert {r.check: r.detail for r in results if r.outcome == "fail"} == {}
    assert len([r for r in results if r.outcome == "pass"]) >= 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_with_left_padding(kind: str) -> None:
    mixer = build(kind)
    x = sample(SITE, 20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :6] = False
    with torch.no_grad():
        whole, _ = mixer.mix(replace(x, valid=valid))
        cache, at = DynamicCache(), 0
        for n in (9, 1, 1, 7, 2):
            piece = x.cut(at, at + n)
            mask = bool_mask(valid[:, : at + n], at)
            out, _ = mixer(piece.q, piece.k, piece.v, (mask,), cache, hidden=piece.hidden)
            torch.testing.assert_close(out, whole[:, :, at : at + n], atol=1e-4, rtol=1e-4)
            at += n
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("kind", KINDS)
def test_copies_state_dicts_dtypes_and_sizes(kind: str) -> None:
    mixer = build(kind)
    x = sample(SITE, 12)
    out, _ = mixer.mix(x)
    fresh = type(mixer)(SITE, mixer.options)
    fresh.load_state_dict(mixer.state_dict())
    assert torch.equal(fresh.mix(x)[0], out)
    low = copy.deepcopy(mixer).bfloat16()
    half = Tokens(*(t.bfloat16() for t in (x.q, x.k, x.v, x.stream)))
    got = low.mix(half)[0]
    assert got.dtype == torch.bfloat16
    assert float((got.float() - out).norm() / out.norm()) < 0.1
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    spec = mixer.state_spec(SITE, mixer.options)
    state = spec.new(SITE, 3, torch.float32, torch.device("cpu"))
    measured = sum(t.numel() * t.element_size() for t in state.values())
    assert spec.bytes(4).subs(bindings(SITE, 3)) == measured
    assert TOKENS not in spec.bytes().free_symbols
    cost = mixer.flops(SITE, mixer.options)
    assert cost.subs(bindings(SITE, 1, 200)) == 2 * cost.subs(bindings(SITE, 1, 100))


@pytest.mark.parametrize("kind", ["gla", "gated_deltanet", "rwkv7", "mamba2", "mamba2-discrete"])
def test_the_start_forgets_slowly(kind: str) -> None:
    """What was stored 400 tokens ago is still there; fresh gates would keep it for some ten.

    The delta rule overwrites what lies along new keys, so these are orthogonal to the first.
    """
    mixer = build(kind, moved=0.0)
    x = sample(SITE, 400, batch=1)
    k, v = x.k.clone(), torch.zeros_like(x.v)
    k[:, :, 0], k[:, :, 1:, 0] = 4.0 * torch.eye(16)[0], 0.0
    v[:, :, 0] = x.v[:, :, 0]
    norms = []
    for tokens in (1, 400):
        state = mixer.state_spec(SITE, mixer.options).new(
            SITE, 1, torch.float32, torch.device("cpu")
        )
        _, after = mixer.mix(replace(replace(x, k=k, v=v).cut(0, tokens), state=state))
        assert after is not None
        norms.append(float(after["S"].norm()))
    assert norms[1] > 0.3 * norms[0]


def test_neutral_mamba2_is_linear_attention() -> None:
    """Before its norm the neutral start is what q, k and v gave as linear attention."""
    mixer = build("mamba2-discrete", moved=0.0)
    x = sample(SITE, 30)
    k, v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    weights = (x.q @ k.transpose(-1, -2) * SITE.scale).tril()
    error = (mixer.mix(x)[0] - weights @ v).norm() / (weights @ v).norm()
    assert error < 0.05  # sigmoid(6) to the power of up to 30 tokens


@pytest.mark.parametrize("kind", ["gated_deltanet", "rwkv7"])
def test_corrections_stay_finite(kind: str) -> None:
    """Long keys make the delta rule overflow unless they are normalised."""
    mixer = build(kind)
    x = sample(SITE, 512, batch=1)
    out, _ = mixer.mix(replace(x, k=40 * x.k))
    assert bool(out.isfinite().all())
    assert float(out.abs().max()) < 1e4


def test_the_size_of_an_output_does_not_grow_with_the_text() -> None:
    x = sample(SITE, 256, batch=1)
    for kind in ("gla", "retnet", "gated_deltanet", "mamba2"):
        out, _ = build(kind, moved=0.0).mix(x)
        assert float(out[:, :, -1].square().mean()) < 4 * float(out[:, :, 8].square().mean()) + 1


def test_gates_overflow_nowhere() -> None:
    """Strong gates forget everything: exponents stay negative, so nothing overflows."""
    mixer = build("gla", moved=0.0)
    assert isinstance(mixer, Gla)
    mixer.forget.bias.data.fill_(-2000.0)
    x = sample(SITE, 130)
    out, _ = mixer.mix(x)
    own = F.rms_norm(
        (x.q * x.k.repeat_interleave(2, 1)).sum(-1, keepdim=True)
        * SITE.scale
        * x.v.repeat_interleave(2, 1),
        (16,),
        eps=1e-5,
    )
    torch.testing.assert_close(out, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gla", "retnet", "gated_deltanet", "mamba2", "rwkv7", "s4d"])
def test_fit_moves_towards_the_teacher(kind: str) -> None:
    mixer = build(kind, moved=0.0)
    x = sample(SITE, 64)
    k, v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    teacher = F.scaled_dot_product_attention(x.q, k, v, is_causal=True, scale=SITE.scale)
    with torch.no_grad():
        before = (mixer.mix(x)[0] - teacher).norm()
        mixer.fit(x, teacher)
        after = (mixer.mix(x)[0] - teacher).norm()
    assert after < before
    assert after <= teacher.norm()


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str) -> None:
    cls = get(name)

    def reason(mask: Mask = CAUSAL, **facts: Any) -> str:
        return cls.refuse(make_site(mask, **{"hidden_dim": 24, **facts}), cls.Options()) or ""

    assert reason() == ""
    assert "one tensor" in reason(hidden_dim=0)
    if "bidirectional" not in cls.info.directions:
        assert "bidirectional" in reason(BOTH_WAYS)
    assert "window mask" in reason(Mask((Causal(), Window(8))))
    assert "opaque" in reason(Mask(opaque="unknown table"))
    assert "bias" in reason(terms=("mask_and_bias",))
    assert reason(score=(Scale(0.3),), terms=()) == ""


def test_a_call_without_the_stream_says_so() -> None:
    x = sample(SITE, 5)
    with pytest.raises(Exception, match="input of the projections"):
        build("gla")(x.q, x.k, x.v, (None,))
    retnet = build("retnet")
    assert isinstance(retnet, GatedRecurrence)
    read, _ = run(retnet.spec, x, decay=torch.tensor([-0.1, -0.2]))
    assert read.shape == x.q.shape


BOTH = make_site(BOTH_WAYS, heads=(4, 2, 16), hidden_dim=24)


def bidirectional(taps: int = 3) -> Hydra:
    mixer = Hydra(BOTH, HydraOptions(taps=taps))
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return mixer.eval()


@pytest.mark.parametrize("taps", [1, 3])
def test_hydra_contracts(taps: int) -> None:
    results = list(check_core(bidirectional(taps), "hydra"))
    assert {r.check: r.detail for r in results if r.outcome == "fail"} == {}


@pytest.mark.parametrize("n", [1, 13])
def test_hydra_is_its_matrix(n: int, agree: Agreement) -> None:
    """The quasiseparable matrix of the paper, entry by entry in float64."""
    mixer = bidirectional(taps=1)
    x = sample(BOTH, n)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    out = mixer.mix(x)[0]
    rates = {True: mixer.ahead(x.stream), False: mixer.back(x.stream)}
    wanted = torch.zeros(2, 4, n, 16, dtype=torch.float64)
    diagonal = mixer.diagonal(x.stream).double()
    for h in range(4):
        q, k, v = x.q[:, h].double(), x.k[:, h // 2].double(), x.v[:, h // 2].double()
        for i in range(n):
            wanted[:, h, i] = diagonal[:, i, h, None] * v[:, i]
            for j in range(n):
                if j == i:
                    continue
                before = j < i
                reader = i - 1 if before else i + 1
                gain = 1.0 if before else mixer.back_gain[h].double()
                score = (q[:, reader] * gain * k[:, j]).sum(-1) * BOTH.scale
                rate, step = rates[before]
                between = slice(j + 1, i) if before else slice(i + 1, j)
                kept = rate[:, h // 2, between].double().sum(-1).exp()
                weight = score * kept * step[:, h // 2, j]
                wanted[:, h, i] += weight[:, None] * v[:, j]
    normed = F.rms_norm(wanted, (16,), eps=1e-5) * mixer.norm.weight[:, None]
    normed = normed * mixer.gate(x.stream)
    agree.both("hydra", out, normed, leaves[2:] if n == 1 else leaves)


def test_hydra_serves_encoders_alone() -> None:
    assert Hydra.refuse(BOTH, HydraOptions()) is None
    assert "causal" in (Hydra.refuse(SITE, HydraOptions()) or "")
    assert "odd" in (Hydra.refuse(BOTH, HydraOptions(taps=4)) or "")
