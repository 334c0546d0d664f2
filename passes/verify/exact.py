"""Contract 8: exact rewrites give the captured outputs and gradients, over dtypes and shapes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.passes.compare import max_difference, tensors_of
from rewriter.passes.examples import Examples
from rewriter.passes.flexible import written_out
from rewriter.passes.realise import Target
from rewriter.passes.realise.calls import map_leaves, observe

_NOISE = 1e-2  # share of the largest gradient of a module below which one counts as this large
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
HALF = (torch.bfloat16, torch.float16)


def check_exact(
    original: nn.Module, rewritten: nn.Module, targets: Sequence[Target], examples: Examples
) -> Iterator[ContractResult]:
    """Outputs and gradients (input and weights) of each distinct exact owner, in two shapes.

    Held against the original. In half precision both round, so both are held against the original
    run in fp32, and ours may be off by the bound, or by twice what the original is off by. In fp32
    the same is done in fp64 where the two differ by more than the bound.
    """
    seen: set[str] = set()
    dtype = next(original.parameters()).dtype
    bound = BOUND.get(dtype, 1e-2)
    for target in targets:
        fqn = target.site.fqn
        key = target.site.fingerprint or fqn
        if key in seen:
            continue
        seen.add(key)
        theirs, ours = original.get_submodule(fqn), rewritten.get_submodule(fqn)
        worst, detail = 0.0, _HELD[torch.float32] if dtype in HALF else ""
        for call in (examples.primary, examples.resized):
            for observed in observe(original, [fqn], call)[fqn]:
                a, b = _gradients(ours, observed.named), _gradients(theirs, observed.named)
                if dtype in HALF:
                    gap = _beyond(a, b, theirs, observed.named, torch.float32, bound)
                else:
                    gap = max(_differences(a, b))
                if gap > bound and dtype == torch.float32:
                    gap = min(gap, _beyond(a, b, theirs, observed.named, torch.float64, bound))
                    detail = _HELD[torch.float64]
                worst = max(worst, gap)
        check = f"outputs and gradients equal the original ({str(dtype).removeprefix('torch.')})"
        yield judged(8, check, fqn, worst, bound, detail)


_HELD = {
    torch.float32: "held against fp32, as the original's own rounding is",
    torch.float64: "held against fp64, as the original's own rounding is",
}


def _beyond(
    ours: list[torch.Tensor],
    theirs: list[torch.Tensor],
    owner: nn.Module,
    named: Any,
    dtype: torch.dtype,
    bound: float,
) -> float:
    """How far ours is from the owner run in a wider dtype; infinite if it cannot run in it.

    Where the original is off by more than half of the bound, ours may be off by twice as much.
    """
    try:
        truth = _gradients(copy.deepcopy(owner).to(dtype), _widened(named, dtype))
    except (RuntimeError, TypeError, ValueError):  # code that asks for a dtype of its own
        if dtype == torch.float32:
            raise
        return math.inf
    pairs = zip(_differences(ours, truth), _differences(theirs, truth), strict=True)
    return max(gap / max(1.0, 2 * own / bound) for gap, own in pairs)


def _differences(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    """Largest difference of each tensor, relative to its largest value.

    A gradient may be 0 by symmetry (of a bias of the keys, which softmax does not see) and only
    rounding left of it: then the other gradients set the scale.
    """
    largest = [float(y.float().abs().max()) for y in truth]
    floor = _NOISE * max(largest[1:], default=0.0)
    scales = [max(1e-6, s, floor if i else 0.0) for i, s in enumerate(largest)]
    triples = zip(found, truth, scales, strict=True)
    return [max_difference(x, y) / scale for x, y, scale in triples]


def _widened(named: Any, dtype: torch.dtype) -> Any:
    def change(_: Any, value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.is_floating_point()
        narrow = narrow and value.element_size() < dtype.itemsize
        return value.to(dtype) if narrow else value

    return map_leaves(named, change)


def _gradients(owner: nn.Module, named: Any) -> list[torch.Tensor]:
    """Output, input gradient and weight gradients of one owner call, for a fixed cotangent."""
    leaf: list[torch.Tensor] = []

    def change(_: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3:
            if not leaf:
                leaf.append(value.detach().clone().requires_grad_())
                return leaf[0]
            return value.detach()
        return value.detach() if isinstance(value, torch.Tensor) else value

    with torch.enable_grad(), written_out():  # flex attention has no gradients on a CPU
        out = tensors_of(owner(**map_leaves(named, change)))[0]
        weights = [p for n, p in owner.named_parameters() if not n.startswith("core.")]
        wanted = [*leaf, *(p for p in weights if p.requires_grad)]
        cotangent = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
        grads = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]
