"""Gated recurrences against code by others: fla-core's naive loops and transformers' layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from agreement import Agreement
from mixer_sites import make_site
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from rewriter.ir.site import Scale
from rewriter.mixers.linear.gated_deltanet import GatedDeltaNet, GatedDeltaNetOptions
from rewriter.mixers.linear.gla import Gla, GlaOptions
from rewriter.mixers.linear.retnet import RetNet, RetNetOptions
from rewriter.mixers.linear.rwkv7 import Rwkv7, Rwkv7Options
from rewriter.mixers.ssm.mamba2 import Mamba2, Mamba2Options
from rewriter.mixers.tokens import Tokens, run

VECTORS = load_file(Path(__file__).parent / "vectors" / "fla.safetensors")
CASES = [0, 1, 2]


def case(number: int) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {n.removeprefix(prefix): t for n, t in VECTORS.items() if n.startswith(prefix)}


def tokens(given: dict[str, Tensor]) -> Tokens:
    q, k, v = (given[n].clone().requires_grad_() for n in "qkv")
    return Tokens(q, k, v, given["hidden"])


def site_of(given: dict[str, Tensor]):
    heads, width = given["q"].shape[1], given["q"].shape[3]
    return make_site(heads=(heads, heads, width), hidden_dim=given["hidden"].shape[-1])


def same_gradients(
    agree: Agreement, mixer: str, read: Tensor, x: Tokens, given: dict[str, Tensor], name: str
) -> None:
    grads = torch.autograd.grad((read * given["weight"]).sum(), (x.q, x.k, x.v))
    for got, letter in zip(grads, "qkv", strict=True):
        agree.gradient(mixer, got, given[f"{name}.d{letter}"])


def gated(read: Tensor, given: dict[str, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The output gate, written apart from the mixer."""
    gate = F.silu(F.linear(given["hidden"], weight, bias))
    return read * gate.unflatten(-1, (read.shape[1], -1)).transpose(1, 2)


@pytest.mark.parametrize("number", CASES)
def test_gla(number: int, agree: Agreement) -> None:
    given = case(number)
    x, mixer = tokens(given), Gla(site_of(given), GlaOptions(rank=4))
    with torch.no_grad():
        mixer.forget.down.copy_(given["down"])
        mixer.forget.weight.copy_(given["up"])
        mixer.forget.bias.copy_(given["start"])
        mixer.gate.linear.weight.normal_()
    shape = (x.v.shape[-1],)
    expected = gated(
        F.rms_norm(given["gla"], shape, eps=1e-5),
        given,
        mixer.gate.linear.weight,
        mixer.gate.linear.bias,
    )
    agree.outputs("gla", mixer.mix(x)[0], expected)
    heads = x.q.shape[1]
    decay = (F.logsigmoid(mixer.forget(x.stream)) / 16).unflatten(-1, (heads, -1))
    read, _ = run(mixer.spec, x, decay=decay.transpose(1, 2))
    same_gradients(agree, "gla", read, x, given, "gla")


@pytest.mark.parametrize("number", CASES)
def test_retnet(number: int, agree: Agreement) -> None:
    given = case(number)
    x, mixer = tokens(given), RetNet(site_of(given), RetNetOptions())
    shape = (x.v.shape[-1],)
    agree.outputs("retnet", mixer.mix(x)[0], F.layer_norm(given["retention"], shape, eps=1e-5))
    read, _ = run(mixer.spec, x, decay=-mixer.log_rate.exp())
    agree.outputs("retnet", read, given["retention"])
    same_gradients(agree, "retnet", read, x, given, "retention")


@pytest.mark.parametrize("number", CASES)
def test_rwkv7_recurrence(number: int, agree: Agreement) -> None:
    given = case(number)
    x, mixer = tokens(given), Rwkv7(site_of(given), Rwkv7Options())
    unit = F.normalize(x.k, dim=-1)
    slow = -0.6 * given["rate"]
    read, _ = run(mixer.spec, x, decay=slow, erase=-unit, add=unit * given["rate"])
    agree.outputs("rwkv7", read, given["dplr"])
    same_gradients(agree, "rwkv7", read, x, given, "dplr")


@pytest.mark.parametrize(("heads", "width", "length"), [(2, 8, 19), (3, 16, 70), (1, 24, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_gated_deltanet_is_the_layer_of_qwen3_next(
    heads: int, width: int, length: int, padded: bool, agree: Agreement
) -> None:
    torch.manual_seed(length)
    config = Qwen3NextConfig(
        hidden_size=24,
        num_hidden_layers=1,
        linear_num_value_heads=heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    site = make_site(heads=(heads, heads, width), hidden_dim=24)
    mine = GatedDeltaNet(site, GatedDeltaNetOptions(activation="silu"))
    hidden = torch.randn(2, length, 24, requires_grad=True)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : 5 * padded] = False
    parts = theirs.in_proj_qkvz.weight.view(heads, 4 * width, 24).split(width, 1)
    q_w, k_w, v_w, z_w = (p.reshape(-1, 24) for p in parts)
    b_w, a_w = theirs.in_proj_ba.weight.view(heads, 2, 24).unbind(1)
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)
        mine.conv.weight.copy_(theirs.conv1d.weight.squeeze(1))
        mine.beta.weight.copy_(b_w)
        mine.decay.step.weight.copy_(a_w)
        mine.decay.step.bias.copy_(theirs.dt_bias)
        mine.decay.log_rate.copy_(theirs.A_log)
        mine.gate.linear.weight.copy_(z_w)
        mine.gate.linear.bias.zero_()
        mine.norm.weight.copy_(theirs.norm.weight.expand(heads, -1))
    q, k, v = (
        F.linear(hidden, w).unflatten(-1, (heads, width)).transpose(1, 2) for w in (q_w, k_w, v_w)
    )
    out, _ = mine.mix(Tokens(q, k, v, hidden, valid if padded else None))
    got = F.linear(out.transpose(1, 2).flatten(2), theirs.out_proj.weight)[valid]
    wanted = theirs(hidden, attention_mask=valid.long() if padded else None)[valid]
    agree.both("gated_deltanet", got, wanted, (hidden,))


@pytest.mark.parametrize(
    ("heads", "width", "expand", "length"), [(2, 8, 1, 19), (3, 16, 2, 70), (4, 6, 2, 33)]
)
def test_mamba2_is_the_layer_of_transformers(
    heads: int, width: int, expand: int, length: int, agree: Agreement
) -> None:
    torch.manual_seed(length)
    inner = heads * width
    stream = inner // expand
    config = Mamba2Config(
        hidden_size=stream,
        num_heads=heads,
        head_dim=width,
        state_size=width,
        n_groups=heads,
        expand=expand,
        conv_kernel=4,
        use_conv_bias=False,
        num_hidden_layers=1,
        chunk_size=16,
        layer_norm_epsilon=1e-5,
    )
    theirs = Mamba2Mixer(config, 0).eval()
    site = make_site(heads=(heads, heads, width), hidden_dim=stream, score=(Scale(1.0),), terms=())
    mine = Mamba2(site, Mamba2Options(start="published"))
    hidden = torch.randn(2, length, stream, requires_grad=True)
    z_w, x_w, b_w, c_w, dt_w = theirs.in_proj.weight.split([inner, inner, inner, inner, heads])
    taps = theirs.conv1d.weight.squeeze(1).split(inner)
    with torch.no_grad():
        theirs.D.normal_()
        theirs.norm.weight.uniform_(0.5, 1.5)
        mine.conv.weight.copy_(torch.cat((taps[2], taps[1], taps[0])))
        mine.decay.step.weight.copy_(dt_w)
        mine.decay.step.bias.copy_(theirs.dt_bias)
        mine.decay.log_rate.copy_(theirs.A_log)
        mine.skip.copy_(theirs.D)
        mine.gate.linear.weight.copy_(z_w)
        mine.gate.linear.bias.zero_()
        mine.norm.weight.copy_(theirs.norm.weight.view(heads, width))
    q, k, v = (
        F.linear(hidden, w).unflatten(-1, (heads, width)).transpose(1, 2) for w in (c_w, b_w, x_w)
    )
    out, _ = mine.mix(Tokens(q, k, v, hidden))
    got = F.linear(out.transpose(1, 2).flatten(2), theirs.out_proj.weight)
    wanted = theirs(hidden)
    agree.both("mamba2", got, wanted, (hidden,))
