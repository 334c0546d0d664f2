"""Spellings of the projections and of splitting their results into heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rewriter.passes.fuzz.edit import Edit
from rewriter.passes.fuzz.laid import Laid, Tensor, unflatten
from rewriter.passes.fuzz.spec import CHANNELS, Spec

Triple = tuple[Tensor, Tensor, Tensor]


def _modules(p: Any, x: Tensor, source: Tensor) -> Triple:
    return p.linear("q")(x), p.linear("k")(source), p.linear("v")(source)


def _functional(p: Any, x: Tensor, source: Tensor) -> Triple:
    q, k, v = ((p.param(f"w_{n}", p.raw[n]), p.param(f"b_{n}", p.raw["b" + n])) for n in "qkv")
    return F.linear(x, *q), F.linear(source, *k), F.linear(source, *v)


def _matmul(p: Any, x: Tensor, source: Tensor) -> Triple:
    def one(name: str, item: Tensor) -> Tensor:
        weight = p.param(f"wt_{name}", p.raw[name].t().contiguous())
        return item @ weight + p.param(f"b_{name}", p.raw["b" + name])  # type: ignore[no-any-return]

    return one("q", x), one("k", source), one("v", source)


def _addmm(p: Any, x: Tensor, source: Tensor) -> Triple:
    def one(name: str, item: Tensor) -> Tensor:
        weight = p.param(f"wt_{name}", p.raw[name].t().contiguous())
        flat = item.reshape(-1, CHANNELS)
        out = torch.addmm(p.param(f"b_{name}", p.raw["b" + name]), flat, weight)
        return out.view(item.shape[0], item.shape[1], weight.shape[1])

    return one("q", x), one("k", source), one("v", source)


def _einsum(p: Any, x: Tensor, source: Tensor) -> Triple:
    def one(name: str, item: Tensor) -> Tensor:
        out = torch.einsum("bnc,oc->bno", item, p.param(f"w_{name}", p.raw[name]))
        return out + p.param(f"b_{name}", p.raw["b" + name])  # type: ignore[no-any-return]

    return one("q", x), one("k", source), one("v", source)


def _fused(p: Any, x: Tensor, order: str) -> dict[str, Tensor]:
    joined = p.linear(order, *(torch.cat([p.raw[b + n] for n in order]) for b in ("", "b")))(x)
    sizes = [p.raw[n].shape[0] for n in order]
    return dict(zip(order, joined.split(sizes, -1), strict=True))


def _split(p: Any, x: Tensor, source: Tensor) -> Triple:
    parts = _fused(p, x, "qkv")
    return parts["q"], parts["k"], parts["v"]


def _split_reordered(p: Any, x: Tensor, source: Tensor) -> Triple:
    parts = _fused(p, x, "vqk")
    return parts["q"], parts["k"], parts["v"]


def _slices(p: Any, x: Tensor, source: Tensor) -> Triple:
    joined = p.linear("qkv", *(torch.cat([p.raw[b + n] for n in "qkv"]) for b in ("", "b")))(x)
    one, two = p.raw["q"].shape[0], p.raw["q"].shape[0] + p.raw["k"].shape[0]
    return joined[..., :one], joined[..., one:two], joined[:, :, two:]


def _chunk(p: Any, x: Tensor, source: Tensor) -> Triple:
    joined = p.linear("qkv", *(torch.cat([p.raw[b + n] for n in "qkv"]) for b in ("", "b")))(x)
    q, k, v = joined.chunk(3, dim=-1)
    return q, k, v


def _unbind(p: Any, x: Tensor, source: Tensor) -> Triple:
    joined = p.linear("qkv", *(torch.cat([p.raw[b + n] for n in "qkv"]) for b in ("", "b")))(x)
    q, k, v = joined.view(*joined.shape[:2], 3, -1).unbind(2)
    return q, k, v


def _by_head(p: Any, x: Tensor, source: Tensor) -> Triple:
    """The rows of one weight hold q, k and v of the first head, then of the second, ..."""

    def mix(prefix: str) -> Tensor:
        heads = [unflatten(p.raw[prefix + n], 0, (p.spec.heads, -1)) for n in "qkv"]
        return torch.cat(heads, 1).flatten(0, 1)

    joined = p.linear("by_head", mix(""), mix("b"))(x)
    parts = joined.view(*joined.shape[:2], p.spec.heads, -1).chunk(3, -1)
    q, k, v = (t.reshape(*joined.shape[:2], -1) for t in parts)
    return q, k, v


def _key_and_value(p: Any, x: Tensor, source: Tensor) -> Triple:
    parts = _fused(p, source, "kv")
    return p.linear("q")(x), parts["k"], parts["v"]


def _convolution(p: Any, x: Tensor, source: Tensor) -> Triple:
    def one(name: str, item: Tensor) -> Tensor:
        weight = p.param(f"c_{name}", p.raw[name].unsqueeze(-1))
        out = F.conv1d(item.transpose(1, 2), weight, p.param(f"b_{name}", p.raw["b" + name]))
        return out.transpose(1, 2)

    return one("q", x), one("k", source), one("v", source)


def _same_widths(spec: Spec) -> bool:
    return spec.group == 1 and spec.width == spec.value_width and not spec.cross


PROJECTIONS = (
    Edit("project", "modules", _modules),
    Edit("project", "functional", _functional),
    Edit("project", "matmul", _matmul),
    Edit("project", "addmm", _addmm),
    Edit("project", "einsum", _einsum),
    Edit("project", "split", _split, lambda s, c: not s.cross),
    Edit("project", "split_reordered", _split_reordered, lambda s, c: not s.cross),
    Edit("project", "slices", _slices, lambda s, c: not s.cross),
    Edit("project", "chunk", _chunk, lambda s, c: _same_widths(s)),
    Edit("project", "unbind", _unbind, lambda s, c: _same_widths(s)),
    Edit("project", "by_head", _by_head, lambda s, c: _same_widths(s)),
    Edit("project", "key_and_value", _key_and_value),
    Edit("project", "convolution", _convolution),
)


def _view_transpose(t: Tensor, heads: int, names: str) -> Laid:
    b, n, _ = t.shape
    return Laid(t.reshape(b, n, heads, -1).transpose(1, 2), "b" + names[0] + names[1:])


def _view_permute(t: Tensor, heads: int, names: str) -> Laid:
    b, n, width = t.shape
    return Laid(t.reshape(b, n, heads, width // heads).permute(0, 2, 1, 3), "b" + names)


def _unflatten(t: Tensor, heads: int, names: str) -> Laid:
    return Laid(unflatten(t, -1, (heads, -1)), "b" + names[1] + names[0] + names[2])


def _unflatten_moved(t: Tensor, heads: int, names: str) -> Laid:
    return Laid(unflatten(t, -1, (heads, -1)).movedim(2, 1), "b" + names)


def _heads_first(t: Tensor, heads: int, names: str) -> Laid:
    b, n, _ = t.shape
    return Laid(t.reshape(b, n, heads, -1).permute(2, 0, 1, 3), names[0] + "b" + names[1:])


def _stacked(t: Tensor, heads: int, names: str) -> Laid:
    return Laid(torch.stack(t.chunk(heads, -1), 1), "b" + names)


def _folded(t: Tensor, heads: int, names: str) -> Laid:
    b, n, width = t.shape
    moved = t.reshape(b, n, heads, width // heads).transpose(1, 2)
    return Laid(moved.reshape(b * heads, n, width // heads), "f" + names[1:])


def _tokens_first(t: Tensor, heads: int, names: str) -> Laid:
    b, n, width = t.shape
    moved = t.transpose(0, 1).contiguous().view(n, b * heads, width // heads)
    return Laid(moved.transpose(0, 1), "f" + names[1:])


def _plain_heads(spec: Spec) -> bool:
    return spec.group == 1


SPLITS = (
    Edit("split", "view_transpose", _view_transpose),
    Edit("split", "view_permute", _view_permute),
    Edit("split", "unflatten", _unflatten),
    Edit("split", "unflatten_moved", _unflatten_moved),
    Edit("split", "heads_first", _heads_first),
    Edit("split", "stacked", _stacked),
    Edit("split", "folded", _folded, lambda s, c: _plain_heads(s)),
    Edit("split", "tokens_first", _tokens_first, lambda s, c: _plain_heads(s)),
)


def _output(p: Any, o: Tensor) -> Tensor:
    return p.linear("o")(o)  # type: ignore[no-any-return]


def _output_functional(p: Any, o: Tensor) -> Tensor:
    return F.linear(o, p.param("w_o", p.raw["o"]), p.param("b_o", p.raw["bo"]))


def _output_matmul(p: Any, o: Tensor) -> Tensor:
    out: Tensor = o @ p.param("wt_o", p.raw["o"].t().contiguous()) + p.param("b_o", p.raw["bo"])
    return out


def _output_einsum(p: Any, o: Tensor) -> Tensor:
    weight = p.param("heads_o", unflatten(p.raw["o"], 1, (p.spec.heads, -1)).contiguous())
    split = unflatten(o, -1, (p.spec.heads, -1))
    return torch.einsum("bnhe,che->bnc", split, weight) + p.param("b_o", p.raw["bo"])  # type: ignore[no-any-return]


OUTPUTS = (
    Edit("output", "module", _output),
    Edit("output", "functional", _output_functional),
    Edit("output", "matmul", _output_matmul),
    Edit("output", "einsum", _output_einsum),
)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A module with these weights."""
    out = nn.Linear(weight.shape[1], weight.shape[0])
    out.weight, out.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return out
