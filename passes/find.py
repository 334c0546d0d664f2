"""Finding the attention of a model: in one graph where it traces, else in the parts that do.

A model whose forward cannot be captured as a whole (it looks at values, prints, leaves torch) still
has modules that can. It is run once to see which modules compute a softmax; then the largest parts
around these that can be captured alone are matched with the inputs they were called with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from rewriter.ir.mlp import MlpSite
from rewriter.ir.site import AttentionSite, NearMiss, Source
from rewriter.passes.capture import Captured, capture
from rewriter.passes.exact import gated, linears, norms
from rewriter.passes.examples import Examples
from rewriter.passes.locate import find_softmax_modules
from rewriter.passes.match import Match, match
from rewriter.passes.match.mlp import match_mlps
from rewriter.passes.realise.calls import Observed, observe
from rewriter.passes.repeats import repeated
from rewriter.plan import FusedModule, LinearLayer


@dataclass(frozen=True)
class Graph:
    """The graph of a whole model, and the attention matched in it."""

    captured: Captured
    matches: tuple[Match, ...]


@dataclass(frozen=True)
class Inspection:
    """What was found in a model.

    Attributes:
        sites: understood attention blocks, in the order they run.
        misses: what looked like attention, or could not be traced, and why.
        mlps: understood MLP blocks, in the order they run.
        mlp_misses: what looked like an MLP block, and why it is none.
        parts: modules that were captured alone, since the model as a whole does not trace;
            with `whole` the reason of that. Masks that come from outside a part are opaque.
        graph: of a model that traces as a whole.
        linears: linear layers of a model that traces as a whole, where they were asked for.
        fused: likewise gated MLP blocks and normalisations that may run as one kernel.
    """

    sites: tuple[AttentionSite, ...]
    misses: tuple[NearMiss, ...]
    parts: tuple[str, ...] = ()
    whole: NearMiss | None = None
    mlps: tuple[MlpSite, ...] = ()
    mlp_misses: tuple[NearMiss, ...] = ()
    linears: tuple[LinearLayer, ...] = ()
    fused: tuple[FusedModule, ...] = ()
    graph: Graph | None = field(default=None, repr=False, compare=False)


def find(model: nn.Module, examples: Examples, layers: bool = False) -> Inspection:
    """Every attention block of the model that is understood, and a miss for every other one.

    Args:
        layers: time and prove linear layers, gated MLP blocks and normalisations too
            (`passes.exact`).
    """
    primary, resized = examples.primary, examples.resized
    again = (resized.args, resized.kwargs)
    captured = capture(model, primary.args, primary.kwargs, resized=again, assume_finite=True)
    if not isinstance(captured, NearMiss):
        found = _matched(captured)
        if not layers:
            return found
        fused = (*gated.find(model, found.mlps), *norms.find(captured, model))
        return replace(found, linears=tuple(linears.find(captured, model)), fused=fused)
    try:
        inner = find_softmax_modules(model, primary.args, primary.kwargs)
    except Exception:  # it does not even run; the reason of the capture says where
        return Inspection((), (captured,))
    if not inner or "" in inner:
        return Inspection((), (captured,))
    return _Parts(model, examples, inner).inspect(captured)


def _matched(captured: Captured) -> Inspection:
    found, mlps = match(captured), match_mlps(captured)
    return Inspection(
        tuple(m.site for m in found.matches),
        found.misses,
        mlps=tuple(m.site for m in mlps.matches),
        mlp_misses=mlps.misses,
        graph=Graph(captured, found.matches),
    )


class _Parts:
    """Captures the largest traceable modules that hold a softmax."""

    def __init__(self, model: nn.Module, examples: Examples, inner: Sequence[str]):
        self.model = model
        self.inner = inner
        names = [name for name, _ in model.named_modules() if name and self._holds(name)]
        self.first = observe(model, names, examples.primary)
        self.second = observe(model, names, examples.resized)
        calls = [(c.args, c.kwargs) for c in (examples.primary, examples.resized)]
        groups = repeated(model, calls)
        self.twins: Mapping[str, str] = {p: g[0] for g in groups for p in g[1:]}
        self.known: dict[str, Inspection] = {}

    def _holds(self, path: str) -> bool:
        return any(i == path or i.startswith(f"{path}.") for i in self.inner)

    def inspect(self, whole: NearMiss) -> Inspection:
        found = list(self._below(""))
        sites = [site for _, part in found for site in part.sites]
        misses = [miss for _, part in found for miss in part.misses]
        numbered = tuple(replace(site, index=n) for n, site in enumerate(sites))
        mlps = [mlp for _, part in found for mlp in part.mlps]
        if not sites:
            misses.insert(0, whole)
        return Inspection(
            numbered,
            tuple(misses),
            tuple(path for path, part in found if part.sites),
            whole,
            tuple(replace(mlp, index=n) for n, mlp in enumerate(mlps)),
            tuple(miss for _, part in found for miss in part.mlp_misses),
        )

    def _below(self, path: str) -> Iterator[tuple[str, Inspection]]:
        children = self.model.get_submodule(path).named_children()
        for name, _ in children:
            child = f"{path}.{name}" if path else name
            if self._holds(child):
                yield from self._at(child)

    def _at(self, path: str) -> Iterator[tuple[str, Inspection]]:
        twin = self.twins.get(path)
        if twin is not None and twin in self.known:
            yield path, _moved(self.known[twin], twin, path)
            return
        calls = self.first[path]
        part = self._alone(path, calls) if calls else None
        if part is not None and part.whole is None:
            self.known[path] = part
            yield path, _repeated(part, len(calls))
            return
        yield from self._below(path)
        if path in self.inner:
            reason = "the module runs 0 times in one forward pass"
            miss = NearMiss("capture", reason, Source("forward", path), step="capture")
            yield path, part or Inspection((), (miss,))

    def _alone(self, path: str, calls: Sequence[Observed]) -> Inspection:
        module = self.model.get_submodule(path)
        again = self.second[path]
        resized = ((), again[0].named) if again else None
        captured = capture(module, (), calls[0].named, resized=resized, assume_finite=True)
        if isinstance(captured, NearMiss):
            miss = _inside(captured, path)
            return Inspection((), (miss,), whole=miss)
        return _moved(_matched(captured), "", path)


def _repeated(part: Inspection, times: int) -> Inspection:
    """What was found in a module by its first run, for all its runs; proofs compare every one."""
    sites = tuple(
        replace(site, run=n * site.runs + site.run, runs=times * site.runs)
        for n in range(times)
        for site in part.sites
    )
    return replace(part, sites=sites)


def _moved(part: Inspection, old: str, new: str) -> Inspection:
    """What was found in the module at `old`, as it reads for its twin at `new`."""

    def path(name: str) -> str:
        rest = name.removeprefix(old).removeprefix(".")
        return ".".join(p for p in (new, rest) if p)

    sites = tuple(
        replace(
            site,
            fqn=path(site.fqn),
            source=replace(site.source, module=path(site.source.module)),
            projections={
                name: replace(p, module=path(p.module))
                for name, p in (site.projections or {}).items()
            },
        )
        for site in part.sites
    )
    return replace(
        part,
        sites=sites,
        misses=tuple(_inside(m, new, old) for m in part.misses),
        mlps=tuple(mlp.renamed(path) for mlp in part.mlps),
        mlp_misses=tuple(_inside(m, new, old) for m in part.mlp_misses),
        graph=None,
    )


def _inside(miss: NearMiss, new: str, old: str = "") -> NearMiss:
    rest = miss.source.module.removeprefix(old).removeprefix(".")
    module = ".".join(p for p in (new, rest) if p)
    return replace(miss, source=replace(miss.source, module=module))
