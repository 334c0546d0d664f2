"""The operator `attention_rewriter::linear`: a linear layer by whichever code is faster here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rewriter.backends import fastest
from rewriter.backends.cpu import linear as generated
from rewriter.backends.ops.eager import unwatched


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N).

    The same values as `torch.nn.functional.linear` with sums in another order. Where generated code
    is measured to be faster for these sizes on this machine, it runs; else torch's own.
    """
    if not served(x, weight, bias):
        return F.linear(x, weight, bias)
    if unwatched(x, weight, bias):
        return _run(x, weight, bias)
    out: Tensor = operator(x, weight, bias)
    return out


def served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether generated code could run this call: plain tensors of one known dtype, on the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype in generated.NAMES
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == x.dtype)
        and x.dim() > 0
        and not torch.is_autocast_enabled("cpu")
        and not any(is_traceable_wrapper_subclass(t) for t in (x, weight))
    )


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if fastest.linear(x, weight, bias) == "generated":
        return generated.forward(x, weight, bias)
    return F.linear(x, weight, bias)


@torch.library.custom_op("attention_rewriter::linear", mutates_args=())
def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Contiguous (..., N). Args: as `linear`, all of one dtype, on the CPU."""
    return _run(x, weight, bias).contiguous()


@operator.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients are linear layers too: g W, and g^T x."""
    x, weight = ctx.saved_tensors
    to_x = to_weight = to_bias = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        to_x = operator(grad, weight.t(), None)
    if ctx.needs_input_grad[1]:
        to_weight = operator(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        to_bias = rows.sum(0)
    return to_x, to_weight, to_bias


operator.register_autograd(_backward, setup_context=_setup)


@operator.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """Mapped inputs are more rows; mapped weights are a batched product of torch."""
    x, weight, bias = args
    if in_dims[1] is None and (bias is None or in_dims[2] is None):
        return operator(x.movedim(in_dims[0], 0), weight, bias), 0
    n = info.batch_size
    x, weight = (
        t.expand(n, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip((x, weight), in_dims[:2], strict=True)
    )
    out = torch.bmm(x.reshape(n, -1, x.shape[-1]), weight.mT)
    if bias is not None:
        out = out + (bias if in_dims[2] is None else bias.movedim(in_dims[2], 0)[:, None])
    return out.reshape(*x.shape[:-1], weight.shape[1]), 0
