"""The one place that touches unstable torch API. A version test pins what was tried."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import Any, cast

import sympy
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.attention import flex_attention as flexible

from rewriter.errors import UsageError

TESTED_TORCH = ((2, 11), (2, 15))
"""Half-open range of torch (major, minor) versions these calls are written for."""

AUTO = Dim.AUTO
"""Marks an input dimension whose size export may keep symbolic or fix, as the model demands."""

_ASSERTS = frozenset(
    {
        "aten::_assert_tensor_metadata",
        "aten::_assert_scalar",
        "aten::_assert_async",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
    }
)


def torch_version() -> tuple[int, int]:
    """(major, minor) of the running torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def export_program(
    module: nn.Module, leaves: tuple[torch.Tensor, ...], dims: tuple[Any, ...]
) -> ExportedProgram:
    """Export a module whose forward takes `*leaves`; the graph stays undecomposed ATen.

    Raises whatever export raises: the exception types are not part of its API.
    """
    return torch.export.export(
        module, leaves, dynamic_shapes=(dims,) if leaves else None, strict=False
    )


def size_guards(graph: fx.Graph) -> tuple[sympy.Basic, ...]:
    """Relations of size symbols that held while a graph was traced and decided what it became."""
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        shape: tuple[Any, ...] = tuple(val.shape) if isinstance(val, torch.Tensor) else ()
        for size in shape:
            if isinstance(size, torch.SymInt):
                return tuple(guard.expr for guard in size.node.shape_env.guards)
    return ()


@contextmanager
def quiet_export() -> Iterator[None]:
    """Export logs its specialisation decisions and prints the graph when it gives up."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def without_encoder_fast_path() -> Iterator[None]:
    """Encoder layers of torch bypass their attention module in eval mode unless told not to."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def flex_attention_as(function: Callable[..., Any]) -> Iterator[None]:
    """Calls of `flex_attention` run `function` in place of its operator, also compiled ones.

    Block masks hold their mask function and no blocks: these are made from values, which a tracer
    has not, and `function` does without them. Compiled functions run as they were written.
    """
    swapped = {
        "flex_attention_hop": function,
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True,
        "_validate_device": lambda query, key, value: None,
        "create_mask": lambda *_, **__: torch.ones(1, 1, 1, 1),
        "_convert_mask_to_block_mask": lambda *_, **__: (torch.ones(1, 1, 1, 1), None),
        "_transpose_ordered": lambda number, indices: (number, indices),
    }
    before = {name: getattr(flexible, name) for name in swapped}
    try:
        for name, value in swapped.items():
            setattr(flexible, name, value)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for name, value in before.items():
            setattr(flexible, name, value)


def hides_nothing(mask: Callable[..., torch.Tensor]) -> bool:
    """Whether a mask function of `flex_attention` is the one of a call without a mask."""
    return mask is flexible.noop_mask


def unwatched() -> AbstractContextManager[None, bool | None]:
    """Inside it no torch function mode sees what is read off tensors."""
    return torch._C.DisableTorchFunction()


def region_of(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], bool] | None:
    """(sub-graph attribute node, operands, runs without gradients) of a nested region, or None.

    Regions are the higher-order ops that export makes of no_grad and autocast blocks. Inside an
    autocast block the casts are already written out, so the region adds nothing to the values.
    """
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":
        enabled, body, *operands = node.args
        return cast(fx.Node, body), cast("tuple[fx.Node, ...]", tuple(operands)), not enabled
    if name == "wrap_with_autocast":
        *_, body = node.args[:5]
        return cast(fx.Node, body), cast("tuple[fx.Node, ...]", tuple(node.args[5:])), False
    return None


def is_assert(node: fx.Node) -> bool:
    """True for nodes that check something and produce nothing."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in _ASSERTS


def schema_arguments(target: Callable[..., Any]) -> tuple[tuple[str, Any], ...] | None:
    """(name, default) of each argument of an ATen operator, or None for other callables."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None)
        for a in target._schema.arguments
    )


def operator_name(target: Any) -> str:
    """'aten::softmax' for torch.ops.aten.softmax.int; '' for what is no ATen operator."""
    return str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else ""


def symbolic_expression(size: int | torch.SymInt) -> sympy.Expr:
    """The sympy expression of a size."""
    if isinstance(size, torch.SymInt):
        return cast(sympy.Expr, size.node.expr)
    return sympy.Integer(size)


def size_hint(size: int | torch.SymInt) -> int | None:
    """The size in the example that was captured, or None where it depends on data."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return None if hint is None else int(hint)
    return int(size)


def known_number(value: Any) -> float | None:
    """The number a symbolic float stands for once it is guarded, else None."""
    if not isinstance(value, torch.SymFloat):
        return None
    expression = value.node.expr
    return float(expression) if expression.is_number else None


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products in hardware; emulated ones are several times slower
    than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def example_value(placeholder: fx.Node) -> Any:
    """The fake tensor or symbolic size that dynamo traced a placeholder with, or None."""
    return placeholder.meta.get("example_value")


def source_name(placeholder: fx.Node) -> str:
    """Where dynamo found an input, as a Python expression such as "L['self']._modules['fc']"."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def trace_aten(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """A torch-level graph as undecomposed ATen, traced on the fake inputs dynamo had.

    Outside of dynamo's tracing context: that one holds another fake mode over the same symbols.
    """

    def run(*values: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(module).run(*values)

    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    with tracing(None), mode or nullcontext():
        tracer = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)
        return tracer(*inputs)


def trace_pattern(
    function: Callable[..., torch.Tensor], arguments: Sequence[torch.Tensor]
) -> fx.Graph:
    """The undecomposed graph of a function, to look for in graphs of `trace_aten`."""

    def run(*values: torch.Tensor) -> torch.Tensor:  # a method's own arguments are miscounted
        return function(*values)

    with tracing(None):
        graph: fx.Graph = make_fx(run, pre_dispatch=True)(*arguments).graph
    return graph


def inherit_inputs(module: fx.GraphModule, original: fx.GraphModule) -> None:
    """Give the placeholders of a traced graph what compilers read on those of dynamo's graph."""
    pairs = zip(
        module.graph.find_nodes(op="placeholder"),
        original.graph.find_nodes(op="placeholder"),
        strict=True,
    )
    for mine, theirs in pairs:
        mine.meta.update(theirs.meta)
        if hasattr(theirs, "_dynamo_source"):
            mine._dynamo_source = theirs._dynamo_source
    module.meta.update(original.meta)
    if hasattr(original, "_param_name_to_source"):
        module._param_name_to_source = original._param_name_to_source


def lookup_backend(name: str) -> Callable[..., Any]:
    """A compiler registered with `torch.compile`.

    Raises:
        UsageError: there is none of this name.
    """
    try:
        return cast("Callable[..., Any]", torch._dynamo.lookup_backend(name))
    except torch._dynamo.exc.InvalidBackend:
        raise UsageError(
            f"there is no compiler '{name}' for torch.compile; torch.compiler.list_backends() "
            "names those that are installed"
        ) from None


def trace_static(
    function: Callable[..., Any], arguments: tuple[torch.Tensor, ...], mode: FakeTensorMode
) -> fx.GraphModule:
    """The undecomposed graph of a function on fake tensors of fixed sizes."""
    leaves = [mode.from_tensor(t, static_shapes=True) for t in arguments]
    tracer = make_fx(function, tracing_mode="fake", pre_dispatch=True)
    return tracer(*leaves)


class Symbols:
    """Symbolic integers of one shape environment."""

    def __init__(self) -> None:
        self._shapes = ShapeEnv()
        self._known: dict[sympy.Expr, torch.SymInt] = {}

    def new(self, name: str, hint: int) -> sympy.Symbol:
        source = ConstantSource(name)
        symbol = self._shapes.create_symbol(hint, source, DimDynamic.DYNAMIC)
        return cast(sympy.Symbol, symbol)

    def number(self, expression: sympy.Expr, hint: int) -> torch.SymInt:
        """The integer that an expression over `new` symbols stands for."""
        if expression not in self._known:
            made = self._shapes.create_symintnode(expression, hint=hint)
            self._known[expression] = cast(torch.SymInt, made)
        return self._known[expression]
