"""The backends that generate code, as the registry sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rewriter.backends import calls, lowering
from rewriter.backends.calls import declines, text_of
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.decode import Decode
from rewriter.ir.kernels import JointWindowLinear, KernelSpec, WindowAttention
from rewriter.ir.long_conv import LongConv
from rewriter.ir.recurrence import Recurrence

if TYPE_CHECKING:
    from rewriter.backends.registry import Query

_WIDTH = 64  # of a head, where a spec does not say it


def kernel(backend: str, spec: KernelSpec) -> Callable[..., Any]:
    """The kernel of a spec on a generated backend, its spec bound."""
    if isinstance(spec, Recurrence):
        padded = text_of(calls.per_token(spec))
        return partial(calls.recurrence, backend, spec, text_of(spec), padded)
    if isinstance(spec, BlockSparse):
        return partial(calls.block_sparse, backend, spec, text_of(spec))
    if isinstance(spec, Decode):
        return partial(calls.decode, backend, spec, text_of(spec))
    if isinstance(spec, WindowAttention):
        return partial(lowering.window, backend, spec)
    assert isinstance(spec, JointWindowLinear)
    return partial(lowering.joint, backend, spec)


def refusal(backend: str, spec: KernelSpec, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why a generated backend cannot serve a spec, as one sentence, or None if it can."""
    if isinstance(spec, Recurrence):
        return declines(backend, "recurrence", spec, dtype, needs_grad)
    if isinstance(spec, BlockSparse):
        return declines(backend, "block_sparse", spec, dtype, needs_grad)
    if isinstance(spec, Decode):
        return declines(backend, "decode", spec, dtype, needs_grad)
    if isinstance(spec, LongConv):
        return "long convolutions have no generated kernel"
    # Windows say no head width: the call knows it, and falls back where it does not fit.
    if isinstance(spec, WindowAttention):
        form = lowering.lowered(spec, _WIDTH, _WIDTH)
        if isinstance(form, str):
            return form
        return declines(backend, "block_sparse", form, dtype, needs_grad)
    return _joint_refusal(backend, spec, dtype, needs_grad)


def _joint_refusal(
    backend: str, spec: JointWindowLinear, dtype: torch.dtype, needs_grad: bool
) -> str | None:
    if backend != "cpu":
        return "the joint window and linear form has no kernel there"
    if spec.hidden:
        return "a form with a branch switched off has no generated kernel"
    near, far = lowering.joint_form(spec, _WIDTH, _WIDTH)
    reason = declines(backend, "block_sparse", near, dtype, needs_grad)
    return reason or declines(backend, "recurrence", far, torch.float32, needs_grad)


@dataclass(frozen=True)
class GeneratedBackend:
    """A backend whose kernels are generated for a spec the first time it is used.

    Attributes:
        name: a name of `ops.choice.GENERATED`.
        device: device type it makes code for.
        priority: higher is asked first.
    """

    name: str
    device: str
    priority: int

    def decline(self, query: Query) -> str | None:
        if query.device != self.device:
            return f"it makes code for {self.device} devices, not for {query.device}"
        return refusal(self.name, query.spec, query.dtype, query.needs_grad)

    def kernel(self, query: Query) -> Callable[..., Any]:
        return kernel(self.name, query.spec)
