"""Spellings of scaling, head repetition, the product of queries and keys, and the soft-cap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from rewriter.passes.fuzz.edit import Edit
from rewriter.passes.fuzz.laid import Laid, Tensor
from rewriter.passes.fuzz.spec import Spec

Scaled = tuple[Laid, Laid, float]
"""Queries, keys, and the factor that is left for the scores."""


def _on_scores(p: Any, q: Laid, k: Laid) -> Scaled:
    return q, k, p.spec.scale


def _on_query(p: Any, q: Laid, k: Laid) -> Scaled:
    return q.of(q.data * p.spec.scale), k, 1.0


def _on_key(p: Any, q: Laid, k: Laid) -> Scaled:
    return q, k.of(k.data * p.spec.scale), 1.0


def _divided_query(p: Any, q: Laid, k: Laid) -> Scaled:
    return q.of(q.data / (1 / p.spec.scale)), k, 1.0


def _root_on_both(p: Any, q: Laid, k: Laid) -> Scaled:
    root = math.sqrt(p.spec.scale)
    return q.of(q.data * root), k.of(k.data * root), 1.0


def _divided_both(p: Any, q: Laid, k: Laid) -> Scaled:
    root = p.spec.scale**-0.5
    return q.of(q.data / root), k.of(k.data / root), 1.0


def _query_and_scores(p: Any, q: Laid, k: Laid) -> Scaled:
    return q.of(q.data * 0.5), k, 2 * p.spec.scale


def _tensor_on_query(p: Any, q: Laid, k: Laid) -> Scaled:
    factor = torch.full((1,), p.spec.scale, dtype=q.data.dtype)
    return q.of(q.data * factor), k, 1.0


SCALES = (
    Edit("scale", "on_scores", _on_scores),
    Edit("scale", "on_query", _on_query),
    Edit("scale", "on_key", _on_key),
    Edit("scale", "divided_query", _divided_query),
    Edit("scale", "root_on_both", _root_on_both),
    Edit("scale", "divided_both", _divided_both),
    Edit("scale", "query_and_scores", _query_and_scores),
    Edit("scale", "tensor_on_query", _tensor_on_query),
)


def _mul(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(s.data * factor)


def _mul_before(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(factor * s.data)


def _div(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(s.data / (1 / factor))


def _div_root(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(s.data / math.sqrt(1 / factor**2))


def _div_tensor(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(s.data / torch.sqrt(torch.full((), factor**-2, dtype=s.data.dtype)))


def _mul_constant(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(s.data * torch.tensor(factor, dtype=s.data.dtype))


def _in_place(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(s.data.mul_(factor))


def _twice(p: Any, s: Laid, factor: float) -> Laid:
    return s.of(s.data * (factor * 4) / 4)


FACTORS = (
    Edit("factor", "mul", _mul),
    Edit("factor", "mul_before", _mul_before),
    Edit("factor", "div", _div),
    Edit("factor", "div_root", _div_root),
    Edit("factor", "div_tensor", _div_tensor),
    Edit("factor", "mul_constant", _mul_constant),
    Edit("factor", "in_place", _in_place),
    Edit("factor", "twice", _twice),
)


def _interleave(p: Any, t: Laid) -> Laid:
    return _as_heads(t, t.data.repeat_interleave(p.spec.group, t.dim("x")))


def _expand(p: Any, t: Laid) -> Laid:
    at, g = t.dim("x"), p.spec.group
    shape = list(t.data.shape)
    wide = t.data.unsqueeze(at + 1).expand(*shape[: at + 1], g, *shape[at + 1 :])
    return _as_heads(t, wide.reshape(*shape[:at], shape[at] * g, *shape[at + 1 :]))


def _indexed(p: Any, t: Laid) -> Laid:
    near = t.to("bx" + t.letters.replace("b", "").replace("x", ""))
    wide = near.data[:, :, None, :, :].expand(-1, -1, p.spec.group, -1, -1)
    return _as_heads(near, wide.flatten(1, 2))


def _broadcast(p: Any, t: Laid) -> Laid:
    at = t.dim("x")
    shape = [*t.data.shape[: at + 1], p.spec.group, *t.data.shape[at + 1 :]]
    return _as_heads(t, torch.broadcast_to(t.data.unsqueeze(at + 1), shape).flatten(at, at + 1))


def _repeat(p: Any, t: Laid) -> Laid:
    at = t.dim("x")
    times = [1] * (t.data.dim() + 1)
    times[at + 1] = p.spec.group
    return _as_heads(t, t.data.unsqueeze(at + 1).repeat(times).flatten(at, at + 1))


def _stacked(p: Any, t: Laid) -> Laid:
    at = t.dim("x")
    return _as_heads(t, torch.stack([t.data] * p.spec.group, at + 1).flatten(at, at + 1))


def _grouped(p: Any, t: Laid) -> Laid:
    """Nothing is repeated: the product broadcasts over the groups."""
    return t


def _as_heads(t: Laid, data: Tensor) -> Laid:
    return Laid(data, t.letters.replace("x", "h"))


def _has_groups(spec: Spec) -> bool:
    return spec.group > 1


REPEATS = (
    Edit("repeat", "interleave", _interleave),
    Edit("repeat", "expand", _expand),
    Edit("repeat", "indexed", _indexed),
    Edit("repeat", "broadcast", _broadcast),
    Edit("repeat", "repeat", _repeat),
    Edit("repeat", "stacked", _stacked),
    Edit("repeat", "grouped", _grouped, lambda s, c: c["fused"] == "no"),
)


def meeting(p: Any, q: Laid, k: Laid) -> tuple[Laid, Laid]:
    """Queries and keys with the same head letters and folding."""
    if "f" in q.letters or "f" in k.letters:
        q, k = q.unfold(p.spec.heads), k.unfold(p.spec.heads)
    return (q.grouped(p.spec.kv_heads) if "x" in k.letters else q), k


def _lead(k: Laid) -> str:
    return "bx" if "x" in k.letters else "bh"


def _matmul(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
    if "f" in q.letters and q.letters[1:] + k.letters[1:] == "ndmd":
        return Laid(torch.matmul(q.data, k.data.transpose(-1, -2)), "fnm"), factor
    q, k = meeting(p, q, k)
    if "x" in k.letters:
        left, right = q.to("bxgnd").data, k.to("bxdm").data.unsqueeze(2)
        return Laid(left @ right, "bxgnm"), factor
    return Laid(q.to("bhnd").data @ k.to("bhmd").data.transpose(2, 3), "bhnm"), factor


def _matmul_mt(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
    q, k = meeting(p, q, k)
    if "x" in k.letters:
        left, right = q.to("bxgnd").data, k.to("bxmd").data.unsqueeze(2).mT
        return Laid(torch.matmul(left, right), "bxgnm"), factor
    return Laid(torch.matmul(q.to("bhnd").data, k.to("bhmd").data.mT), "bhnm"), factor


def _reversed(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
    """(K Q^T)^T."""
    q, k = meeting(p, q, k)
    return Laid((k.to("bhmd").data @ q.to("bhdn").data).transpose(-1, -2), "bhnm"), factor


def _keys_first(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
    """K Q^T: keys are rows."""
    q, k = meeting(p, q, k)
    return Laid(k.to("bhmd").data @ q.to("bhdn").data, "bhmn"), factor


def _bmm(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
    q, k = q.fold(), k.fold()
    return Laid(torch.bmm(q.data, k.data.transpose(1, 2)), "fnm"), factor


def _baddbmm(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
    q, k = q.fold(), k.fold()
    empty = torch.empty(q.size("f"), q.size("n"), k.size("m"), dtype=q.data.dtype)
    out = torch.baddbmm(empty, q.data, k.data.transpose(1, 2), beta=0.0, alpha=factor)
    return Laid(out, "fnm"), 1.0


def _baddbmm_zero(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
    q, k = q.fold(), k.fold()
    zero = torch.zeros(1, 1, k.size("m"), dtype=q.data.dtype)
    return Laid(torch.baddbmm(zero, q.data, k.data.mT, alpha=factor), "fnm"), 1.0


def _einsum(order: str, ellipsis: bool = False) -> Callable[..., tuple[Laid, float]]:
    def write(p: Any, q: Laid, k: Laid, factor: float) -> tuple[Laid, float]:
        q, k = meeting(p, q, k)
        out = order.replace("h", "xg") if "x" in k.letters else order
        left, right = q.letters, k.letters
        if ellipsis and "x" not in k.letters:
            q, k = q.to("bhnd"), k.to("bhmd")
            return Laid(torch.einsum("...nd,...md->...nm", q.data, k.data), "bhnm"), factor
        rename = str.maketrans("bhxgnmd", "zhkgqsc")
        names = f"{left},{right}->{out}".translate(rename)
        return Laid(torch.einsum(names, q.data, k.data), out), factor

    return write


def _no_groups(spec: Spec, chosen: Any) -> bool:
    return spec.group == 1 or chosen.get("repeat") != "grouped"


def _keys_may_lead(spec: Spec, chosen: Any) -> bool:
    """Layouts do not tell query from key tokens, so a transposed bias cannot be compared."""
    return _no_groups(spec, chosen) and spec.position != "alibi"


def _added_in_product(spec: Spec, chosen: Any) -> bool:
    """Whatever is added before a soft-cap is refused."""
    return _no_groups(spec, chosen) and spec.softcap is None


PRODUCTS = (
    Edit("product", "matmul", _matmul),
    Edit("product", "matmul_mt", _matmul_mt),
    Edit("product", "reversed", _reversed, _no_groups),
    Edit("product", "keys_first", _keys_first, _keys_may_lead),
    Edit("product", "bmm", _bmm, _no_groups),
    Edit("product", "baddbmm", _baddbmm, _no_groups),
    Edit("product", "baddbmm_zero", _baddbmm_zero, _added_in_product),
    Edit("product", "einsum", _einsum("bhnm")),
    Edit("product", "einsum_bnhm", _einsum("bnhm")),
    Edit("product", "einsum_hbnm", _einsum("hbnm")),
    Edit("product", "einsum_bhmn", _einsum("bhmn"), lambda s, c: s.position != "alibi"),
    Edit("product", "einsum_mnbh", _einsum("mnbh"), lambda s, c: s.position != "alibi"),
    Edit("product", "einsum_ellipsis", _einsum("bhnm", True)),
)


def _cap_divided(p: Any, s: Laid) -> Laid:
    return s.of(p.spec.softcap * torch.tanh(s.data / p.spec.softcap))


def _cap_multiplied(p: Any, s: Laid) -> Laid:
    return s.of((s.data * (1 / p.spec.softcap)).tanh() * p.spec.softcap)


def _cap_in_steps(p: Any, s: Laid) -> Laid:
    x = s.data / p.spec.softcap
    x = torch.tanh(x)
    return s.of(x * torch.tensor(p.spec.softcap))


CAPS = (
    Edit("softcap", "divided", _cap_divided),
    Edit("softcap", "multiplied", _cap_multiplied),
    Edit("softcap", "in_steps", _cap_in_steps),
)
