"""Contracts of a model that is too large to run often: every rewritten module alone.

The original runs once, and each rewritten module gets what its original was given there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.passes.compare import max_difference, tensors_of
from rewriter.passes.examples import Call, Examples
from rewriter.passes.realise import Target
from rewriter.passes.realise.calls import Observed, map_leaves, observe
from rewriter.passes.verify.exact import HALF
from rewriter.passes.verify.proof import TOLERANCE, SiteProof
from rewriter.passes.verify.whole import LENGTH, token_ids

BOUND = 1e-5
ROWS = 2
_NOT_RUN = {
    3: "logits with a cache",
    4: "padding of the whole model",
    7: "state dict of the result rebuilds it",
}
WHY = "the whole model was not run again: its modules were checked one by one (--verify layers)"


def check_layers(
    original: nn.Module,
    rewritten: nn.Module,
    targets: Sequence[Target],
    proofs: Sequence[SiteProof],
    examples: Examples,
) -> Iterator[ContractResult]:
    """Contracts 4 and 5 of every rewritten module, and a line for each that needs the whole model.

    Bounds are relative to the largest output of the module.
    """
    yield from (_identity(proof) for proof in proofs if proof.refusal is None)
    streams = observe(original, list(dict.fromkeys(t.site.fqn for t in targets)), _call(examples))
    for fqn, calls in streams.items():
        sites = [t.site for t in targets if t.site.fqn == fqn]
        causal = all(site.mask.causal and not site.cross for site in sites)
        yield from _alone(rewritten.get_submodule(fqn), fqn, calls, causal)
    for number, check in _NOT_RUN.items():
        yield ContractResult(number, check, "model", "not applicable", detail=WHY)


def _identity(proof: SiteProof) -> ContractResult:
    detail = "bit for bit" if proof.bit_exact else "same ops, not bit for bit"
    check = "identity plan equals the original, module by module"
    return judged(5, check, proof.site.label, proof.difference, TOLERANCE, detail)


def _call(examples: Examples) -> Call:
    if examples.tokens is None or examples.source:
        return examples.primary
    kwargs = {k: v for k, v in examples.primary.kwargs.items() if k == "use_cache"}
    return Call((), {**kwargs, examples.tokens: token_ids(examples, ROWS, LENGTH)})


def _alone(
    owner: nn.Module, fqn: str, calls: Sequence[Observed], causal: bool
) -> Iterator[ContractResult]:
    """One module on what it was given: finite, no look ahead, no look into other rows."""
    with torch.no_grad():
        plain = [tensors_of(owner(**c.named))[0] for c in calls]
        broken = sum(not bool(torch.isfinite(x).all()) for x in plain)
        yield judged(4, "outputs are finite", fqn, broken, 0)
        scale = max(1e-6, *(float(x.float().abs().max()) for x in plain))
        bound = BOUND * (200.0 if plain[0].dtype in HALF else 1.0)
        checks = {"batch rows are independent": 0} | (
            {"later tokens change no earlier output": 1} if causal else {}
        )
        for check, dim in checks.items():
            worst = 0.0
            for c, before in zip(calls, plain, strict=True):
                size = before.shape[dim] // 2
                after = tensors_of(owner(**_disturbed(c.named, dim, before.shape[:2])))[0]
                worst = max(
                    worst,
                    max_difference(after.narrow(dim, 0, size), before.narrow(dim, 0, size)) / scale,
                )
            yield judged(4, check, fqn, worst, bound)


def _disturbed(named: Mapping[str, Any], dim: int, sizes: Sequence[int]) -> dict[str, Any]:
    """The call with the second half of its activations (rows, tokens, width) changed."""

    def change(_: Any, value: Any) -> Any:
        activations = (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.dim() == 3
            and tuple(value.shape[:2]) == tuple(sizes)
        )
        if not activations:
            return value
        half = value.shape[dim] // 2
        first, second = value.split([half, value.shape[dim] - half], dim)
        return torch.cat([first, second + 3.0], dim)

    return map_leaves(named, change)
