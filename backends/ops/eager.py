"""Whether a call may skip the operators: plain tensors, nothing that records or transforms.

Dispatching an operator costs more than a decode step, so single steps call the raw kernel when
nobody watches. This is the only place here that reads torch's private state.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unwatched(*tensors: Tensor | None) -> bool:
    """True for plain CPU or GPU tensors outside autograd, tracing, vmap and dispatch modes."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return only_recorded(*tensors)


def only_recorded(*tensors: Tensor | None) -> bool:
    """True for plain tensors that at most autograd watches: an autograd function may serve them."""
    if torch.compiler.is_compiling():
        return False
    if any(x is not None and type(x) not in _PLAIN for x in tensors):
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


_PLAIN = (Tensor, torch.nn.Parameter)
