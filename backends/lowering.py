"""Windows with a carried state, lowered onto the generated kernels.

A whole sequence without padding runs generated; steps, padded batches and branch ablation are the
reference's. The joint form is two kernels, the near part with its largest scores and the far field,
put together by their one normaliser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from rewriter.backends.calls import block_sparse, declines
from rewriter.backends.joint import JointForm, JointTraining, mixed, parts
from rewriter.backends.ops.codec import encode
from rewriter.backends.ops.eager import only_recorded, unwatched
from rewriter.backends.reference.joint import joint_window_linear
from rewriter.backends.reference.near import Context, context_of, next_state
from rewriter.backends.reference.sinks import gather_sinks
from rewriter.backends.reference.window import window_attention
from rewriter.ir.block_sparse import CAUSAL, BlockSparse
from rewriter.ir.kernels import JointWindowLinear, WindowAttention
from rewriter.ir.mask import I, J
from rewriter.ir.recurrence import Recurrence
from rewriter.ir.state import State


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache(maxsize=256)
def lowered(spec: WindowAttention, key_dim: int, value_dim: int) -> BlockSparse | str:
    """The block-sparse form of a window over a sequence that starts here, or why there is none."""
    if spec.hidden:
        return "a window with a branch switched off has no block-sparse form"
    if spec.mean:
        return "a window with a mean of the other keys has no block-sparse form"
    seen = _within(spec.window, spec.causal)
    if spec.sinks:
        seen = sympy.Or(seen, sympy.Lt(J, spec.sinks))
    if spec.limit is not None:
        seen = sympy.And(seen, _within(spec.limit, spec.causal))
    mask = sympy.And(CAUSAL, seen) if spec.causal else seen
    return BlockSparse(key_dim, value_dim, spec.scale, mask, spec.softcap)


def _within(size: int, causal: bool) -> Boolean:
    before = sympy.Lt(I - J, size)
    return before if causal else sympy.And(before, sympy.Lt(J - I, size))


def window(
    backend: str,
    spec: WindowAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """A whole sequence without padding runs generated; the rest is the reference's."""
    n = q.shape[-2]
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    whole = n > 1 and valid is None and bias is None and (state is None or _fresh(state))
    form = lowered(spec, q.shape[-1], v.shape[-1]) if whole else None
    text = _served(backend, spec, q.shape[-1], v.shape[-1], v.dtype, grad) if whole else None
    if text is None or not isinstance(form, BlockSparse):
        return window_attention(spec, q, k, v, valid=valid, bias=bias, state=state)
    out, _ = block_sparse(backend, form, text, q, k, v)
    return out, None if state is None else _after(spec, k, v, state)


def _after(spec: WindowAttention, k: Tensor, v: Tensor, state: State) -> State:
    """The near state after these keys and values, none of them padding."""
    sinks = gather_sinks(spec.sinks, k, v, None, state)
    context = Context(*context_of(spec, k, v, None, state), sinks)
    return next_state(spec, context, state, k.shape[-2])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _served(
    backend: str,
    spec: WindowAttention,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    needs_grad: bool,
) -> str | None:
    """The block-sparse form as text, or None where the backend does not serve it."""
    form = lowered(spec, key_dim, value_dim)
    if isinstance(form, str) or declines(backend, "block_sparse", form, dtype, needs_grad):
        return None
    return encode(form)


def _fresh(state: State) -> bool:
    """Whether no token was seen; unknown while a graph is traced, hence no."""
    if torch.compiler.is_compiling():
        return False
    return not bool(state["seen"].any())


def joint_form(
    spec: JointWindowLinear, key_dim: int, value_dim: int
) -> tuple[BlockSparse, Recurrence]:
    """The near part, and the far field whose values carry a column of ones."""
    near = lowered(_near(spec), key_dim, value_dim)
    assert isinstance(near, BlockSparse)
    return near, Recurrence(spec.features, value_dim + 1, read="exclusive")


def _near(spec: JointWindowLinear) -> WindowAttention:
    return WindowAttention(spec.window, spec.sinks, True, spec.scale, spec.softcap)


def joint(
    backend: str,
    spec: JointWindowLinear,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    key_features: Callable[[Tensor], Tensor],
    ratio: Tensor,
    *,
    valid: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State | None]:
    """As the reference's `joint_window_linear`; whole sequences run generated, gradients too."""
    n = q.shape[-2]
    tensors = (q, k, v, fq, ratio)
    plain = unwatched(*tensors)
    trains = not plain and state is None and only_recorded(*tensors)
    form = None
    if (
        n > spec.window
        and valid is None
        and not spec.hidden
        and (plain or trains)
        and (state is None or _fresh(state))
    ):
        form = _joint(backend, spec, q.shape[-1], v.shape[-1], v.dtype, trains)
    if form is None:
        return joint_window_linear(spec, q, k, v, fq, key_features, ratio, valid=valid, state=state)
    q, k = q.to(v.dtype), k.to(v.dtype)
    features = key_features(k[:, :, : n - form.late])
    if not unwatched(*tensors, features):
        out: Tensor = JointTraining.apply(form, q, k, v, fq, features, ratio)  # type: ignore[no-untyped-call]
        return out, None
    start = None if state is None else state["far"]
    x = parts(form, q, k, v, fq, features, start, keep=state is not None)
    out = mixed(form, x, ratio)
    return out, None if state is None else {**_after(_near(spec), k, v, state), "far": x.end}


@lru_cache(maxsize=256)
def _joint(
    backend: str,
    spec: JointWindowLinear,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    needs_grad: bool,
) -> JointForm | None:
    """The two kernels of a joint form, or None where the backend lacks one."""
    near, far = joint_form(spec, key_dim, value_dim)
    if declines(backend, "block_sparse", near, dtype, needs_grad):
        return None
    if not spec.factors and declines(backend, "recurrence", far, torch.float32, needs_grad):
        return None
    return JointForm(backend, spec, near, far)
