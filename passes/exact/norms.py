"""Normalisations over the last dimension that run as one kernel.

A candidate is a module without children whose part of the graph takes one mean, or one norm of the
library, of one input. Which normalisation it is, is found by evaluation: the form whose outputs are
the module's, over inputs small enough to show what is added to the square.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rewriter.backends.cpu import norm as generated
from rewriter.backends.cpu.norm import NormForm
from rewriter.backends.ops.regions import norm
from rewriter.passes.capture import Captured
from rewriter.passes.exact import fused
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import arguments, op, value
from rewriter.passes.provenance import module_path
from rewriter.plan import FusedModule

_REDUCTIONS = frozenset(
    {"mean", "sum", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "var_mean"}
)
_LARGEST = 0.1  # of a number that may be the eps of a norm


@dataclass(frozen=True)
class NormRegion:
    """A normalisation; weight and bias are names of parameters of the module."""

    form: NormForm
    weight: str | None
    bias: str | None

    def tensors(self, owner: nn.Module) -> tuple[torch.Tensor | None, ...]:
        names = (self.weight, self.bias)
        return tuple(None if n is None else getattr(owner, n) for n in names)

    def watched(self, owner: nn.Module) -> Sequence[nn.Module]:
        return ()

    def run(self, owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.tensors(owner)
        return norm(x, weight, bias, self.form)


def find(captured: Captured, model: nn.Module) -> list[FusedModule]:
    """Every normalisation of a captured model, with what will be done about it and why."""
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node in View(captured).graph.nodes:
        if node.op == "call_function" and module_path(node):
            groups[module_path(node)].append(node)
    known: dict[Any, FusedModule] = {}
    out = []
    for path, nodes in groups.items():
        owner = model.get_submodule(path)
        reductions = [n for n in nodes if op(n) in _REDUCTIONS]
        if not reductions or next(owner.children(), None) is not None:
            continue
        sizes = [tuple(p.shape) for p in owner.parameters()]
        width = sizes[0][0] if sizes and len(sizes[0]) == 1 else _width(reductions[0])
        if width is None or any(size != (width,) for size in sizes) or len(sizes) > 2:
            continue
        numbers = tuple(sorted(set(_numbers(nodes))))
        hooked = bool(owner._forward_hooks or owner._forward_pre_hooks)
        dtypes = tuple(p.dtype for p in owner.parameters())
        dtype = _dtype(nodes, captured)
        key = (type(owner), width, numbers, dtypes, hooked, dtype)
        if key not in known:
            known[key] = _planned(owner, width, numbers, dtype)
        out.append(known[key].model_copy(update={"fqn": path}))
    return out


def apply(model: nn.Module, layers: Sequence[FusedModule]) -> None:
    """Put the planned normalisations of a model on the kernel, in place.

    Raises:
        UsageError: the model has no such module.
    """
    for layer in layers:
        if layer.status != "refused" and layer.kind == "norm":
            facts = layer.facts
            region = NormRegion(NormForm(**facts["form"]), facts["weight"], facts["bias"])
            fused.put(fused.checked(model, layer), region, layer.gains)


def _planned(
    owner: nn.Module, width: int, numbers: Sequence[float], dtype: torch.dtype | None
) -> FusedModule:
    layer = FusedModule(fqn="", kind="norm")
    found = _named(owner, width, numbers, dtype)
    if isinstance(found, str) or dtype is None:
        return layer.model_copy(update={"status": "refused", "reason": found})
    region, error = found
    source = generated.source_of(dtype)
    name = f"norm {type(owner).__qualname__} {width} {region}"
    gains = fused.gains_of(owner, region, width, dtype, name, source)
    if not gains:
        reason = "one kernel was not measured to be faster on this machine"
        return layer.model_copy(update={"status": "refused", "reason": reason})
    facts = {"form": asdict(region.form), "weight": region.weight, "bias": region.bias}
    return layer.model_copy(update={"error": error, "gains": gains, "facts": facts})


def _named(
    owner: nn.Module, width: int, numbers: Sequence[float], dtype: torch.dtype | None
) -> tuple[NormRegion, float] | str:
    """The form of a module and its error, or why it has none."""
    if dtype not in generated.NAMES or dtype is None:
        return f"there is no generated code for {dtype}"
    if any(p.dtype != dtype or p.device.type != "cpu" for p in owner.parameters()):
        return "its parameters have another dtype than its input"
    if isinstance(reason := generated.find(dtype), str):
        return reason
    if "forward" in owner.__dict__ or owner._forward_hooks or owner._forward_pre_hooks:
        return "its forward is hooked"
    best: tuple[NormRegion, float] | None = None
    reason = "no number in it can be the eps of a norm"
    for region in _candidates(owner, numbers, dtype):
        error = fused.proof(owner, region, width, dtype)
        if isinstance(error, str):
            reason = error
        elif best is None or error < best[1]:
            best = region, error
    return best if best is not None else reason


def _candidates(
    owner: nn.Module, numbers: Sequence[float], dtype: torch.dtype
) -> Iterator[NormRegion]:
    names = [name for name, _ in owner.named_parameters(recurse=False)]
    if len(names) == 2 and names[0] == "bias":
        names.reverse()
    weight, bias = (*names, None, None)[:2]
    offsets = (0.0, 1.0) if weight is not None else (0.0,)
    for eps in (n for n in numbers if 0.0 < n <= _LARGEST):
        for centred in (False, True):
            for offset in offsets:
                for early in (False, True) if dtype == torch.bfloat16 else (False,):
                    yield NormRegion(NormForm(eps, centred, offset, early), weight, bias)


def _numbers(nodes: Sequence[fx.Node]) -> Iterator[float]:
    for node in nodes:
        given = (node.args, node.kwargs, arguments(node))
        yield from (x for x in pytree.tree_leaves(given) if type(x) is float)


def _width(reduction: fx.Node) -> int | None:
    source = reduction.args[0]
    tensor = value(source) if isinstance(source, fx.Node) else None
    size = None if tensor is None or tensor.dim() == 0 else tensor.shape[-1]
    return size if isinstance(size, int) else None


def _dtype(nodes: Sequence[fx.Node], captured: Captured) -> torch.dtype | None:
    """Of the activation that enters the module."""
    inside = set(nodes)
    for source in (s for n in nodes for s in n.all_input_nodes if s not in inside):
        tensor = value(source)
        given = source.op == "call_function" or source.name in captured.inputs
        if given and tensor is not None:
            return tensor.dtype
    return None
