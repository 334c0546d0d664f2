"""Capture: a module becomes an undecomposed ATen graph with symbolic batch and sequence sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rewriter.ir.site import NearMiss, Source
from rewriter.passes import torch_private
from rewriter.passes.finite import FiniteValues
from rewriter.passes.flexible import written_out
from rewriter.passes.folding import Folding, folded, unfold
from rewriter.passes.inline import flatten
from rewriter.passes.provenance import module_path, normalise_stacks, source_of
from rewriter.passes.records import opened
from rewriter.passes.repeats import Call, repeated

__all__ = ["Captured", "capture", "module_path", "source_of"]

_WRAPPED = "captured"
_LONG = 200
"""Characters of an error beyond which only its first sentence is told."""


@dataclass(frozen=True)
class Captured:
    """A captured module.

    Attributes:
        graph_module: the pre-dispatch ATen graph, flat; placeholders are parameters, buffers,
            constants, then the tensor leaves of the inputs. Node metadata holds `val` (fake
            tensors with symbolic sizes), `nn_module_stack` and `stack_trace`; `module_path` and
            `source_of` read them. The output node holds the flat list of output leaves.
        inputs: placeholder name -> path of the leaf in the call, e.g. 'kwargs.attention_mask'.
        parameters: placeholder name -> fully qualified name of the parameter or buffer.
        constants: placeholder name -> lifted tensor constant.
        args, kwargs: the example inputs.
        out_spec: structure of the module's result over the flat output leaves.
        module: the captured module itself.
        guards: what tracing found out about the size symbols to choose a branch: the graph holds
            for sizes that meet all of it.
    """

    graph_module: fx.GraphModule
    inputs: Mapping[str, str]
    parameters: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out_spec: pytree.TreeSpec | None = None
    module: nn.Module | None = None
    guards: tuple[Any, ...] = ()

    def parameter(self, name: str) -> torch.Tensor | None:
        """The tensor behind a parameter, buffer or constant placeholder, or None."""
        if name in self.constants:
            return self.constants[name]
        if self.module is None or name not in self.parameters:
            return None
        owner, _, attribute = self.parameters[name].rpartition(".")
        value = getattr(self.module.get_submodule(owner), attribute, None)
        return value if isinstance(value, torch.Tensor) else None


class _Shim(nn.Module):
    """Takes the tensor leaves of a call; everything else stays a constant of the call."""

    def __init__(self, module: nn.Module, flat: Sequence[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.captured = module
        self._flat = list(flat)
        self._spec = spec
        self.training = module.training

    def forward(self, *leaves: torch.Tensor) -> Any:
        rest = iter(leaves)
        flat = [next(rest) if isinstance(x, torch.Tensor) else x for x in self._flat]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return opened(self.captured(*args, **kwargs))


def capture(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    fixed: Mapping[str, frozenset[int]] | None = None,
    resized: Call | None = None,
    assume_finite: bool = False,
) -> Captured | NearMiss:
    """Export `module` on example inputs (non-strict, undecomposed); a NearMiss says why not.

    Tensor inputs keep their sizes symbolic where the model allows it (of images only the batch);
    a dimension of size 1 in the example stays 1, so examples should have a batch of at least 2.
    Works on any module with any nested arguments, in train or eval mode as it is.

    Args:
        fixed: dimensions known to be constant, such as channels, by input path ('args.0').
        resized: (args, kwargs) of the same call at other sizes. With it, modules that prove to
            compute the same function are traced once (`passes.repeats`), which gives the same
            graph in a fraction of the time.
        assume_finite: answer branches on `isfinite` as if all values were; for graphs that are
            read and never run (`passes.finite`).
    """
    kwargs = dict(kwargs or {})
    paths, spec = pytree.tree_flatten_with_path((tuple(args), kwargs))
    flat = [leaf for _, leaf in paths]
    names = [_leaf_name(path) for path, leaf in paths if isinstance(leaf, torch.Tensor)]
    leaves = tuple(leaf for leaf in flat if isinstance(leaf, torch.Tensor))
    shim = _Shim(module, flat, spec)
    first: NearMiss | None = None
    with (
        cache_switched_off(module),
        torch_private.without_encoder_fast_path(),
        torch_private.quiet_export(),
        written_out(),
        FiniteValues() if assume_finite else nullcontext(),
    ):
        constant = [(fixed or {}).get(name, frozenset()) for name in names]
        groups = repeated(module, [(args, kwargs), resized]) if resized is not None else ()
        for dims in _dimension_ladder(leaves, constant):
            try:
                with folded(module, groups) as folding:
                    program = torch_private.export_program(shim, leaves, dims)
                return _captured(program, module, names, args, kwargs, folding)
            except Exception as error:  # export raises whatever the model raises
                first = first or _refusal(module, error)
    assert first is not None
    return first


def _captured(
    program: ExportedProgram,
    module: nn.Module,
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    folding: Folding,
) -> Captured:
    signature = program.graph_signature
    prefix = len(_WRAPPED) + 1
    parameters = {
        name: fqn[prefix:]
        for table in (signature.inputs_to_parameters, signature.inputs_to_buffers)
        for name, fqn in table.items()
    }
    constants = {
        name: program.constants[fqn]
        for name, fqn in signature.inputs_to_lifted_tensor_constants.items()
    }
    graph_module = program.graph_module
    inputs: dict[str, str] = {}
    user = set(signature.user_inputs)
    remaining = iter(names)
    for node in list(graph_module.graph.find_nodes(op="placeholder")):
        if node.name in user:
            path = next(remaining)
            node._rename(re.sub(r"\W+", "_", path.removeprefix("kwargs.")))
            node.target = node.name
            inputs[node.name] = path
    flatten(graph_module)
    normalise_stacks(graph_module.graph, _WRAPPED)
    unfold(graph_module, folding, parameters)
    out_spec = program.module_call_graph[0].signature
    return Captured(
        graph_module=graph_module,
        inputs=inputs,
        parameters=parameters,
        constants=constants,
        args=args,
        kwargs=kwargs,
        out_spec=out_spec.out_spec if out_spec is not None else None,
        module=module,
        guards=torch_private.size_guards(graph_module.graph),
    )


def _leaf_name(path: tuple[Any, ...]) -> str:
    """'args.0', 'kwargs.attention_mask' or 'kwargs.position_embeddings.1'."""
    root, *rest = path
    parts = ["args" if root.idx == 0 else "kwargs"]
    for key in rest:
        value = next((getattr(key, a) for a in ("idx", "key", "name") if hasattr(key, a)), key)
        parts.append(str(value))
    return ".".join(parts)


def _dimension_ladder(
    leaves: tuple[torch.Tensor, ...], constant: Sequence[frozenset[int]]
) -> Iterator[tuple[Any, ...]]:
    """Dynamic dimensions to try: all, then only the batch, then none."""
    image = len(leaves) == 1 and leaves[0].dim() >= 4 and leaves[0].is_floating_point()
    if not image:
        yield tuple(_dims(leaf, leaf.dim(), c) for leaf, c in zip(leaves, constant, strict=True))
    yield tuple(_dims(leaf, 1, c) for leaf, c in zip(leaves, constant, strict=True))
    yield tuple(_dims(leaf, 0, c) for leaf, c in zip(leaves, constant, strict=True))


def _dims(leaf: torch.Tensor, count: int, constant: frozenset[int]) -> dict[int, Any]:
    """The first `count` dimensions are free, except those of size 0 and 1, which export fixes."""
    return {
        d: torch_private.AUTO if d < count and size > 1 and d not in constant else None
        for d, size in enumerate(leaf.shape)
    }


@contextmanager
def cache_switched_off(module: nn.Module) -> Iterator[None]:
    """Switch `config.use_cache` off on every part of the module; a cache is no tensor to trace."""
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c.use_cache) for c in configs.values() if getattr(c, "use_cache", None)]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def _refusal(module: nn.Module, error: Exception) -> NearMiss:
    """Name the innermost module and line that the error came through."""
    paths = {id(m): name for name, m in module.named_modules()}
    source = Source("forward")
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        first = code.co_varnames[0] if code.co_argcount else ""
        owner = trace.tb_frame.f_locals.get(first)
        if isinstance(owner, nn.Module) and id(owner) in paths and code.co_name == "forward":
            source = Source("forward", paths[id(owner)], code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    text = (str(error).strip().splitlines() or [""])[0]
    if len(text) > _LONG:
        text = text[: text.find(". ") + 1] or text[:_LONG]
    reason = f"the module cannot be traced: {type(error).__name__}: {text}"
    return NearMiss("capture", reason, source, step="capture")
