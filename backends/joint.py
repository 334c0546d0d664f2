"""`JointWindowLinear` on generated kernels: near part, far field, one normaliser; its backward.

With A the softmax over the near keys, a = exp(lse - m), F the exclusive read of the far keys whose
values carry a column of ones (F_1), and D = a + r F_1:

    o = (a A + r F) / D
    dA = a dO / D,   dF = r [dO, -dO.o] / D,   dr = sum F [dO, -dO.o] / D
    dS = P (V dA - dA.o)                       what A and a give together, P = exp(S - lse)
    dm = dA.o - dA.A                           at the key with the largest score

so the backward of the block-sparse kernel runs with o in the place of A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.calls import raw_kernels
from rewriter.backends.inputs import BlockSparseInputs, RecurrenceInputs
from rewriter.backends.reference.factored import scan_factored
from rewriter.backends.reference.precision import full_precision
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.kernels import JointWindowLinear
from rewriter.ir.recurrence import Recurrence


@dataclass(frozen=True)
class JointForm:
    """A spec as two generated kernels.

    Attributes:
        backend: a name of `ops.choice.GENERATED`.
        spec: the joint form.
        near: sinks and window, block-sparse.
        far: the linear branch, its values one column wider, read before the token is written.
            Features in factors have no kernel: products of torch read them.
    """

    backend: str
    spec: JointWindowLinear
    near: BlockSparse
    far: Recurrence

    @property
    def late(self) -> int:
        """Token t reads the keys up to t - window: an exclusive read so many tokens late."""
        return self.spec.window - 1


@dataclass(frozen=True)
class Parts:
    """What a call computed: softmax over the near keys, log-sum-exp, largest score, far read."""

    out: Tensor
    lse: Tensor
    top: Tensor
    far: Tensor
    end: Tensor


def parts(
    form: JointForm, q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, start: Tensor | None,
    keep: bool,
) -> Parts:  # fmt: skip
    """Both kernels on a whole sequence without padding.

    Args:
        q, k, v: (B, H, n, Dk), (B, Hkv, n, Dk), (B, Hkv, n, Dv) of one dtype, n > window.
        fq: (B, H, n, m) features of the queries.
        fk: (B, Hkv, n - window + 1, m) features of the keys that leave the window.
        start: (B, Hkv, m, Dv + 1) float32 far state, None for zero.
        keep: whether the far state behind the sequence is wanted.
    """
    top = torch.empty(q.shape[:-1], dtype=torch.float32)
    out, lse = raw_kernels(form.backend, "block_sparse").forward(
        form.near, BlockSparseInputs(q, k, v), top
    )
    far, end = _read(form, _far_inputs(form, v, fq, fk, start), keep)
    return Parts(out, lse, top, far, end)


def _read(form: JointForm, x: RecurrenceInputs, keep: bool) -> tuple[Tensor, Tensor]:
    """The far field, and the state behind it if it is to be kept."""
    if form.spec.factors:
        return scan_factored(x.q, x.k, x.v, form.spec.factors, x.start, keep)
    read: tuple[Tensor, Tensor] = raw_kernels(form.backend, "recurrence").forward(form.far, x)
    return read


def _unread(form: JointForm, x: RecurrenceInputs, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the features of queries and keys and of the values, from that of the read."""
    if not form.spec.factors:
        back = raw_kernels(form.backend, "recurrence").backward(form.far, x, grad, None)
        return back.q, back.k, back.v
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_(True) for t in (x.q, x.k, x.v))
        read, _ = scan_factored(q, k, v, form.spec.factors, keep=False)
    of_q, of_k, of_v = torch.autograd.grad(read, (q, k, v), grad)
    return of_q, of_k, of_v


def mixed(form: JointForm, x: Parts, ratio: Tensor) -> Tensor:
    """o, (B, H, n, Dv) in the dtype of the near part."""
    near = (x.lse - x.top).exp()[..., None]
    mass = torch.cat((x.out.float() * near, near), -1)
    mass[:, :, form.late :] += ratio.float()[None, :, None, None] * x.far
    return (mass[..., :-1] / mass[..., -1:]).to(x.out.dtype)


def _far_inputs(
    form: JointForm, v: Tensor, fq: Tensor, fk: Tensor, start: Tensor | None
) -> RecurrenceInputs:
    values = F.pad(v[:, :, : fk.shape[2]].float(), (0, 1), value=1.0)
    values[:, :, : form.spec.sinks] = 0.0
    return RecurrenceInputs(fq[:, :, form.late :].float(), fk.float(), values, start=start)


class JointTraining(torch.autograd.Function):
    """`mixed(parts(...))` with gradients of all tensors; (form, q, k, v, fq, fk, ratio)."""

    @staticmethod
    def forward(
        ctx: Any, form: JointForm, q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor,
        ratio: Tensor,
    ) -> Tensor:  # fmt: skip
        x = parts(form, q, k, v, fq, fk, None, keep=False)
        out = mixed(form, x, ratio)
        ctx.form = form
        ctx.save_for_backward(q, k, v, fq, fk, ratio, out, x.out, x.lse, x.top, x.far)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        form: JointForm = ctx.form
        q, k, v, fq, fk, ratio, out, near, lse, top, far = ctx.saved_tensors
        of_inputs = any(ctx.needs_input_grad[1:4])
        with full_precision(q.device):
            grad = grads[0].float()
            weight = (lse - top).exp()[..., None]
            scale = ratio.float()[None, :, None, None]
            mass = weight.clone()
            mass[:, :, form.late :] += scale * far[..., -1:]
            share = grad / mass
            along = (share * out.float()).sum(-1, keepdim=True)
            of_far = torch.cat((share, -along), -1)[:, :, form.late :]
            of_ratio = (far * of_far).sum((0, 2, 3)).to(ratio.dtype)
            x = _far_inputs(form, v, fq, fk, None)
            linear_q, linear_k, linear_v = _unread(form, x, scale * of_far)
            of_fq = F.pad(linear_q, (0, 0, form.late, 0)).to(fq.dtype)
            of_fk = linear_k.to(fk.dtype)
            if not of_inputs:
                return None, None, None, None, of_fq, of_fk, of_ratio
            of_near = weight * share
            of_top = weight[..., 0] * along[..., 0] - (of_near * near.float()).sum(-1)
            soft = raw_kernels(form.backend, "block_sparse").backward(
                form.near, BlockSparseInputs(q, k, v), out, lse, of_near.to(v.dtype)
            )
            dq, dk = _through_top(form.spec, q, k, top, of_top)
            dv = soft.v.float()
            read = linear_v[..., :-1]
            read[:, :, : form.spec.sinks] = 0.0
            dv[:, :, : read.shape[2]] += read
            return (
                None,
                (dq + soft.q.float()).to(q.dtype),
                (dk + soft.k.float()).to(k.dtype),
                dv.to(v.dtype),
                of_fq,
                of_fk,
                of_ratio,
            )


def _through_top(
    spec: JointWindowLinear, q: Tensor, k: Tensor, top: Tensor, of_top: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, float32, of each query's largest near score."""
    B, H, n, width = q.shape
    Hkv = k.shape[1]
    factor = of_top * spec.scale
    if spec.softcap is not None:
        factor = factor * (1 - (top / spec.softcap).square())
    at = _largest(spec, q, k).reshape(B, Hkv, -1, 1).expand(-1, -1, -1, width)
    keys = k.float()
    dq = keys.gather(2, at).view(B, H, n, width) * factor[..., None]
    moved = (q.float() * factor[..., None]).reshape(B, Hkv, -1, width)
    return dq, torch.zeros_like(keys).scatter_add_(2, at, moved)


def _largest(spec: JointWindowLinear, q: Tensor, k: Tensor) -> Tensor:
    """(B, H, n) int64: the near key with the largest score of each query."""
    B, H, n, width = q.shape
    Hkv, left = k.shape[1], spec.window - 1
    size = max(16, spec.window)
    count = -(-n // size)
    tail = size * count - n
    rows = F.pad(q.float() * spec.scale, (0, 0, 0, tail))
    rows = rows.view(B, Hkv, H // Hkv, count, size, width).transpose(2, 3)
    keys = F.pad(k.float(), (0, 0, left, tail)).unfold(2, left + size, size)
    scores = rows.reshape(B, Hkv, count, -1, width) @ keys
    distance = torch.arange(size)[:, None] + left - torch.arange(left + size)
    seen = (distance >= 0) & (distance < spec.window)
    # Slots before the first key: only the first block has them.
    seen = seen.expand(count, size, -1).clone()
    seen[0, :, :left] = False
    scores = scores.view(B, Hkv, count, -1, size, left + size)
    scores = scores.masked_fill_(~seen[:, None], -torch.inf)
    best, at = scores.max(-1)
    at += (torch.arange(count) * size - left)[:, None, None]
    best, at = (t.transpose(2, 3).reshape(B, H, count * size)[:, :, :n] for t in (best, at))
    if spec.sinks > 0:
        sunk = k[:, :, : spec.sinks].float().transpose(-1, -2)
        others = q.reshape(B, Hkv, -1, width).float() * spec.scale @ sunk
        others = others.view(B, H, n, -1)
        later = torch.arange(sunk.shape[-1]) > torch.arange(n)[:, None]
        top, sink = others.masked_fill_(later, -torch.inf).max(-1)
        at = torch.where(top > best, sink, at)
    return at
