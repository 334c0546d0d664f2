"""Symbolic costs against counts made by others, and predictions against what they rest on."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rewriter.errors import UsageError
from rewriter.ir.mask import Causal, Mask, WindowOrSinks
from rewriter.ir.state import BATCH, TOKENS
from rewriter.planner import crossover
from rewriter.planner.device import Device, named_devices, profile_path
from rewriter.planner.predict import Use, causal_site, core_seconds, predict, product_seconds
from rewriter.planner.profiling import ProfileOptions, profile
from rewriter.planner.serving import (
    HEAD_WIDTH,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LINK,
    MEMORY,
    OUTPUT,
    VOCABULARY,
    WIDTH,
    decoder,
    numbers,
)
from rewriter.planner.trunk import Trunk, trunk_of
from rewriter.planner.work import BANDWIDTH, PEAK, core_work, latency, state_bytes, total

SITE = causal_site((4, 2, 16, 16), 64)


def llama(**more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **more,
        )
    ).eval()


@pytest.mark.parametrize(
    "model",
    [
        llama(attn_implementation="eager"),
        GPT2LMHeadModel(
            GPT2Config(vocab_size=258, n_embd=64, n_layer=2, n_head=4, attn_implementation="eager")
        ).eval(),
    ],
    ids=["llama", "gpt2"],
)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 8), (3, 20)])
def test_flops_are_those_that_torch_counts(model: torch.nn.Module, batch: int, tokens: int) -> None:
    heads = (4, getattr(model.config, "num_key_value_heads", 4), 16, 16)
    trunk = trunk_of(model)
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    core = core_work("keep", {}, causal_site(heads, 64), "prefill")
    parts = [*trunk.parts("prefill", all_logits=True), core, core]
    found = total(parts).flops.subs({BATCH: batch, TOKENS: tokens})
    assert found == counter.get_total_flops()


def test_a_trunk_survives_json_and_needs_parameters() -> None:
    trunk = trunk_of(llama())
    assert Trunk.from_json(trunk.to_json()) == trunk
    assert [m.head for m in trunk.matrices] == [False] * (len(trunk.matrices) - 1) + [True]
    with pytest.raises(UsageError, match="no operation"):
        trunk_of(torch.nn.Identity(), rewriter_examples())


def rewriter_examples() -> object:
    from rewriter.passes.examples import examples_for

    return examples_for(torch.nn.Identity(), torch.ones(2, 3, 4))


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 40), window=st.integers(1, 20), sinks=st.integers(0, 5))
def test_windows_cost_what_their_masks_show(tokens: int, window: int, sinks: int) -> None:
    at = torch.arange(tokens)
    near = Mask((Causal(), WindowOrSinks(window, sinks))).dense(at, at)
    options = {"window": window, "sinks": sinks}
    for phase, shown in (("prefill", int(near.sum())), ("decode", int(near[-1].sum()))):
        work = core_work("sink_window", options, SITE, phase).at({BATCH: 3, TOKENS: tokens})
        assert work.flops == 3 * 4 * shown * 2 * (16 + 16)
    full = core_work("duo", {"full": (0, 1), **options, "sinks": max(sinks, 1)}, SITE, "prefill")
    dense = int(Mask((Causal(),)).dense(at, at).sum())
    assert full.flops.subs({BATCH: 1, TOKENS: tokens}) == 4 * dense * 2 * (16 + 16)


@pytest.mark.parametrize("mixer", ["keep", "fused", "hedgehog", "retnet", "gla"])
def test_a_step_reads_its_state_and_costs_the_next_token(mixer: str) -> None:
    step = core_work(mixer, {}, SITE, "decode").at({BATCH: 2, TOKENS: 100})
    assert float(step.flops) > 0
    state = float(state_bytes(mixer, {}, SITE).subs({BATCH: 2, TOKENS: 100}))
    ends = 4 * 2 * (4 + 2) * 32
    read_and_written = state * (1 if mixer in ("keep", "fused") else 2)
    assert float(step.bytes) == pytest.approx(ends + read_and_written)
    sizes = [core_work(mixer, {}, SITE, "decode").at({TOKENS: n}).bytes for n in (10, 1000)]
    assert (sizes[0] == sizes[1]) == (mixer not in ("keep", "fused"))


def test_roofline_turns_at_the_device_s_intensity() -> None:
    """156 operations a byte on an A100 (catalogue other.md E.1)."""
    device = named_devices()["a100-sxm-80gb"]
    turn = device.peak_of("bfloat16") / device.bandwidth
    assert 150 < turn < 157
    time = latency([core_work("keep", {}, SITE, "decode", 2)])
    values = {PEAK: 312e12, BANDWIDTH: 2e12, BATCH: 1, TOKENS: 4096, sympy.Symbol("alpha"): 0}
    moved = core_work("keep", {}, SITE, "decode", 2).bytes.subs(values)
    bound = {k: v for k, v in values.items() if k != sympy.Symbol("alpha")}
    from rewriter.planner.work import LAUNCH

    assert float(time.subs({**bound, LAUNCH: 0})) == pytest.approx(float(moved) / 2e12)


def test_serving_terms_are_those_of_the_published_example() -> None:
    """34B, 60 layers, 8 KV heads of 128, A100 80 GB: the paper's own figures, rounded as there.

    "Challenges in Deploying Long-Context Transformers", tables for 4K and 50K of context.
    """
    model = decoder()
    shape = {LAYERS: 60, WIDTH: 7168, HEADS: 56, KV_HEADS: 8, HEAD_WIDTH: 128, HIDDEN: 20480}
    # the memory of that device is 80 GiB
    device = {PEAK: 312e12, BANDWIDTH: 2e12, LINK: 20e9, MEMORY: 80 * 2**30, OUTPUT: 250}
    values = {**shape, **device, VOCABULARY: 64000}
    short, long = ({**values, TOKENS: n} for n in (4096, 50_000))
    assert numbers([model.cache], short)[0] == pytest.approx(1.01e9, rel=0.01)
    assert numbers([model.cache], long)[0] == pytest.approx(12.3e9, rel=0.01)
    assert numbers([model.prefill_seconds], short)[0] == pytest.approx(0.89, rel=0.06)
    assert numbers([model.decode_seconds()], short)[0] == pytest.approx(8.5, rel=0.05)
    assert numbers([model.decode_seconds()], long)[0] == pytest.approx(9.8, rel=0.05)
    assert numbers([model.switch_seconds], long)[0] == pytest.approx(1.1, rel=0.15)
    assert numbers([model.concurrency], long)[0] == 1
    assert 15 < numbers([model.concurrency], short)[0] <= 20
    bounded = decoder(cache=sympy.Integer(8 * 128 * 128 * 4))
    assert numbers([bounded.concurrency], long) == numbers([bounded.concurrency], short)
    assert numbers([bounded.sessions_per_second()], long)[0] > 0


@pytest.fixture(scope="module")
def device() -> Device:
    options = ProfileOptions(
        rows=(1, 32),
        matrices=((64, 96), (64, 64)),
        mixers=(("fused", {}), ("sink_window", {"window": 8, "sinks": 1}), ("retnet", {})),
        heads=((4, 2, 16, 16),),
        hidden=64,
        prefill=(16, 64),
        decode=(16, 64),
        seconds=0.0,
        pool=2**16,
    )
    return profile(options)


def test_a_prediction_at_a_measured_point_is_the_measurement(device: Device) -> None:
    for p in device.products:
        assert product_seconds(device, p.rows, p.inputs, p.outputs) == pytest.approx(p.seconds)
    for c in device.cores:
        use = Use(causal_site(c.heads, c.hidden), c.mixer, c.options)
        assert core_seconds(device, use, c.phase, c.tokens) == pytest.approx(c.seconds)
    between = product_seconds(device, 8, 64, 96)
    ends = sorted(p.seconds / p.rows for p in device.products if (p.inputs, p.outputs) == (64, 96))
    assert ends[0] <= between / 8 <= ends[1]


def test_a_model_s_parts_add_up(device: Device) -> None:
    trunk = trunk_of(llama())
    uses = [Use(SITE, "fused", {}), Use(SITE, "retnet", {})]
    found = predict(device, trunk, uses, "prefill", 64)
    assert found.seconds == pytest.approx(found.products + found.pointwise + found.cores)
    assert found.cache == 2 * 64 * 2 * 16 * 4 + 2 * 16 * 16 * 4
    step = predict(device, trunk, uses, "decode", 64, compiled_step=True)
    assert step.pointwise == 0 < step.seconds < found.seconds
    named = named_devices()["h100-sxm-80gb"]
    fast = predict(named, trunk, uses, "prefill", 64, dtype="bfloat16")
    assert 0 < fast.seconds < found.seconds


def test_profiles_are_files_that_say_what_is_wrong(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    device.save(path)
    assert Device.load(path) == device and device.measured
    assert Device.load("a100-sxm-80gb").source.startswith("NVIDIA")
    assert profile_path().suffix == ".json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(UsageError, match="format 7"):
        Device.load(path)
    path.write_text('{"name": "x", "source": "y", "peak": {}, "bandwidth": -1}')
    with pytest.raises(UsageError, match="bandwidth"):
        Device.load(path)
    path.write_text("[]")
    with pytest.raises(UsageError, match="JSON object"):
        Device.load(path)
    with pytest.raises(UsageError, match="a100"):
        Device.load("a100")
    with pytest.raises(UsageError, match="no peak for float8"):
        device.peak_of("float8")
    with pytest.raises(UsageError, match="one thread"):
        profile(ProfileOptions(clock="cpu", threads=2))
    with pytest.raises(UsageError, match="no dtype"):
        profile(ProfileOptions(dtype="float33", pool=16))


def test_the_crossover_of_softmax_and_chunked_linear_attention_is_solved() -> None:
    """2 C + 2 d tokens (catalogue other.md E.1): 2 N^2 H d against H (2 N C 2 d + 4 N d^2)."""
    N, C, d, H = TOKENS, 64, 32, 4
    lengths = crossover.solved(2 * N**2 * H * d, H * (2 * N * C * 2 * d + 4 * N * d * d))
    assert lengths == [2 * C + 2 * d]


def test_a_measured_crossover_is_where_the_times_meet() -> None:
    found = crossover.between(lambda n: 1e-9 * n * n, lambda n: 1e-6 * n, 16, 65536)
    assert found == pytest.approx(1000, rel=0.01)
    assert crossover.between(lambda n: 1.0, lambda n: 2.0, 16, 1024) is None
    assert crossover.between(lambda n: 2.0, lambda n: 1.0, 16, 1024) == 16
