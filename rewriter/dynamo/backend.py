"""The backend: dynamo's graph in, a callable out, attention replaced on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from rewriter.dynamo.choice import choose
from rewriter.dynamo.options import CompileOptions
from rewriter.dynamo.report import CompileReport, GraphReport, log
from rewriter.ir.site import NearMiss, Source
from rewriter.passes import torch_private
from rewriter.passes.capture import Captured
from rewriter.passes.dynamo_graph import capture_graph
from rewriter.passes.match import MatchResult, match
from rewriter.passes.splice import Outcome, apply_patterns, splice, splice_linears
from rewriter.policy import Policy


def rewriter_backend(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Find the attention of a graph, replace what the policy asks for, compile the rest.

    Registered as 'rewriter' with `torch.compile`. A graph in which nothing can be replaced goes to
    the inner compiler as it came.

    Args:
        graph: dynamo's graph.
        inputs: its real inputs.
        options: see `CompileOptions`.
        mode: mode of the inner compiler (of Inductor).

    Raises:
        UsageError: an option does not exist, or the policy asks for a mixer with parameters.
    """
    wanted = CompileOptions.read(options)
    policy = Policy.load(wanted.policy)
    clock = _Clock()
    nodes = len(graph.graph.nodes)
    captured = capture_graph(graph, inputs)
    clock.lap("capture")
    found = _match(captured)
    clock.lap("match")
    grad = torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    )
    outcomes: tuple[Outcome, ...] = ()
    result, after, linears = graph, nodes, 0
    if isinstance(captured, Captured) and found.matches:
        chosen = choose(policy, found)
        done = splice(
            captured,
            chosen.replaced,
            needs_grad=grad,
            allow_reference=wanted.allow_reference,
            instead=chosen.instead,
        )
        outcomes = tuple(sorted((*done.outcomes, *chosen.kept), key=lambda o: o.site.index))
        if wanted.linears and not grad and chosen.replaced:
            linears = splice_linears(captured.graph_module)
    applied = apply_patterns(captured.graph_module) if isinstance(captured, Captured) else ()
    changed = linears or any(o.status == "spliced" for o in outcomes)
    if isinstance(captured, Captured) and (changed or any(a.replaced for a in applied)):
        result, after = captured.graph_module, len(captured.graph_module.graph.nodes)
        torch_private.inherit_inputs(result, graph)
    clock.lap("splice")
    compiled = _inner(wanted, mode)(result, inputs)
    clock.lap("inner")
    report = wanted.report or CompileReport()
    entry = GraphReport(
        number=len(report.graphs),
        outcomes=outcomes,
        misses=found.misses,
        nodes=(nodes, after),
        linears=linears,
        patterns=applied,
        differentiable=grad,
        seconds=clock.laps,
    )
    report.graphs.append(entry)
    log(entry)
    return compiled


def _match(captured: Captured | NearMiss) -> MatchResult:
    if isinstance(captured, NearMiss):
        return MatchResult((), (captured,))
    try:
        return match(captured)
    except Exception as error:  # a graph nobody has seen must still compile
        reason = f"matching failed with {type(error).__name__}: {error}"
        return MatchResult((), (NearMiss("match", reason, Source("forward")),))


def _inner(options: CompileOptions, mode: str | None) -> Callable[..., Callable[..., Any]]:
    more = dict(options.inner_options)
    if options.inner == "inductor":
        if mode is not None and mode != "default":
            more = {**torch._inductor.list_mode_options(mode), **more}
        return lambda graph, inputs: torch._inductor.compile(graph, list(inputs), more or None)
    compiler = torch_private.lookup_backend(options.inner)
    keywords = {"options": more} if more else {}
    return lambda graph, inputs: compiler(graph, inputs, **keywords)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
