"""Capture: a module becomes an undecomposed ATen graph with symbolic batch and sequence sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rewriter.ir.site import NearMiss


@dataclass(frozen=True)
class Captured:
    """A captured module.

    Attributes:
        graph_module: the pre-dispatch ATen graph; placeholders are parameters, buffers, constants,
            then the tensor leaves of the inputs. Node metadata holds `val` (fake tensors with
            symbolic sizes), `nn_module_stack` and `stack_trace`.
        inputs: placeholder name -> path of the leaf in the call, e.g. 'kwargs.attention_mask'.
        parameters: placeholder name -> fully qualified name of the parameter or buffer.
        constants: placeholder name -> lifted tensor constant.
        args, kwargs: the example inputs.
    """

    graph_module: fx.GraphModule
    inputs: Mapping[str, str]
    parameters: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def capture(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Captured | NearMiss:
    """Export `module` on example inputs (non-strict, undecomposed); a NearMiss says why not."""
    raise NotImplementedError
