"""Contract 8: exact rewrites give the captured outputs and gradients, over dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.passes.examples import Examples
from rewriter.passes.realise import Target
from rewriter.passes.realise.calls import map_leaves, observe
from rewriter.passes.verify.compare import max_difference, tensors_of

_NOISE = 1e-2  # share of the largest gradient of a module below which one counts as this large
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check_exact(
    original: nn.Module, rewritten: nn.Module, targets: Sequence[Target], examples: Examples
) -> Iterator[ContractResult]:
    """Outputs and gradients (input and weights) of each distinct exact owner, in two shapes."""
    seen: set[str] = set()
    for target in targets:
        key = target.site.fingerprint or target.site.fqn
        if key in seen:
            continue
        seen.add(key)
        worst = 0.0
        for call in (examples.primary, examples.resized):
            for observed in observe(original, [target.site.fqn], call)[target.site.fqn]:
                ours = rewritten.get_submodule(target.site.fqn)
                theirs = original.get_submodule(target.site.fqn)
                a, b = _gradients(ours, observed.named), _gradients(theirs, observed.named)
                # A gradient may be 0 by symmetry (of a bias of the keys, which softmax does not
                # see) and only rounding left of it: then the others set the scale.
                floor = _NOISE * max((float(y.float().abs().max()) for y in b[1:]), default=0.0)
                for number, (x, y) in enumerate(zip(a, b, strict=True)):
                    scale = max(1e-6, float(y.float().abs().max()), floor if number else 0.0)
                    worst = max(worst, max_difference(x, y) / scale)
        dtype = next(original.parameters()).dtype
        check = f"outputs and gradients equal the original ({str(dtype).removeprefix('torch.')})"
        yield judged(8, check, target.site.fqn, worst, BOUND.get(dtype, 1e-2))


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

    with torch.enable_grad():
        out = tensors_of(owner(**map_leaves(named, change)))[0]
        weights = [p for n, p in owner.named_parameters() if not n.startswith("core.")]
        wanted = [*leaf, *(p for p in weights if p.requires_grad)]
        cotangent = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
        grads = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]
