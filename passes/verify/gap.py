"""Contract 9: how far each new core is from the teacher, and what each of its branches adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rewriter.ir.contract import ContractResult
from rewriter.mixers.base import Mixer
from rewriter.mixers.placed import core_at
from rewriter.passes.compare import relative_error, tensors_of
from rewriter.passes.examples import Call, Examples
from rewriter.passes.realise import Target
from rewriter.passes.realise.calls import observe

LENGTH = 384


def check_gap(
    original: nn.Module, rewritten: nn.Module, targets: Sequence[Target], examples: Examples
) -> Iterator[ContractResult]:
    """Relative output error of every owner on the teacher's stream, whole and per branch off."""
    if not targets:
        return
    call = _long_call(examples)
    fqns = list(dict.fromkeys(t.site.fqn for t in targets))
    streams = observe(original, fqns, call)
    for target in targets:
        fqn, name = target.site.fqn, target.site.label
        observed = streams[fqn][target.site.run]
        owner = rewritten.get_submodule(fqn)
        core = core_at(owner, target.site)
        assert isinstance(core, Mixer)
        teacher = tensors_of(observed.output)[0]
        whole = relative_error(_output(owner, observed.named), teacher)
        yield ContractResult(9, "relative teacher gap", name, "reported", whole)
        for branch in core.branches:
            with core.without(branch):
                error = relative_error(_output(owner, observed.named), teacher)
            detail = f"whole core: {whole:.3f}"
            yield ContractResult(
                9, f"gap without branch '{branch}'", name, "reported", error, detail=detail
            )


def _output(owner: nn.Module, named: Any) -> torch.Tensor:
    with torch.no_grad():
        return tensors_of(owner(**named))[0]


def _long_call(examples: Examples) -> Call:
    """Random tokens, long enough that windows end; the captured call for other models."""
    if examples.tokens is None or examples.source or not examples.cached:
        return examples.primary
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, examples.vocabulary, (1, LENGTH), generator=generator)
    kwargs = {k: v for k, v in examples.primary.kwargs.items() if k == "use_cache"}
    return Call((), {**kwargs, examples.tokens: ids})
