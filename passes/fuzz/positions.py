"""Spellings of query/key normalisation and of rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rewriter.passes.fuzz.edit import Chosen, Edit
from rewriter.passes.fuzz.laid import Laid, Tensor, unflatten
from rewriter.passes.fuzz.spec import Spec

EPSILON = 1e-6


def _norm_function(p: Any, t: Laid, name: str) -> Laid:
    weight = p.param(f"norm_{name}", p.raw["norm"])
    return t.of(F.rms_norm(t.data, (t.data.shape[-1],), weight, EPSILON))


def _norm_by_hand(p: Any, t: Laid, name: str) -> Laid:
    x = t.data.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
    return t.of(p.param(f"norm_{name}", p.raw["norm"]) * x.to(t.data.dtype))


def _norm_by_root(p: Any, t: Laid, name: str) -> Laid:
    root = torch.sqrt((t.data * t.data).mean(dim=-1, keepdim=True) + EPSILON)
    return t.of(t.data / root * p.param(f"norm_{name}", p.raw["norm"]))


NORMS = (
    Edit("norm", "function", _norm_function),
    Edit("norm", "by_hand", _norm_by_hand),
    Edit("norm", "by_root", _norm_by_root),
)


def _angles(p: Any, t: Laid) -> Tensor:
    """(tokens, rotary_dim / 2) angles."""
    token = "n" if "n" in t.letters else "m"
    steps = torch.arange(t.size(token), device=t.data.device, dtype=torch.float32)
    frequencies = p.buffer("frequencies", p.raw["frequencies"])
    return steps[:, None] * frequencies[None, :]  # type: ignore[no-any-return]


def _aligned(t: Laid, table: Tensor) -> Tensor:
    token = "n" if "n" in t.letters else "m"
    channel = t.letters[-1]
    return t.aligned(table, token + channel)


def _parts(p: Any, t: Laid) -> tuple[Tensor, Tensor | None]:
    width = p.spec.rotary_dim
    if width == p.spec.width:
        return t.data, None
    return t.data[..., :width], t.data[..., width:]


def _joined(t: Laid, rotated: Tensor, rest: Tensor | None) -> Laid:
    return t.of(rotated if rest is None else torch.cat([rotated, rest], -1))


def _half(p: Any, t: Laid) -> Laid:
    """x cos + rotate_half(x) sin."""
    angles = torch.cat([_angles(p, t)] * 2, -1)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return _joined(t, x * cos + turned * sin, rest)


def _half_chunked(p: Any, t: Laid) -> Laid:
    angles = torch.cat([_angles(p, t)] * 2, -1)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    first, second = x.chunk(2, -1)
    return _joined(t, torch.cat([-second, first], -1) * sin + x * cos, rest)


def _half_pairs(p: Any, t: Laid) -> Laid:
    """The two halves are turned on their own."""
    angles = _angles(p, t)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    first, second = x.chunk(2, -1)
    return _joined(t, torch.cat([first * cos - second * sin, second * cos + first * sin], -1), rest)


def _half_split(p: Any, t: Laid) -> Laid:
    angles = _angles(p, t)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    first, second = torch.split(x, x.shape[-1] // 2, dim=-1)
    left = cos * first - sin * second
    right = sin * first + cos * second
    return _joined(t, torch.cat((left, right), dim=-1), rest)


def _half_unflattened(p: Any, t: Laid) -> Laid:
    angles = torch.cat([_angles(p, t)] * 2, -1)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    first, second = unflatten(x, -1, (2, -1)).unbind(-2)
    return _joined(t, x * cos + torch.cat((-second, first), -1) * sin, rest)


def _interleaved(p: Any, t: Laid) -> Laid:
    """Neighbouring channels make a pair."""
    angles = _angles(p, t).repeat_interleave(2, -1)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return _joined(t, x * cos + turned * sin, rest)


def _interleaved_pairs(p: Any, t: Laid) -> Laid:
    angles = _angles(p, t)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return _joined(t, turned.flatten(-2), rest)


def _interleaved_view(p: Any, t: Laid) -> Laid:
    angles = _angles(p, t)
    cos, sin = _aligned(t, angles.cos()), _aligned(t, angles.sin())
    x, rest = _parts(p, t)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return _joined(t, turned.reshape(x.shape), rest)


def _complex(p: Any, t: Laid) -> Laid:
    angles = _angles(p, t)
    turn = torch.polar(torch.ones_like(angles), angles)
    x, rest = _parts(p, t)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
    out = torch.view_as_real(pairs * _aligned(t, turn)).flatten(-2)
    return _joined(t, out.type_as(x), rest)


def _of(kind: str) -> Any:
    def when(spec: Spec, chosen: Chosen) -> bool:
        return spec.position == kind

    return when


ROTARIES = (
    Edit("rotary", "half", _half, _of("half")),
    Edit("rotary", "interleaved", _interleaved, _of("interleaved")),
    Edit("rotary", "half_chunked", _half_chunked, _of("half")),
    Edit("rotary", "half_pairs", _half_pairs, _of("half")),
    Edit("rotary", "half_split", _half_split, _of("half")),
    Edit("rotary", "half_unflattened", _half_unflattened, _of("half")),
    Edit("rotary", "interleaved_pairs", _interleaved_pairs, _of("interleaved")),
    Edit("rotary", "interleaved_view", _interleaved_view, _of("interleaved")),
    Edit("rotary", "complex", _complex, _of("interleaved")),
)
