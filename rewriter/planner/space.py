"""A search space: one model in which every site holds all of its candidates and runs one of them.

Switching an assignment costs nothing, so thousands can be measured without building a model again.
The same sites can also run a weighted sum of their candidates, which makes the choice
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rewriter.errors import NoSiteError, UsageError
from rewriter.ir.site import AttentionSite
from rewriter.mixers import registry
from rewriter.mixers.base import Mixer, Terms
from rewriter.mixers.placed import core_at, place
from rewriter.passes.examples import Examples, examples_for
from rewriter.passes.realise import share_parameters
from rewriter.passes.realise.apply import Target, build_core, realise


@dataclass(frozen=True)
class Candidate:
    """A mixer a site may get, and its cost in the unit of the budget."""

    mixer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 0.0


Observer = Callable[..., None]  # called with the cores and the arguments of a call


class CandidateCores(nn.Module):
    """All candidate cores of one site; runs the picked one, or their weighted sum.

    Weights of exactly 0 are still run when they require a gradient: the derivative with respect to
    an unused candidate says what using it would change.
    """

    provides_weights = False

    def __init__(self, cores: Sequence[nn.Module]):
        super().__init__()
        self.cores = nn.ModuleList(cores)
        self.pick = 0
        self.weights: torch.Tensor | None = None
        self.observer: Observer | None = None

    @property
    def silent(self) -> bool:
        """Whether the picked core gives 0 and nobody looks at what it gets."""
        alone = self.weights is None and self.observer is None
        return alone and bool(getattr(self.cores[self.pick], "silent", False))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: Terms = (),
        cache: Any = None,
        need_weights: bool = False,
        hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        if cache is not None:
            raise UsageError("a model under search runs without a cache; pass use_cache=False")
        if self.observer is not None:
            self.observer(self, q, k, v, terms, hidden)
        if self.weights is None:
            return self.cores[self.pick](q, k, v, terms, hidden=hidden)[0], None
        outputs = [
            weight * core(q, k, v, terms, hidden=hidden)[0]
            for weight, core in zip(self.weights, self.cores, strict=True)
        ]
        return torch.stack(outputs).sum(0).to(v.dtype), None


class SearchSpace:
    """A model under search.

    Attributes:
        model: shares its parameters with the original; they do not require gradients in it.
        sites: the sites that can change, in running order.
        candidates: of each site; those a mixer refused are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        candidates: Sequence[Sequence[Candidate]],
    ):
        self.model = model
        self.sites = tuple(sites)
        self.candidates = tuple(tuple(row) for row in candidates)
        self._cores = []
        for site in sites:
            core = core_at(model.get_submodule(site.fqn), site)
            assert isinstance(core, CandidateCores)
            self._cores.append(core)

    @property
    def costs(self) -> list[list[float]]:
        return [[c.cost for c in row] for row in self.candidates]

    def cost(self, picks: Sequence[int]) -> float:
        return sum(row[p] for row, p in zip(self.costs, picks, strict=True))

    @property
    def exact(self) -> tuple[int, ...]:
        """At every site its exact candidate, or the dearest where there is none."""

        def rank(candidate: Candidate) -> tuple[bool, float]:
            return registry.get(candidate.mixer).info.tier == "exact", candidate.cost

        return tuple(max(range(len(r)), key=lambda n: rank(r[n])) for r in self.candidates)

    def use(self, picks: Sequence[int]) -> None:
        """Run this assignment from now on."""
        for core, pick in zip(self._cores, picks, strict=True):
            core.weights, core.pick = None, pick

    @contextmanager
    def observed(self, observer: Callable[..., None]) -> Iterator[None]:
        """Inside, `observer(number of the site, cores, q, k, v, terms, hidden)` sees every call."""
        for number, core in enumerate(self._cores):
            core.observer = partial(observer, number)
        try:
            yield
        finally:
            for core in self._cores:
                core.observer = None

    def use_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """Run weighted sums: one vector over the candidates of each site."""
        for core, row in zip(self._cores, weights, strict=True):
            core.weights = row


def open_space(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    candidates: Sequence[Candidate],
    examples: Examples | None = None,
    cost: Callable[[AttentionSite, Candidate], float] | None = None,
    dtype: torch.dtype | None = None,
) -> SearchSpace:
    """Put all candidates into every site of a copy of `model` that shares its parameters.

    Args:
        sites: as `rewriter.inspect` found them.
        candidates: for every site; a site keeps those whose mixer does not refuse it.
        cost: of a candidate at a site, in place of the candidate's own figure.
        dtype: run the search in it, on parameters of its own. bfloat16 is faster on processors that
            multiply in it, and ranks assignments nearly alike (docs/choosing-layers.md).

    Raises:
        NoSiteError: no site has two candidates.
        UsageError: unknown mixer or option.
    """
    allowed = {site.index: _allowed(site, candidates) for site in sites}
    # What runs several times has one mixer for all runs, and stays as it is in a search.
    free = [site for site in sites if len(allowed[site.index]) > 1 and site.runs == 1]
    if not free:
        raise NoSiteError(
            "no site has a choice: every candidate but one refuses it; name other mixers"
        )
    if cost is not None:
        for site in free:
            row = allowed[site.index]
            allowed[site.index] = [replace(c, cost=cost(site, c)) for c in row]
    first = [_target(site, allowed[site.index][0]) for site in free]
    examples = examples if examples is not None else examples_for(model)
    converted = dtype is not None and any(p.dtype != dtype for p in model.parameters())
    copy = deepcopy(model).to(dtype) if converted else share_parameters(model)
    realise(copy, first, examples)
    for site in free:
        owner = copy.get_submodule(site.fqn)
        placed = core_at(owner, site)
        assert isinstance(placed, Mixer)
        cores = [build_core(_target(site, c), placed.layer, owner) for c in allowed[site.index]]
        place(owner, site, CandidateCores(cores))
    return SearchSpace(copy.eval(), free, [allowed[s.index] for s in free])


def _target(site: AttentionSite, candidate: Candidate) -> Target:
    return Target(site, candidate.mixer, candidate.options)


def _allowed(site: AttentionSite, candidates: Sequence[Candidate]) -> list[Candidate]:
    out = []
    for candidate in candidates:
        mixer = registry.get(candidate.mixer)
        if mixer.refuse(site, mixer.Options(**candidate.options)) is None:
            out.append(candidate)
    return out
