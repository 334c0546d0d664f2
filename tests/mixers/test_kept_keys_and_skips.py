"""sigmoid_attention, duo, razor, linear_shortcut and drop: oracles, limits, contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import Agreement
from mixer_sites import BOTH_WAYS, CAUSAL, bool_mask, make_site
from torch import Tensor
from transformers import DynamicCache

from rewriter.ir.kernels import WindowAttention
from rewriter.ir.mask import Causal, Mask, Window
from rewriter.ir.site import Scale, Softcap
from rewriter.mixers.base import Mixer
from rewriter.mixers.registry import get
from rewriter.mixers.tokens import Tokens
from rewriter.passes.verify.cores import check_core, sample

SITE = make_site(heads=(4, 2, 16), hidden_dim=24)
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid_attention": {},
    "duo": {"full": (1,), "window": 6, "sinks": 2},
    "razor": {"full": (1,), "window": 6, "sinks": 2},
    "moba": {"block": 8, "blocks": 2},
    "linear_shortcut": {},
    "drop": {},
}
SHAPES = [(1, 2, 2, 9, 8), (2, 4, 2, 37, 16), (1, 6, 2, 70, 24)]


def build(name: str, site=SITE, moved: float = 0.3, **options: Any) -> Mixer:
    cls = get(name)
    chosen = cls.Options(**{**KINDS[name], **options})
    assert cls.refuse(site, chosen) is None
    mixer = cls(site, chosen, layer=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return mixer.eval()


@pytest.mark.parametrize("name", KINDS)
def test_core_contracts(name: str) -> None:
    results = list(check_core(build(name), name))
    assert {r.check: r.detail for r in results if r.outcome == "fail"} == {}


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_with_left_padding(name: str) -> None:
    mixer = build(name)
    x = sample(SITE, 20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :6] = False
    with torch.no_grad():
        whole = mixer(x.q, x.k, x.v, (bool_mask(valid),), hidden=x.hidden)[0]
        cache, at = DynamicCache(), 0
        for n in (9, 1, 1, 7, 2):
            piece = x.cut(at, at + n)
            mask = bool_mask(valid[:, : at + n], at)
            out, _ = mixer(piece.q, piece.k, piece.v, (mask,), cache, hidden=piece.hidden)
            torch.testing.assert_close(out, whole[:, :, at : at + n], atol=1e-5, rtol=1e-5)
            at += n
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", ["row", "constant"])
@pytest.mark.parametrize("mask", [CAUSAL, BOTH_WAYS])
def test_sigmoid_attention_written_out(shape: Any, bias: str, mask: Mask, agree: Agreement) -> None:
    """Dense torch in float64, from the published formula."""
    B, H, Hkv, N, D = shape
    site = make_site(mask, heads=(H, Hkv, D), hidden_dim=24)
    mixer = build("sigmoid_attention", site, bias=bias, length=512)
    x = sample(site, N, batch=B)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    got = mixer.mix(Tokens(*leaves))[0]
    q, k, v = (t.double() for t in leaves)
    k, v = (t.repeat_interleave(H // Hkv, 1) for t in (k, v))
    allowed = torch.ones(N, N).tril() if mask is CAUSAL else torch.ones(N, N)
    count = allowed.sum(-1) if bias == "row" else torch.full((N,), 512.0)
    shift = mixer.shift.double()[:, None, None] - count.double().log()[:, None]
    weights = torch.sigmoid(q @ k.mT * site.scale + shift) * allowed
    wanted = (weights @ v) * mixer.norm.weight.double()[:, None]
    agree.both("sigmoid_attention", got, wanted, leaves)


def test_untrained_sigmoid_is_softmax_for_small_scores() -> None:
    x = sample(SITE, 60)
    small = Tokens(0.1 * x.q, x.k, x.v)
    k, v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    wanted = F.scaled_dot_product_attention(small.q, k, v, is_causal=True, scale=SITE.scale)
    out = build("sigmoid_attention", moved=0.0).mix(small)[0][:, :, 20:]
    assert float((out - wanted[:, :, 20:]).norm() / wanted[:, :, 20:].norm()) < 0.15


def dense(x: Tokens, allowed: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(x.q.shape[1] // x.k.shape[1], 1) for t in (x.k, x.v))
    return F.scaled_dot_product_attention(x.q, k, v, allowed, scale=SITE.scale)


@pytest.mark.parametrize(("mask", "n"), [(CAUSAL, 50), (BOTH_WAYS, 37), (CAUSAL, 5)])
def test_a_sink_window_is_softmax_with_a_mask(mask: Mask, n: int, agree: Agreement) -> None:
    cls = get("sink_window")
    x = sample(SITE, n)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    got = cls(make_site(mask, heads=(4, 2, 16)), cls.Options(window=6, sinks=2)).mix(x)[0]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    near = (distance.abs() < 6) | (torch.arange(n) < 2)
    wanted = dense(x, near & (distance >= 0) if mask is CAUSAL else near)
    agree.both("sink_window", got, wanted, leaves)


@pytest.mark.parametrize("full", [(), (0,), (1,), (0, 1)])
def test_duo_is_softmax_with_a_mask_per_head(full: tuple[int, ...], agree: Agreement) -> None:
    x = sample(SITE, 50)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    i, j = torch.arange(50)[:, None], torch.arange(50)
    near = (j <= i) & ((i - j < 6) | (j < 2))
    allowed = torch.stack([(j <= i) if h // 2 in full else near for h in range(4)])
    got, wanted = build("duo", full=full).mix(Tokens(*leaves))[0], dense(x, allowed)
    agree.both("duo", got, wanted, leaves)


@pytest.mark.parametrize(("full", "window", "sinks"), [((1,), 6, 2), ((), 9, 0), ((), 50, 4)])
def test_razor_puts_the_mean_in_the_place_of_each_hidden_key(
    full: tuple[int, ...], window: int, sinks: int, agree: Agreement
) -> None:
    """Full softmax in float64, every key before the window replaced by the mean of all such."""
    x = sample(SITE, 50)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    got = build("razor", full=full, window=window, sinks=sinks).mix(Tokens(*leaves))[0]
    q, k, v = (t.double() for t in leaves)
    rows = []
    for h in range(4):
        for i in range(50):
            keys, values = k[:, h // 2, : i + 1].clone(), v[:, h // 2, : i + 1].clone()
            if h // 2 not in full and i - window >= sinks:
                gone = slice(sinks, i - window + 1)
                keys[:, gone] = keys[:, gone].mean(1, keepdim=True)
                values[:, gone] = values[:, gone].mean(1, keepdim=True)
            weight = (keys @ q[:, h, i, :, None] * SITE.scale).softmax(1)
            rows.append((weight * values).sum(1))
    wanted = torch.stack(rows, 1).unflatten(1, (4, 50))
    agree.both("razor", got, wanted, leaves)


def test_razor_without_retrieval_heads_is_bounded() -> None:
    mixer = build("razor", full=())
    spec = mixer.state_spec(SITE, mixer.options)
    assert spec.bounded
    assert {"rest_k", "rest_v", "rest"} < {t.name for t in spec.tensors}
    with pytest.raises(ValueError, match="plain causal window"):
        WindowAttention(4, 1, True, 1.0, softcap=3.0, mean=True)


@pytest.mark.parametrize(("block", "top", "n"), [(8, 2, 50), (4, 3, 33), (16, 1, 40), (8, 9, 40)])
def test_moba_is_softmax_over_the_chosen_blocks(
    block: int, top: int, n: int, agree: Agreement
) -> None:
    """The rule of the paper, query by query; softmax and gradients by torch."""
    x = sample(SITE, n)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    allowed = torch.zeros(2, 4, n, n, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            for i in range(n):
                own = i // block
                means = [x.k[b, h // 2, c * block : (c + 1) * block].mean(0) for c in range(own)]
                scores = [float(x.q[b, h, i] @ m) for m in means]
                order = sorted(range(own), key=lambda c: -scores[c])[: top - 1]
                for c in [*order, own]:
                    allowed[b, h, i, c * block : min((c + 1) * block, i + 1)] = True
    got = build("moba", block=block, blocks=top).mix(Tokens(*leaves))[0]
    wanted = dense(x, allowed)
    agree.both("moba", got, wanted, leaves)


def test_moba_never_scores_an_open_block() -> None:
    """What comes later in a query's own block changes nothing, also as part of a mean."""
    mixer, x = build("moba"), sample(SITE, 40)
    before = mixer.mix(x)[0]
    k = x.k.clone()
    k[:, :, 21:24] += 50.0
    after = mixer.mix(Tokens(x.q, k, x.v))[0]
    assert torch.equal(before[:, :, :21], after[:, :, :21])


def test_duo_keeps_only_the_keys_of_full_heads() -> None:
    spec = build("duo").state_spec(SITE, build("duo").options)
    shapes = {t.name: t.shape for t in spec.tensors}
    assert shapes["keys"][1] == 1
    assert not spec.bounded
    near = get("sink_window")
    alone = near.state_spec(SITE, near.Options(window=6, sinks=2))
    streaming = build("duo", full=())
    assert streaming.state_spec(SITE, streaming.options).bounded
    assert {t.name for t in alone.tensors} <= set(shapes)


def test_the_shortcut_is_least_squares(agree: Agreement) -> None:
    """torch's solver finds the same map where the tokens determine it."""
    mixer = build("linear_shortcut", moved=0.0, ridge=0.0)
    x = sample(SITE, 80)
    wanted = torch.randn(2, 4, 80, 16, generator=torch.Generator().manual_seed(3))
    mixer.fit(x, wanted)
    rows = torch.cat((x.stream, torch.ones(2, 80, 1)), -1).reshape(-1, 25).double()
    columns = wanted.transpose(1, 2).reshape(160, -1).double()
    solution = torch.linalg.lstsq(rows, columns).solution
    best = (rows @ solution).reshape(2, 80, 4, 16).transpose(1, 2)
    hidden = x.stream.requires_grad_()
    weight, bias = solution[:-1].mT.float(), solution[-1].float()
    mine = F.linear(hidden, weight, bias).unflatten(-1, (4, 16)).transpose(1, 2)
    torch.testing.assert_close(mine.double(), best, atol=1e-5, rtol=1e-5)
    agree.both("linear_shortcut", mixer.mix(x)[0], mine, (hidden,))


def test_a_linear_layer_is_found_exactly() -> None:
    mixer = build("linear_shortcut", moved=0.0, ridge=1e-9)
    x = sample(SITE, 80)
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(3))
    target = F.linear(x.stream, weight).unflatten(-1, (4, 16)).transpose(1, 2)
    mixer.fit(x, target)
    torch.testing.assert_close(mixer.mix(x)[0], target, atol=1e-4, rtol=1e-4)


def test_drop_gives_nothing(agree: Agreement) -> None:
    out = build("drop").mix(sample(SITE, 7))[0]
    agree.outputs("drop", out, torch.zeros(2, 4, 7, 16))
    assert build("drop").flops(SITE, build("drop").options) == 0


def test_refusals() -> None:
    def reason(name: str, mask: Mask = CAUSAL, **facts: Any) -> str:
        cls = get(name)
        site = make_site(mask, **{"hidden_dim": 24, **facts})
        return cls.refuse(site, cls.Options()) or ""

    windowed = Mask((Causal(), Window(8)))
    capped = (Scale(0.3), Softcap(4.0))
    for name in ("sigmoid_attention", "duo", "moba"):
        assert "window mask" in reason(name, windowed)
        assert "softcap" in reason(name, score=capped, terms=())
        assert "bias" in reason(name, terms=("mask_and_bias",))
    assert "bidirectional" in reason("duo", BOTH_WAYS)
    assert "one tensor" in reason("linear_shortcut", hidden_dim=0)
    assert reason("drop", windowed) == reason("linear_shortcut", windowed) == ""
    duo = get("duo")
    assert "beyond the 2" in (duo.refuse(SITE, duo.Options(full=(2,))) or "")
