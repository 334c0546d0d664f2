"""Run a slice of the graph on chosen inputs and sizes and, if wanted, at sampled positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import fx

from rewriter.passes.match.slices import SHAPE_ONLY, Slice
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import arguments, op, value
from rewriter.passes.torch_private import symbolic_expression


@dataclass(frozen=True)
class Probe:
    """Sizes and inputs of one evaluation.

    Attributes:
        sizes: value of each size symbol.
        inputs: tensors for the placeholders of the slice that are inputs of the call.
        positions: what `arange` over the sequence yields; None means 0, 1, 2, ...
    """

    sizes: Mapping[sympy.Symbol, int]
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    positions: torch.Tensor | None = None


_MOST_BYTES = 3 << 29
"""Of one value in a probe, 1.5 GiB: 5,000 by 5,000 scores of twelve heads in float32."""


class ProbeError(Exception):
    """The slice cannot be run on this probe (used inside this package only)."""


def number(item: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    """A size under the probe's symbol values; unknown symbols count 2."""
    expression = symbolic_expression(item)
    values = {s: sizes.get(s, 2) for s in expression.free_symbols}
    return int(expression.subs(values))


def run(part: Slice, probe: Probe, view: View) -> torch.Tensor:
    """Evaluate the target of a slice.

    Raises:
        ProbeError: an operator fails on these sizes, or needs a value that is not there.
    """
    env: dict[fx.Node, Any] = {}
    last = {n: i for i, node in enumerate(part.nodes) for n in node.all_input_nodes}
    with torch.no_grad():
        for i, node in enumerate(part.nodes):
            try:
                env[node] = _evaluate(node, env, probe, view)
            except ProbeError:
                raise
            except Exception as error:  # any operator may refuse any size
                raise ProbeError(f"'{node.name}' fails: {error}") from error
            for used in node.all_input_nodes:
                if last[used] == i and used is not part.target:
                    env.pop(used, None)
    result = env[part.target]
    assert isinstance(result, torch.Tensor)
    return result


def _evaluate(node: fx.Node, env: Mapping[fx.Node, Any], probe: Probe, view: View) -> Any:
    if node.op == "placeholder":
        return _placeholder(node, probe, view)
    if node.op == "get_attr":
        return getattr(view.captured.graph_module, cast(str, node.target))
    if node.op != "call_function":
        raise ProbeError(f"'{node.name}' cannot be evaluated")
    if op(node) == "arange" and probe.positions is not None:
        sampled = _arange(node, probe)
        if sampled is not None:
            return sampled

    def read(item: fx.Node) -> Any:
        if item in env:
            return env[item]
        val = item.meta.get("val")
        if isinstance(val, torch.SymInt):
            return number(val, probe.sizes)
        if isinstance(val, torch.SymFloat):
            return float(symbolic_expression(cast(Any, val)).subs(dict(probe.sizes)))
        if isinstance(val, torch.Tensor):  # only its shape and dtype are read
            shape = [number(s, probe.sizes) for s in val.shape]
            return torch.zeros(shape, dtype=val.dtype)
        raise ProbeError(f"'{item.name}' has no value")

    if op(node) in SHAPE_ONLY and value(node) is None:
        raise ProbeError(f"'{node.name}' has no shape")
    args = fx.node.map_arg(node.args, read)
    kwargs = dict(fx.node.map_arg(node.kwargs, read))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
    if (needed := _broadcast_bytes(args)) > _MOST_BYTES:
        raise ProbeError(f"'{node.name}' would hold {needed >> 20} MiB at these sizes")
    return cast(Any, node.target)(*args, **kwargs)


def _broadcast_bytes(args: Sequence[Any]) -> int:
    """What an elementwise operator on these would fill; 0 if they do not broadcast."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return 0
    return int(math.prod(shape)) * max((t.element_size() for t in tensors), default=0)


def _placeholder(node: fx.Node, probe: Probe, view: View) -> torch.Tensor:
    if node.name in probe.inputs:
        return probe.inputs[node.name].clone()
    tensor = view.captured.parameter(node.name)
    if tensor is None or tensor.is_meta:
        raise ProbeError(f"the value of '{node.name}' is not known")
    return tensor.detach().cpu().clone()


def _arange(node: fx.Node, probe: Probe) -> torch.Tensor | None:
    """Sampled positions for an arange over the sequence; None if it counts something else."""
    val = value(node)
    a = arguments(node)
    positions = probe.positions
    assert positions is not None
    if val is None or not symbolic_expression(val.shape[0]).free_symbols:
        return None
    if a.get("step") not in (None, 1):
        return None
    if number(val.shape[0], probe.sizes) != positions.numel():
        return None
    start = a.get("start") or 0
    if not isinstance(start, int):
        return None
    return (positions + start).to(val.dtype)
