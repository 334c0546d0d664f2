"""Spellings of softmax, dropout, the sum over values, merging heads; things of no effect."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rewriter.passes.fuzz.edit import Edit
from rewriter.passes.fuzz.laid import Laid, Tensor


def _operator(p: Any, s: Laid) -> Laid:
    return s.of(torch.softmax(s.data, s.dim("m")))


def _negative(p: Any, s: Laid) -> Laid:
    return s.of(F.softmax(s.data, dim=s.dim("m") - len(s.letters)))


def _module(p: Any, s: Laid) -> Laid:
    return s.of(nn.Softmax(dim=s.dim("m"))(s.data))


def _dtype(p: Any, s: Laid) -> Laid:
    return s.of(F.softmax(s.data, dim=s.dim("m"), dtype=torch.float32).to(s.data.dtype))


def _upcast(p: Any, s: Laid) -> Laid:
    return s.of(s.data.float().softmax(s.dim("m")).type_as(s.data))


def _double(p: Any, s: Laid) -> Laid:
    return s.of(torch.softmax(s.data.double(), s.dim("m")).to(s.data.dtype))


def _exponentials(p: Any, s: Laid) -> Laid:
    d = s.dim("m")
    top = torch.exp(s.data - s.data.amax(d, keepdim=True))
    return s.of(top / top.sum(d, keepdim=True))


def _exponentials_max(p: Any, s: Laid) -> Laid:
    d = s.dim("m")
    x = s.data - s.data.max(dim=d, keepdim=True).values
    e = x.exp()
    return s.of(e / e.sum(dim=d).unsqueeze(d))


def _exponentials_detached(p: Any, s: Laid) -> Laid:
    d = s.dim("m")
    e = torch.exp(s.data - torch.max(s.data, d, keepdim=True)[0].detach())
    return s.of(e * (1.0 / torch.sum(e, d, keepdim=True)))


def _reciprocal(p: Any, s: Laid) -> Laid:
    d = s.dim("m")
    e = torch.exp(s.data - s.data.amax(dim=(d,), keepdim=True))
    return s.of(e * e.sum(d, True).reciprocal())


def _logarithmic(p: Any, s: Laid) -> Laid:
    return s.of(F.log_softmax(s.data, s.dim("m")).exp())


def _log_sum(p: Any, s: Laid) -> Laid:
    d = s.dim("m")
    return s.of(torch.exp(s.data - torch.logsumexp(s.data, d, keepdim=True)))


def _shifted(p: Any, s: Laid) -> Laid:
    """The maximum is subtracted before an ordinary softmax."""
    d = s.dim("m")
    return s.of(torch.softmax(s.data - s.data.amax(d, keepdim=True), d))


def _turned(p: Any, s: Laid) -> Laid:
    """The softmax axis is moved first and back."""
    d = s.dim("m")
    return s.of(s.data.transpose(0, d).softmax(0).transpose(0, d))


def _clamped(p: Any, s: Laid) -> Laid:
    """Against rows without keys."""
    return s.of(torch.nan_to_num(torch.softmax(s.data, s.dim("m"))))


SOFTMAXES = tuple(
    Edit("softmax", f.__name__.removeprefix("_"), f)
    for f in (
        _operator,
        _negative,
        _module,
        _dtype,
        _upcast,
        _double,
        _exponentials,
        _exponentials_max,
        _exponentials_detached,
        _reciprocal,
        _logarithmic,
        _log_sum,
        _shifted,
        _turned,
        _clamped,
    )
)


def _dropout(p: Any, w: Laid) -> Laid:
    return w.of(F.dropout(w.data, p.spec.dropout, p.training))


def _dropout_module(p: Any, w: Laid) -> Laid:
    return w.of(p.child("dropout", lambda: nn.Dropout(p.spec.dropout))(w.data))


def _torch_dropout(p: Any, w: Laid) -> Laid:
    return w.of(torch.dropout(w.data, p.spec.dropout, p.training))


DROPOUTS = (
    Edit("dropout", "function", _dropout),
    Edit("dropout", "module", _dropout_module),
    Edit("dropout", "torch", _torch_dropout),
)


def together(p: Any, w: Laid, v: Laid) -> tuple[Laid, Laid]:
    """Probabilities and values with the same head letters and folding."""
    if "f" in w.letters or "f" in v.letters:
        w, v = w.unfold(p.spec.heads), v.unfold(p.spec.heads)
    if "x" in v.letters:
        return w.grouped(p.spec.kv_heads), v
    return w.ungrouped(), v


def _matmul(p: Any, w: Laid, v: Laid) -> Laid:
    if "f" in w.letters and "f" in v.letters:
        return Laid(w.to("fnm").data @ v.to("fme").data, "fne")
    w, v = together(p, w, v)
    if "x" in v.letters:
        return Laid(w.to("bxgnm").data @ v.to("bxme").data.unsqueeze(2), "bxgne")
    return Laid(torch.matmul(w.to("bhnm").data, v.to("bhme").data), "bhne")


def _bmm(p: Any, w: Laid, v: Laid) -> Laid:
    w, v = together(p, w, v)
    if "x" in v.letters:
        return _matmul(p, w, v)
    return Laid(torch.bmm(w.fold().to("fnm").data, v.fold().to("fme").data), "fne")


def _einsum(order: str) -> Any:
    def write(p: Any, w: Laid, v: Laid) -> Laid:
        w, v = together(p, w, v)
        out = order.replace("h", "xg") if "x" in v.letters else order
        return Laid(torch.einsum(f"{w.letters},{v.letters}->{out}", w.data, v.data), out)

    return write


def _values_first(p: Any, w: Laid, v: Laid) -> Laid:
    """V^T P^T."""
    w, v = together(p, w, v)
    if "x" in v.letters:
        return _matmul(p, w, v)
    return Laid(v.to("bhem").data @ w.to("bhmn").data, "bhen")


def _reversed(p: Any, w: Laid, v: Laid) -> Laid:
    """(V^T P^T)^T."""
    w, v = together(p, w, v)
    if "x" in v.letters:
        return _matmul(p, w, v)
    return Laid((v.to("bhem").data @ w.to("bhmn").data).mT, "bhne")


MIXES = (
    Edit("mix", "matmul", _matmul),
    Edit("mix", "bmm", _bmm),
    Edit("mix", "einsum", _einsum("bhne")),
    Edit("mix", "einsum_bnhe", _einsum("bnhe")),
    Edit("mix", "einsum_nbhe", _einsum("nbhe")),
    Edit("mix", "einsum_hbne", _einsum("hbne")),
    Edit("mix", "values_first", _values_first),
    Edit("mix", "reversed", _reversed),
)


def _reshape(p: Any, o: Laid) -> Tensor:
    o = o.unfold(p.spec.heads).ungrouped().to("bnhe", transposes=True)
    return o.data.reshape(o.size("b"), o.size("n"), -1)


def _view(p: Any, o: Laid) -> Tensor:
    o = o.unfold(p.spec.heads).ungrouped().to("bnhe")
    return o.data.contiguous().view(o.size("b"), o.size("n"), o.size("h") * o.size("e"))


def _flatten(p: Any, o: Laid) -> Tensor:
    return o.unfold(p.spec.heads).ungrouped().to("bnhe").data.flatten(2)


def _concatenate(p: Any, o: Laid) -> Tensor:
    o = o.unfold(p.spec.heads).ungrouped().to("bhne")
    return torch.cat(o.data.unbind(1), -1)


MERGES = (
    Edit("merge", "reshape", _reshape),
    Edit("merge", "view", _view),
    Edit("merge", "flatten", _flatten),
    Edit("merge", "concatenate", _concatenate),
)


def _of_no_effect(slot: str) -> tuple[Edit, ...]:
    return tuple(
        Edit(slot, name, write)
        for name, write in (
            ("nothing", lambda p, t: t),
            ("contiguous", lambda p, t: t.of(t.data.contiguous())),
            ("clone", lambda p, t: t.of(t.data.clone())),
            ("same_type", lambda p, t: t.of(t.data.to(torch.float32))),
            ("times_one", lambda p, t: t.of(t.data * 1.0)),
            ("insert", lambda p, t: t.of(t.data.unsqueeze(1).squeeze(1))),
            ("back_and_forth", lambda p, t: t.of(t.data.transpose(0, 1).transpose(0, 1))),
            ("same_shape", lambda p, t: t.of(t.data.view_as(t.data))),
            ("expand", lambda p, t: t.of(t.data.expand_as(t.data))),
            ("full_slice", lambda p, t: t.of(t.data[:, :])),
            ("plus_zero", lambda p, t: t.of(t.data + 0.0)),
            ("reshaped", lambda p, t: t.of(t.data.reshape(t.data.shape))),
        )
    )


NOTHINGS = tuple(_of_no_effect(f"at_{place}") for place in ("query", "scores", "weights", "output"))

RESIDUALS = (
    Edit("residual", "after", lambda p, x, y: x + y),
    Edit("residual", "before", lambda p, x, y: y + x),
    Edit("residual", "in_place", lambda p, x, y: y.add_(x)),
)
