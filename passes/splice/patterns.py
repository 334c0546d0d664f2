"""Graph patterns of other packages: found in a captured graph, compared, and put in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from rewriter import extension
from rewriter.extension import GraphPattern
from rewriter.passes import torch_private
from rewriter.passes.compare import max_difference
from rewriter.passes.verify.exact import BOUND


@dataclass(frozen=True)
class Applied:
    """What one pattern did in one graph: how often it was replaced, and why not (elsewhere)."""

    name: str
    replaced: int
    declined: tuple[str, ...] = ()

    def describe(self) -> str:
        """'new_gelu: replaced 2 times; x is not contiguous'."""
        return "; ".join((f"{self.name}: replaced {self.replaced} times", *self.declined))


def apply_patterns(module: fx.GraphModule) -> tuple[Applied, ...]:
    """Rewrite the graph by every installed pattern, in order of priority, in place.

    A pattern whose replacement does not give the same values and gradients on its own examples is
    not applied. Only patterns that did something, or say why not, are reported.
    """
    out: list[Applied] = []
    for pattern in extension.patterns():
        failed = Applied(pattern.name, 0, ("it failed",))
        done = extension.guarded(pattern, partial(_apply, module, pattern), failed)
        if done.replaced or done.declined:
            out.append(done)
    return tuple(out)


def _apply(module: fx.GraphModule, pattern: GraphPattern) -> Applied:
    examples = pattern.examples()
    gap = difference(pattern, examples)
    dtype = examples[0].dtype
    if gap > BOUND.get(dtype, 1e-2):
        return Applied(pattern.name, 0, (f"its two functions differ by {gap:.1e}",))
    declined: list[str] = []

    def accepts(match: Any, _: fx.Graph, __: fx.Graph) -> bool:
        reason = pattern.check(*match.placeholder_nodes)
        if reason is not None and reason not in declined:
            declined.append(reason)
        return reason is None

    found = replace_pattern_with_filters(
        module,
        torch_private.trace_pattern(pattern.pattern, examples),
        torch_private.trace_pattern(pattern.replacement, examples),
        match_filters=[accepts],
    )
    module.graph.lint()
    module.recompile()
    return Applied(pattern.name, len(found), tuple(declined))


def difference(pattern: GraphPattern, examples: Sequence[torch.Tensor]) -> float:
    """Largest difference of outputs and gradients, relative to the largest value."""
    results = []
    for function in (pattern.replacement, pattern.pattern):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in examples]
        with torch.enable_grad():
            out = function(*leaves)
            wanted = [x for x in leaves if x.requires_grad]
            cotangent = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
            grads = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
        results.append([out.detach(), *(g for g in grads if g is not None)])
    ours, theirs = results
    pairs = zip(ours, theirs, strict=True)
    return max(max_difference(a, b) / max(1e-6, float(b.float().abs().max())) for a, b in pairs)
