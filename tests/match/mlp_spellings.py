"""MLPs written by hand in many ways, with what must be found, and what only looks like one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mlp_parts import HIDDEN, TOKENS, WIDTH, Body, Says


def functional(m, x):
    return F.linear(F.relu(F.linear(x, m.up.weight, m.up.bias)), m.down.weight)


def tanh_by_hand(m, x):
    h = m.up(x)
    return m.down(0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.044715 * h * h * h))))


def erf_by_hand(m, x):
    h = m.up(x)
    return m.down(h * 0.5 * (1.0 + torch.erf(h / 2**0.5)))


def silu_by_hand(m, x):
    h = m.up(x)
    return m.down(h / (1 + torch.exp(-h)))


def mish_by_hand(m, x):
    h = m.up(x)
    return m.down(h * torch.tanh(torch.log1p(h.exp())))


def relu_by_where(m, x):
    h = m.up(x)
    return m.down(torch.where(h > 0, h, torch.zeros_like(h)))


def relu_by_max(m, x):
    h = m.up(x)
    return m.down(torch.maximum(h, torch.zeros((), dtype=h.dtype)))


def relu_by_product(m, x):
    h = m.up(x)
    return m.down((h > 0).to(h.dtype) * h)


def squared_by_product(m, x):
    h = m.up(x).relu()
    return m.down(h * h)


def scaled(m, x):
    return m.down(F.silu(m.up(x)) * 1.5)


def inplace(m, x):
    h = m.up(x)
    h.mul_(2.0)
    return m.down(F.relu_(h))


def shared_gate(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x))


def gate_second(m, x):
    return m.down(m.up(x) * F.gelu(m.gate(x), approximate="tanh"))


def bilinear(m, x):
    return m.down(m.up(x) * m.gate(x))


def halves(m, x):
    g, u = m.both(x).chunk(2, -1)
    return m.down(F.silu(g) * u)


def halves_turned(m, x):
    u, g = m.both(x).split(HIDDEN, -1)
    return m.down(F.gelu(g) * u)


def sliced(m, x):
    h = m.both(x)
    return m.down(h[..., :HIDDEN] * torch.sigmoid(h[..., HIDDEN:]))


def torch_glu(m, x):
    return m.down(F.glu(m.both(x), -1))


def interleaved(m, x):
    h = m.both(x)
    return m.down(F.silu(h[..., ::2]) * h[..., 1::2])


def interleaved_by_view(m, x):
    u, g = m.both(x).unflatten(-1, (HIDDEN, 2)).unbind(-1)
    return m.down(F.relu(g) * u)


def clamped_gate(m, x):
    h = m.both(x)
    g, u = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
    return m.down((u + 1) * (g * torch.sigmoid(g * 1.702)))


def parameters(m, x):
    return torch.matmul(F.elu(x @ m.w_in + m.b_in), m.w_out) + m.b_out


def added_products(m, x):
    flat = x.reshape(-1, WIDTH)
    h = torch.addmm(m.b_in, flat, m.w_in)
    return torch.addmm(m.b_out, F.mish(h), m.w_out).view(x.shape)


def einsum(m, x):
    h = torch.einsum("bnd,df->bnf", x, m.w_in)
    return torch.einsum("bnf,fd->bnd", F.gelu(h), m.w_out)


def one_by_one(m, x):
    image = x.mT.unflatten(-1, (3, 4))
    return m.conv_out(F.gelu(m.conv_in(image)))


def one_by_one_line(m, x):
    return m.line_out(F.relu(m.line_in(x.mT))).mT


def conv_then_linear(m, x):
    return m.down(F.silu(m.line_in(x.mT)).mT)


def token_mixing(m, x):
    return m.mix_out(F.gelu(m.mix_in(x.mT))).mT


def cast_between(m, x):
    return m.down(F.silu(m.up(x).double()).float())


def learned_slope(m, x):
    return m.down(F.prelu(m.up(x), m.slope))


def unknown(m, x):
    h = m.up(x)
    return m.down(h * torch.cos(h.abs().sqrt()))


def batched_experts(m, x):
    rows = x.reshape(-1, WIDTH).repeat(4, 1).view(4, -1, WIDTH)
    g, u = torch.bmm(rows, m.e_in).chunk(2, -1)
    return torch.bmm(u * F.silu(g), m.e_out).sum(0).view(x.shape)


def einsum_experts(m, x):
    g, u = torch.einsum("nd,edf->nef", x.reshape(-1, WIDTH), m.e_in).chunk(2, -1)
    return torch.einsum("nef,efd->ned", F.gelu(g) * u, m.e_out).sum(1).view(x.shape)


def looped_experts(m, x):
    weights = m.router(x).softmax(-1)
    return sum(weights[..., i : i + 1] * e(x) for i, e in enumerate(m.experts))


_FIRST, _SECOND = (0, HIDDEN, 1), (HIDDEN, 2 * HIDDEN, 1)
_EVEN, _ODD = (0, 2 * HIDDEN, 2), (1, 2 * HIDDEN + 1, 2)
_SEPARATE = {"kind": "glu", "layout": "separate", "gate": _FIRST}

FOUND: dict[Body, Says] = {
    functional: Says("relu"),
    tanh_by_hand: Says("gelu_tanh"),
    erf_by_hand: Says("gelu"),
    silu_by_hand: Says("silu"),
    mish_by_hand: Says("mish"),
    relu_by_where: Says("relu"),
    relu_by_max: Says("relu"),
    relu_by_product: Says("relu"),
    squared_by_product: Says("relu2"),
    scaled: Says("silu", scale=1.5),
    inplace: Says("relu", scale=2.0),
    shared_gate: Says("silu", **_SEPARATE),
    gate_second: Says("gelu_tanh", **_SEPARATE),
    bilinear: Says("identity", **_SEPARATE),
    halves: Says("silu", "fused_glu", "halves", _SECOND, _FIRST),
    halves_turned: Says("gelu", "fused_glu", "halves", _FIRST, _SECOND),
    sliced: Says("sigmoid", "fused_glu", "halves", _FIRST, _SECOND),
    torch_glu: Says("sigmoid", "fused_glu", "halves", _FIRST, _SECOND),
    interleaved: Says("silu", "fused_glu", "interleaved", _ODD, _EVEN),
    interleaved_by_view: Says("relu", "fused_glu", "interleaved", _EVEN, _ODD),
    clamped_gate: Says("swiglu_clamped", "fused_glu", "interleaved", _ODD, _EVEN),
    parameters: Says("elu"),
    added_products: Says("mish"),
    einsum: Says("gelu"),
    one_by_one: Says("gelu", "conv1x1"),
    one_by_one_line: Says("relu", "conv1x1"),
    conv_then_linear: Says("silu"),
    token_mixing: Says("gelu", widths=(TOKENS, HIDDEN, TOKENS)),
    cast_between: Says("silu"),
    learned_slope: Says("opaque"),
    unknown: Says("opaque"),
    batched_experts: Says("silu", "experts", "halves", _SECOND, _FIRST, experts=4),
    einsum_experts: Says("gelu", "experts", "halves", _SECOND, _FIRST, experts=4),
    looped_experts: Says("gelu", sites=3),
}


def no_activation(m, x):
    return m.down(m.up(x) * 0.5)


def one_projection(m, x):
    return F.gelu(m.up(x))


def norm_then_projection(m, x):
    return m.up(F.layer_norm(x, (WIDTH,)))


def norm_inside(m, x):
    return m.down(m.norm(F.gelu(m.up(x))))


def hand_norm_inside(m, x):
    h = F.silu(m.up(x))
    return m.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def depthwise_inside(m, x):
    return m.down(F.gelu(m.wide(m.up(x).mT).mT))


def grouped_projection(m, x):
    return m.line_out(F.relu(m.grouped(x.mT)))


def convolutions(m, x):
    return m.line_out(F.relu(m.wide(F.relu(m.wide(m.line_in(x.mT))))))


def three_layers(m, x):
    return m.last(F.relu(m.down(F.relu(m.up(x)))))


def gated_attention(m, x):
    mixed = F.scaled_dot_product_attention(x, x, x)
    return m.last(mixed * torch.sigmoid(m.gates(x)))


def broadcast_gate(m, x):
    return m.down(torch.sigmoid(m.narrow(x)) * m.up(x))


def other_input(m, x):
    return m.down(F.silu(m.gate(x.roll(1, 1))) * m.up(x))


def hidden_seen(m, x):
    h = F.gelu(m.up(x))
    return m.down(h).sum() + h.sum()


def half_activated(m, x):
    return m.down(F.relu(m.both(x)[..., :HIDDEN]))


def flipped(m, x):
    return m.down(F.gelu(m.up(x)).transpose(0, 1))


def softmax_inside(m, x):
    return m.down(m.up(x).softmax(-1))


def router(m, x):
    return torch.topk(m.router(x).softmax(-1), 2)[0]


def constant_input(m, x):
    return x + m.down(F.relu(m.up(m.table)))


def residual_inside(m, x):
    return m.last(F.relu(m.down(m.up(x)) + x))


REFUSED: dict[Body, str | None] = {
    no_activation: None,
    one_projection: None,
    norm_then_projection: None,
    softmax_inside: None,
    router: None,
    norm_inside: "'layer_norm' stands between the projections",
    hand_norm_inside: "'mean' stands between the projections",
    depthwise_inside: "'conv1d' stands between the projections",
    convolutions: None,
    grouped_projection: None,
    three_layers: "three or more projections follow each other",
    gated_attention: "which is none",
    broadcast_gate: "in another order",
    other_input: "read different inputs",
    hidden_seen: "is also used by",
    half_activated: "only some channels",
    flipped: "in another order",
    constant_input: "constant of the model",
    residual_inside: "which is none",
}
"""Bodies that hold no MLP, with a part of the reason where one is owed."""
