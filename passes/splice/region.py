"""Run a few nodes of a graph on chosen tensors, at sizes other than the graph was traced with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import fx

from rewriter.passes.torch_private import symbolic_expression


class RegionError(Exception):
    """The nodes cannot be run on these tensors (used inside this package only)."""


@dataclass(frozen=True)
class ProbeSizes:
    """Sizes of one run.

    Attributes:
        symbols: value of each size symbol.
        counts: for graphs of fixed sizes, the size to use in the place of a traced one. That an
            integer is this size is a guess; a wrong one makes the run fail or differ, never pass.
    """

    symbols: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    counts: Mapping[int, int] = field(default_factory=dict)

    def number(self, size: int | torch.SymInt) -> int:
        if not isinstance(size, torch.SymInt):
            return self.counts.get(size, size)
        return int(symbolic_expression(size).subs(self.symbols))

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        return tuple(self.number(s) for s in tensor.shape)


def evaluate(
    node: fx.Node,
    known: Mapping[fx.Node, torch.Tensor],
    sizes: ProbeSizes,
    module: fx.GraphModule,
) -> torch.Tensor:
    """The value of `node`, computed from the nodes in `known`.

    Raises:
        RegionError: an input of the graph is needed that is not known, or an operator fails.
    """
    env: dict[fx.Node, Any] = dict(known)
    order = list(_needed(node, env))
    for item in order:
        try:
            env[item] = _run(item, env, sizes, module)
        except RegionError:
            raise
        except Exception as error:  # any operator may refuse any size
            raise RegionError(f"'{item.name}' fails: {_line(error)}") from error
    result = env[node]
    assert isinstance(result, torch.Tensor)
    return result


def _needed(node: fx.Node, env: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Nodes to run, inputs first; sizes are looked up, not run."""
    out: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(node, False)]
    while stack:
        item, ready = stack.pop()
        if item in env or item in out:
            continue
        if ready or _is_number(item):
            out[item] = None
            continue
        stack.append((item, True))
        stack.extend((source, False) for source in item.all_input_nodes)
    return list(out)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat)


def _run(node: fx.Node, env: Mapping[fx.Node, Any], sizes: ProbeSizes, module: Any) -> Any:
    val = node.meta.get("val")
    if isinstance(val, torch.SymInt):
        return sizes.number(val)
    if isinstance(val, torch.SymFloat):
        return float(symbolic_expression(cast(Any, val)))
    if node.op == "get_attr":
        return getattr(module, cast(str, node.target))
    traced = "val" in node.meta  # nodes written later hold no sizes of the trace

    def read(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return env[item]
        if traced and isinstance(item, int) and not isinstance(item, bool):
            return sizes.counts.get(item, item)
        return item

    args = [fx.node.map_aggregate(a, read) for a in node.args]
    kwargs = {k: fx.node.map_aggregate(a, read) for k, a in node.kwargs.items()}
    if node.op == "call_method":
        return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
    if node.op != "call_function":
        raise RegionError(f"the core depends on '{node.name}'")
    return cast("Callable[..., Any]", node.target)(*args, **kwargs)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
