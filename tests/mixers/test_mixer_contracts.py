"""What every mixer promises: causality, padding, batches, limits, streaming, branches, refusals."""

from __future__ import annotations

import copy

import pytest
import sympy
import torch
import torch.nn.functional as F
from mixer_sites import BOTH_WAYS, CAUSAL, bool_mask, make_site, qkv
from torch import Tensor
from transformers import DynamicCache

from rewriter.backends.reference.factored import outer
from rewriter.ir.mask import Causal, Chunk, KeyPadding, Mask, SymmetricWindow, Window
from rewriter.ir.site import AddTerm, AttentionSite, Scale, Softcap
from rewriter.ir.state import TOKENS, bindings
from rewriter.mixers.base import Mixer, MixerOptions
from rewriter.mixers.hybrid.hedgehog_window import HedgehogWindow, HedgehogWindowOptions
from rewriter.mixers.linear.hedgehog import Hedgehog, HedgehogOptions
from rewriter.mixers.sparse.sink_window import SinkWindow, SinkWindowOptions
from rewriter.mixers.tokens import Tokens

KINDS: dict[str, tuple[type[Mixer], MixerOptions]] = {
    "sink_window": (SinkWindow, SinkWindowOptions(window=6, sinks=2)),
    "hedgehog": (Hedgehog, HedgehogOptions()),
    "hedgehog_window": (
        HedgehogWindow,
        HedgehogWindowOptions(window=6, sinks=2, initial_log_ratio=0.0),
    ),
    "hash_window": (
        HedgehogWindow,
        HedgehogWindowOptions(window=6, sinks=2, initial_log_ratio=0.0, bits=5),
    ),
}
CAUSAL_KINDS = sorted(KINDS)
BOTH_KINDS = ["hedgehog", "sink_window"]
N = 24


def build(name: str, site: AttentionSite, options: MixerOptions | None = None) -> Mixer:
    """A mixer whose learned parameters are not at their start."""
    cls, default = KINDS[name]
    assert cls.refuse(site, options or default) is None
    mixer = cls(site, options or default, layer=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in mixer.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return mixer


def run(mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    term = None
    if valid is not None:
        causal = mixer.site.kind == "causal"
        term = bool_mask(valid) if causal else valid[:, None, None, :]
    out: Tensor = mixer(q, k, v, (term,))[0]
    return out


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CAUSAL_KINDS)
def test_causality(name: str) -> None:
    mixer = build(name, make_site())
    q, k, v = qkv(mixer.site, N)
    before = run(mixer, q, k, v)
    for x in (q, k, v):
        x[:, :, 15:] += 1.0
    after = run(mixer, q, k, v)
    assert torch.equal(before[:, :, :15], after[:, :, :15])
    assert not torch.equal(before[:, :, 15:], after[:, :, 15:])


@pytest.mark.parametrize("name", CAUSAL_KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_invariance(name: str, side: str) -> None:
    """A padded row gives what the row gives alone; what stands in the padding does not matter."""
    mixer = build(name, make_site())
    q, k, v = qkv(mixer.site, N)
    pad = torch.full((1, 1, 7, 1), 3.0)

    def padded(x: Tensor) -> Tensor:
        fill = pad.expand(2, x.shape[1], 7, x.shape[-1])
        return torch.cat((fill, x) if side == "left" else (x, fill), 2)

    valid = torch.ones(2, N + 7, dtype=torch.bool)
    rows = slice(7, None) if side == "left" else slice(0, N)
    valid[:, :7] = side == "right"
    valid[:, N:] = valid[:, N:] & (side == "left")
    out = run(mixer, padded(q), padded(k), padded(v), valid)[:, :, rows]
    close(out, run(mixer, q, k, v))


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_bidirectional_padding_and_order(name: str) -> None:
    mixer = build(name, make_site(BOTH_WAYS))
    q, k, v = qkv(mixer.site, N)
    alone = run(mixer, q, k, v)
    valid = torch.ones(2, N + 5, dtype=torch.bool)
    valid[:, N:] = False
    out = run(mixer, *(F.pad(x, (0, 0, 0, 5), value=2.0) for x in (q, k, v)), valid)
    close(out[:, :, :N], alone)
    assert not torch.allclose(alone, run(build(name, make_site()), q, k, v))


@pytest.mark.parametrize("name", CAUSAL_KINDS)
def test_batch_independence_and_length_one(name: str) -> None:
    mixer = build(name, make_site())
    q, k, v = qkv(mixer.site, N)
    together = run(mixer, q, k, v)
    for b in range(2):
        close(together[b : b + 1], run(mixer, q[b : b + 1], k[b : b + 1], v[b : b + 1]))
    one = run(mixer, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    close(one, v[:, :, :1].repeat_interleave(2, 1))


@pytest.mark.parametrize("name", CAUSAL_KINDS)
@pytest.mark.parametrize("splits", [(24,), (1,) * 24, (10, 1, 1, 9, 3), (2, 20, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_pieces_equal_the_whole(name: str, splits: tuple[int, ...], padded: bool) -> None:
    mixer = build(name, make_site())
    q, k, v = qkv(mixer.site, N)
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[1, :9] = not padded
    whole = run(mixer, q, k, v, valid)
    cache, at = DynamicCache(), 0
    for n in splits:
        piece = slice(at, at + n)
        mask = bool_mask(valid[:, : at + n], at)
        out, _ = mixer(q[:, :, piece], k[:, :, piece], v[:, :, piece], (mask,), cache)
        seen = valid[:, piece]
        close(out.transpose(1, 2)[seen], whole[:, :, piece].transpose(1, 2)[seen])
        at += n
    assert cache.get_seq_length() == N


@pytest.mark.parametrize("name", ["sink_window", "hedgehog_window", "hash_window"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_window_over_everything_is_full_softmax(name: str, cap: float | None) -> None:
    score = (Scale(0.4), *((Softcap(cap),) if cap else ()), AddTerm(0))
    site = make_site(spelling="eager", score=score)
    cls, options = KINDS[name]
    limit = cls.limit_options(options, N)
    assert limit is not None
    mixer = build(name, site, limit)
    q, k, v = qkv(site, N)
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.4
    s = s if cap is None else cap * torch.tanh(s / cap)
    s = s.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    close(run(mixer, q, k, v), s.softmax(-1) @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_window", "hash_window"])
@pytest.mark.parametrize("mask", [CAUSAL, BOTH_WAYS])
def test_dense_weights_are_those_of_mix(name: str, mask: Mask) -> None:
    if name != "hedgehog" and mask is BOTH_WAYS:
        pytest.skip("causal only")
    mixer = build(name, make_site(mask))
    q, k, v = qkv(mixer.site, N)
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[0, :5] = False
    x, every = Tokens(q, k, v, valid=valid), slice(0, N)
    weights = mixer.attention_rows(x, every)
    assert weights.dtype == torch.float32
    sums = weights.sum(-1)[:, :, 5:]
    close(sums, torch.ones_like(sums))
    close(mixer.attention_rows(x, slice(7, 19)), weights[:, :, 7:19])
    close(run(mixer, q, k, v, valid), weights @ v.repeat_interleave(2, 1))
    for branch in mixer.branches:
        with mixer.without(branch):
            weights = mixer.attention_rows(x, every)
            close(run(mixer, q, k, v, valid), weights @ v.repeat_interleave(2, 1))


def test_branches_switch_off_what_they_say() -> None:
    q, k, v = qkv(make_site(), N)
    hybrid = build("hedgehog_window", make_site())
    with hybrid.without("linear"):
        close(run(hybrid, q, k, v), run(build("sink_window", make_site()), q, k, v))
    window = build("sink_window", make_site())
    with window.without("sinks"):
        alone = build("sink_window", make_site(), SinkWindowOptions(window=6, sinks=0))
        close(run(window, q, k, v), run(alone, q, k, v))
    for mixer in (hybrid, window):
        for branch in mixer.branches:
            before = run(mixer, q, k, v)
            with mixer.without(branch):
                assert not torch.allclose(run(mixer, q, k, v), before)
            assert torch.equal(run(mixer, q, k, v), before)
        with pytest.raises(ValueError, match="no branch"), mixer.without("nothing"):
            pass


def test_a_site_window_limits_the_mixer() -> None:
    """Neither the window nor the sinks reach further than the model's own window."""
    for mask, limit in [
        (Mask((Causal(), Window(4), KeyPadding())), 4),
        (Mask((Causal(), Window(10), KeyPadding())), 10),
    ]:
        mixer = build("sink_window", make_site(mask))
        q, k, v = qkv(mixer.site, N)
        distance = torch.arange(N)[:, None] - torch.arange(N)
        allow = (distance >= 0) & ((distance < 6) | (torch.arange(N) < 2)) & (distance < limit)
        expected = F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), allow, scale=mixer.site.scale
        )
        close(run(mixer, q, k, v), expected)


@pytest.mark.parametrize("prescaled", [1.0, 8**-0.5])
def test_hedgehog_shares_the_scale(prescaled: float) -> None:
    """Where the scale is applied, before the core or in it, does not change the map's inputs."""
    inside = build("hedgehog", make_site(score=(Scale(8**-0.5),), terms=("none",)))
    outside = build(
        "hedgehog",
        make_site(score=(Scale(8**-0.5 / prescaled),), terms=("none",), prescaled=prescaled),
    )
    q, k, v = qkv(inside.site, N)
    close(run(outside, q * prescaled, k, v), run(inside, q, k, v))


def test_untrained_hybrid_starts_near_its_window() -> None:
    site = make_site(heads=(4, 2, 64))
    q, k, v = qkv(site, 1024)
    student = HedgehogWindow(site, HedgehogWindowOptions())
    with torch.no_grad():
        out = run(student, q, k, v)
        near = run(SinkWindow(site, SinkWindowOptions(window=64)), q, k, v)
    assert float((out - near).norm() / near.norm()) < 0.02
    run(student, q, k, v).square().sum().backward()
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


@pytest.mark.parametrize("name", CAUSAL_KINDS)
def test_refusals(name: str) -> None:
    cls, options = KINDS[name]

    def reason(mask: Mask = CAUSAL, **facts: object) -> str:
        return cls.refuse(make_site(mask, **facts), options) or ""  # type: ignore[arg-type]

    assert "opaque" in reason(Mask(opaque="unknown table"))
    assert "chunk" in reason(Mask((Causal(), Chunk(8))))
    if name != "sink_window":
        assert "window mask" in reason(Mask((Causal(), Window(8))))
        assert "bias" in reason(terms=("mask_and_bias",))
    if name == "hedgehog":
        assert "symmetric_window" in reason(Mask((SymmetricWindow(8),)))
        assert cls.refuse(make_site(), HedgehogOptions(feature_dim=9)) is not None
    if name == "hedgehog_window":
        assert "bidirectional" in reason(BOTH_WAYS)


@pytest.mark.parametrize("name", CAUSAL_KINDS)
def test_state_and_cost_formulas(name: str) -> None:
    cls, options = KINDS[name]
    site = make_site()
    spec = cls.state_spec(site, options)
    state = spec.new(site, 3, torch.float32, torch.device("cpu"))
    measured = sum(t.numel() * t.element_size() for t in state.values())
    assert spec.bytes(4).subs(bindings(site, 3)) == measured
    assert spec.bounded
    assert not spec.croppable
    assert TOKENS not in spec.bytes().free_symbols
    flops = [cls.flops(site, options).subs(bindings(site, 1, n)) for n in (4096, 8192, 12288)]
    assert all(isinstance(f, sympy.Integer) and f > 0 for f in flops)
    # Linear in the length behind the first tokens, which see less than a whole window.
    assert flops[2] - flops[1] == flops[1] - flops[0] >= flops[0]


@pytest.mark.parametrize("name", CAUSAL_KINDS)
def test_copies_and_state_dicts(name: str) -> None:
    mixer = build(name, make_site())
    q, k, v = qkv(mixer.site, N)
    clone = copy.deepcopy(mixer)
    assert torch.equal(run(clone, q, k, v), run(mixer, q, k, v))
    fresh = KINDS[name][0](mixer.site, mixer.options)
    fresh.load_state_dict(mixer.state_dict())
    assert torch.equal(run(fresh, q, k, v), run(mixer, q, k, v))
    low = copy.deepcopy(mixer).bfloat16()
    out = run(low, q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16
    close(out.float(), run(mixer, q, k, v), 0.1)


def test_a_sharp_hash_finds_the_one_equal_key() -> None:
    """Queries and keys of a group start with the same cells, so equal ones share a cell."""
    options = HedgehogWindowOptions(window=1, sinks=0, initial_log_ratio=0.0, bits=12, sharpness=30)
    mixer = build("hash_window", make_site(heads=(4, 2, 16)), options)
    assert isinstance(mixer, HedgehogWindow)
    q, k, _ = qkv(mixer.site, N)
    q = torch.zeros_like(q)
    q[:, :, -1] = k[:, :, 5].repeat_interleave(2, 1) * 4
    k = 4 * k
    rows, keys = (outer(f, mixer.spec.factors) for f in (mixer.map_q(q[:, :, -1:]), mixer.map_k(k)))
    far = rows @ keys.repeat_interleave(2, 1).mT
    share = far[..., 5] / far.sum(-1)
    assert bool((share > 0.9).all())


def test_options_are_strict() -> None:
    with pytest.raises(ValueError, match="one map"):
        HedgehogWindowOptions(bits=8, feature_dim=4)
    with pytest.raises(ValueError, match="window"):
        SinkWindowOptions(window=0)
    with pytest.raises(ValueError, match="windw"):
        SinkWindowOptions(windw=3)  # type: ignore[call-arg]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["sink_window", "hedgehog_window"])
def test_export_with_a_free_length(name: str) -> None:
    """A rewritten module can be captured again, and its graph serves other lengths."""
    mixer = build(name, make_site())
    q, k, v = qkv(mixer.site, N)
    free = {2: torch.export.Dim.DYNAMIC}
    graph = torch.export.export(
        _Plain(mixer), (q, k, v), dynamic_shapes=(free, free, free), strict=False
    ).module()
    longer = qkv(mixer.site, N + 9)
    close(graph(*longer), run(mixer, *longer))


class _Plain(torch.nn.Module):
    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.mixer(q, k, v, (None,))[0]
        return out
