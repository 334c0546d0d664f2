"""The operators of small regions: `gated_linear` and `norm` of `attention_rewriter`.

They have no gradients: whoever puts them in a model leaves calls that need some to the original.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rewriter.backends.cpu import gated_block
from rewriter.backends.cpu import linear as linears
from rewriter.backends.cpu import norm as norms
from rewriter.backends.ops.eager import unwatched


def gated_linear(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    activation: str,
) -> Tensor:
    """f(x G^T + c) * (x U^T + b): (..., N) for x (..., K), G and U (N, K), c and b (N) or None.

    Args:
        gate, up: weight and bias, of the dtype of x and with the same strides, on the CPU.
        activation: a name in `backends.cpu.linear.GATES`.
    """
    if unwatched(x, *gate, *up):
        return linears.gated(x, *up, linears.Gate(*gate, activation))
    out: Tensor = gated_operator(x, *gate, *up, activation)
    return out


def whole_gated(
    x: Tensor,
    gate: tuple[Tensor, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    activation: str,
) -> Tensor | None:
    """`gated_linear` and the projection behind it, (..., M), or None where no kernel does both.

    Args:
        down: weight (M, N) and bias (M) or None; the rest as `gated_linear`.
    """
    if not unwatched(x, *gate, *up, *down) or gated_block.decline(x, up[0], down[0]) is not None:
        return None
    return gated_block.forward(x, linears.Gate(*gate, activation), *up, *down)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: norms.NormForm) -> Tensor:
    """x (..., C) normalised over its last dimension; see `backends.cpu.norm`."""
    if unwatched(x, weight, bias):
        return norms.forward(x, weight, bias, form)
    out: Tensor = norm_operator(x, weight, bias, form.eps, form.centred, form.offset, form.early)
    return out


def plain(x: object, *others: Tensor | None) -> bool:
    """Whether a call is one that these operators take: CPU tensors of one dtype, no gradients."""
    return (
        isinstance(x, Tensor)
        and x.device.type == "cpu"
        and x.dtype in norms.NAMES
        and x.dim() > 0
        and all(o is None or (o.dtype, o.device) == (x.dtype, x.device) for o in others)
        and not any(is_traceable_wrapper_subclass(t) for t in (x, *others) if t is not None)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@torch.library.custom_op("attention_rewriter::gated_linear", mutates_args=())
def gated_operator(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Contiguous (..., N). Args: as `gated_linear`."""
    return linears.gated(x, up, up_bias, linears.Gate(gate, gate_bias, activation))


@gated_operator.register_fake
def _gated_fake(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], up.shape[0]))


@torch.library.custom_op("attention_rewriter::norm", mutates_args=())
def norm_operator(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    early: bool,
) -> Tensor:
    """Contiguous, shaped as x. Args: as `norm`."""
    return norms.forward(x, weight, bias, norms.NormForm(eps, centred, offset, early))


@norm_operator.register_fake
def _norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    offset: float,
    early: bool,
) -> Tensor:
    return x.new_empty(x.shape)
