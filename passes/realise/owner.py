"""The re-emitted owner: an instance of a dynamic subclass of the owner's own class.

It shares `__dict__`, children and parameters with what it was; only `forward` is new. A call is
read into a pattern (which inputs are absent, which constants were passed, training or not); each
pattern has its own emission, traced when first needed and shared by all identical layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, EncoderDecoderCache

from rewriter.errors import UnsupportedError, VerificationError
from rewriter.ir.site import AttentionSite, NearMiss
from rewriter.mixers.placed import core_at, place
from rewriter.passes.capture import Captured, capture
from rewriter.passes.match import Match, match
from rewriter.passes.realise.calls import (
    TENSOR,
    Path,
    Pattern,
    Signature,
    map_leaves,
    read,
    walk,
)
from rewriter.passes.realise.emit import Emission, EmissionError, Replaced, emit
from rewriter.passes.realise.limits import Limits, input_path, limits_of
from rewriter.passes.realise.origins import Origin, origins, places
from rewriter.passes.realise.sizes import SizeBook
from rewriter.passes.realise.subclass import InPlace, become
from rewriter.passes.records import closed, opened

STATE = "_re_emission"


_MOST_SIZES = 16
"""Traces of one pattern that are kept, if each holds for some sizes alone."""


@dataclass(frozen=True)
class Traced:
    """An emission with the structure of its output and which tensors of the call it takes."""

    emission: Emission
    paths: tuple[Path, ...]
    structure: Any
    cache_outputs: tuple[int, ...]
    limits: Limits


@dataclass(frozen=True)
class Capture:
    """A captured owner with the cores found in it, and the structure of its output."""

    captured: Captured
    found: tuple[Match, ...]
    structure: Any
    limits: Limits


class EmissionCache:
    """Emissions of a group of identical layers, by call pattern.

    Copies share it: it holds generated code and templates, never parameters.
    """

    def __init__(
        self,
        base: type[nn.Module],
        book: SizeBook,
        cache_outputs: tuple[int, ...] = (),
        origins: Mapping[int, tuple[Origin, ...]] | None = None,
    ):
        """Args:
        origins: of all mask and bias tensors of each block, once a call had all of them.
        """
        self.origins = dict(origins or {})
        self.base = base
        self.book = book
        self.cache_outputs = cache_outputs
        self.traced: dict[Pattern, list[Traced]] = {}
        self.captures: dict[Pattern, list[Capture]] = {}

    def forget_captures(self) -> None:
        """Drop the graphs behind the emissions; a new pattern is captured again when needed."""
        self.captures.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> EmissionCache:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Generated functions do not pickle; they are traced again on first use.
        return EmissionCache, (self.base, self.book, self.cache_outputs, self.origins)


@dataclass
class OwnerState:
    """What a re-emitted module knows about itself; `sites` are those that were rewritten."""

    sites: tuple[AttentionSite, ...]
    signature: Signature
    cache: EmissionCache

    def __reduce__(self) -> tuple[Any, ...]:
        return _owner_state, ([site.to_json() for site in self.sites], self.cache)

    def __deepcopy__(self, memo: dict[int, object]) -> OwnerState:
        return self


def _owner_state(sites: Sequence[Mapping[str, Any]], cache: EmissionCache) -> OwnerState:
    read_back = tuple(AttentionSite.from_json(site) for site in sites)
    return OwnerState(read_back, Signature(cache.base.forward, method=True), cache)


class UntracedError(VerificationError):
    """A module that is not the one that was matched once it is traced alone."""

    def __init__(self, site: AttentionSite, reason: str) -> None:
        super().__init__(reason)
        self.site = site


class ReEmitted(InPlace):
    """Mixin of all re-emitted owners."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: OwnerState = self.__dict__[STATE]
        named = state.signature.bind(args, kwargs)
        cores = [core_at(self, site) for site in state.sites]
        if any(isinstance(x, Cache) for x in named.values()) and _leaves(state, named, cores):
            return state.cache.base.forward(self, *args, **kwargs)
        # A fused core has no weights to give, so exact and new cores share its emissions.
        provides = tuple(
            site.spelling == "eager" and bool(getattr(core, "provides_weights", False))
            for site, core in zip(state.sites, cores, strict=True)
        )
        silent = tuple(bool(getattr(core, "silent", False)) for core in cores)
        pattern, tensors, cache = read(named, self.training, provides, silent)
        known = state.cache.traced.setdefault(pattern, [])
        traced = next((t for t in known if t.limits.fit(tensors, cache is not None)), None)
        if traced is None:
            try:
                traced = trace(self, state, named, pattern, tensors)
            except UntracedError:
                if not known or not _exact(cores):  # of other sizes it was traced
                    raise
                return state.cache.base.forward(self, *args, **kwargs)
            known[:] = [*known[1 - _MOST_SIZES :], traced]
        flat = traced.emission.function(
            self, *(tensors[p] for p in traced.paths), cache, *traced.emission.constants
        )
        if traced.cache_outputs:
            flat = tuple(cache if n in traced.cache_outputs else x for n, x in enumerate(flat))
        return closed(pytree.tree_unflatten(flat, traced.structure))


def _leaves(state: OwnerState, named: Mapping[str, Any], cores: Sequence[nn.Module]) -> bool:
    """Whether a call with a cache is left to the original code, which exact cores may do.

    A cache of two sequences keeps keys of the source that must not be computed again; a module
    that runs several times, or of which a block stayed as it was, finds its place in it by itself.

    Raises:
        UnsupportedError: a block that stayed as it was needs the cache beside a new core.
    """
    exact = _exact(cores)
    first = state.sites[0]
    partly = len(state.sites) < first.slots
    if partly and not exact:
        raise UnsupportedError(
            f"'{first.fqn or 'the model'}' computes {first.slots} attention blocks of which "
            f"{len(state.sites)} were rewritten, so it cannot share one cache among them; call "
            "the model with use_cache=False, or rewrite all of its blocks"
        )
    two = any(isinstance(x, EncoderDecoderCache) for x in named.values())
    return exact and (two or partly or first.runs > 1)


def _exact(cores: Sequence[nn.Module]) -> bool:
    infos = [getattr(core, "info", None) for core in cores]
    return all(info is not None and info.tier == "exact" for info in infos)


def original_view(owner: nn.Module, base: type[nn.Module]) -> nn.Module:
    """The owner as an instance of its original class, without the core, sharing everything.

    Hooks that collect its outputs are left out: what a trace returns is no output of the model.
    """
    view = base.__new__(base)
    view.__dict__.update(owner.__dict__)
    view.__dict__["_forward_hooks"] = OrderedDict()
    view.__dict__["_modules"] = {k: v for k, v in owner._modules.items() if k != "core"}
    view.__dict__.pop(STATE, None)
    return view


def trace(
    owner: nn.Module,
    state: OwnerState,
    named: Mapping[str, Any],
    pattern: Pattern,
    tensors: Mapping[Path, torch.Tensor],
) -> Traced:
    """Emit the code of the owner for calls of this pattern, tracing its original class if needed.

    Raises:
        UntracedError: the trace is not the site that was matched in the whole model.
    """
    where = f"'{state.sites[0].fqn or 'the model'}' called with {pattern.describe()}"
    by_text = _argument_paths(pattern)
    known = state.cache.captures.setdefault(replace(pattern, weights=(), silent=()), [])
    cached = any(isinstance(value, Cache) for _, value in walk(dict(named)))
    capture_ = next((c for c in known if c.limits.fit(tensors, cached)), None)
    if capture_ is None:
        again = bool(known)
        capture_ = _captured(owner, state, named, tensors, by_text, where, again, cached)
        known.append(capture_)
    try:
        emission = emit(
            capture_.captured,
            [
                _replaced(state, site, capture_, weights, silent)
                for site, weights, silent in zip(
                    state.sites, pattern.weights, pattern.silent, strict=True
                )
            ],
        )
    except EmissionError as error:
        raise UntracedError(state.sites[0], f"cannot re-emit {where}: {error}") from None
    inputs = capture_.captured.inputs
    paths = tuple(by_text[input_path(inputs[name])] for name in emission.tensors)
    return Traced(emission, paths, capture_.structure, state.cache.cache_outputs, capture_.limits)


def _replaced(
    state: OwnerState, site: AttentionSite, capture_: Capture, weights: bool, silent: bool
) -> Replaced:
    """A core, with what its tensors in this call are; learned from the first call with all.

    Raises:
        EmissionError: some are absent, and it is not known which.
    """
    found, total = capture_.found[site.slot], len(site.terms)
    here = origins(capture_.captured, found)
    if len(here) == total:
        state.cache.origins.setdefault(site.slot, here)
    known = places(here, state.cache.origins.get(site.slot, ())) if here else ()
    if known is None:
        raise EmissionError(
            f"{len(here)} of {total} mask and bias tensors are present in this call, and it "
            "cannot be told which"
        )
    return Replaced(site.core, found, weights, total, known, silent)


def _captured(
    owner: nn.Module,
    state: OwnerState,
    named: Mapping[str, Any],
    tensors: Mapping[Path, torch.Tensor],
    paths: Mapping[str, Path],
    where: str,
    again: bool,
    cached: bool,
) -> Capture:
    """The owner captured by a call of generic sizes, or if that does not hold for this one, by one
    of its own sizes.

    Args:
        paths: of the tensors of this call, by their dotted text.
        again: this pattern was captured before, and no capture of it holds for this call.
    """
    name = state.signature.any_number
    if name is not None and name in named:
        reason = f"cannot trace {where}: its forward takes any number of arguments, '*{name}'"
        raise UntracedError(state.sites[0], reason)
    book = state.cache.book
    if cached or not again:  # lengths of a call behind a cache fit no trace
        found = _alone(owner, state, book.generic(named, tensors), tensors, paths, where)
        if cached or found.limits.fit(tensors):
            return found
    for template in (book.generic(named, tensors, own=True), named):
        found = _alone(owner, state, template, tensors, paths, where)
        if found.limits.fit(tensors):
            return found
    reason = f"cannot trace {where}: its code is made for other sizes than those of this call"
    raise UntracedError(state.sites[0], reason)


def _alone(
    owner: nn.Module,
    state: OwnerState,
    template: Mapping[str, Any],
    tensors: Mapping[Path, torch.Tensor],
    paths: Mapping[str, Path],
    where: str,
) -> Capture:
    original = original_view(owner, state.cache.base)
    call = map_leaves(template, _without_cache)
    with torch.no_grad():
        live = original(**call)
    captured = capture(original, (), call, state.cache.book.fixed(tensors))
    if isinstance(captured, NearMiss):
        raise UntracedError(state.sites[0], f"cannot trace {where}: {captured.reason}")
    found = match(captured)
    wanted = state.sites[0].slots
    if len(found.matches) != wanted:
        inside = sorted({m.site.fqn for m in found.matches} - {""})
        reasons = "; ".join(m.describe() for m in found.misses) or (
            f"the attention of '{inside[0]}' lies inside it" if inside else "no attention in it"
        )
        raise UntracedError(
            state.sites[0],
            f"tracing {where} gave {len(found.matches)} attention blocks instead of "
            f"{wanted} ({reasons})",
        )
    for site in state.sites:
        difference = disagreement(site, found.matches[site.slot].site)
        if difference is not None:
            raise UntracedError(site, f"tracing {where} gave another attention: {difference}")
    structure = pytree.tree_structure(opened(live))
    return Capture(captured, found.matches, structure, limits_of(captured, paths))


def _argument_paths(pattern: Pattern) -> dict[str, Path]:
    """Dotted path of every tensor leaf -> path of the leaf that holds it first."""
    paths: dict[str, Path] = {}
    for leaf in pattern.leaves:
        if leaf.kind == TENSOR:
            first = leaf if leaf.key == "" else pattern.leaves[leaf.key]
            paths[".".join(map(str, leaf.path))] = first.path
    return paths


def _without_cache(path: Path, value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def disagreement(site: AttentionSite, traced: AttentionSite) -> str | None:
    """What differs between the matched site and the owner's own trace, or None.

    The meaning of a mask that comes from outside is only known to the whole-model match, and a
    mask may be absent in this pattern, so masks and terms are not compared.
    """
    ours, theirs = site.core_facts(), traced.core_facts()
    for name in ("heads", "softmax_dtype", "rotary_dim", "qk_norm", "spelling", "normaliser"):
        if ours[name] != theirs[name]:
            return f"{name} is {theirs[name]}, matched as {ours[name]}"
    if abs(site.scale - traced.scale) > 1e-9 * abs(site.scale):
        return f"the scale is {traced.scale}, matched as {site.scale}"
    if site.softcap != traced.softcap:
        return f"the softcap is {traced.softcap}, matched as {site.softcap}"
    return None


def emissions_of(owner: nn.Module) -> list[Emission]:
    """All emissions traced so far for a re-emitted owner."""
    state: OwnerState = owner.__dict__[STATE]
    return [traced.emission for known in state.cache.traced.values() for traced in known]


def make_owner(
    owner: nn.Module,
    cores: Sequence[tuple[AttentionSite, nn.Module]],
    cache: EmissionCache,
) -> None:
    """Turn `owner` in place into its re-emitted form, with the mixer of each site as a child."""
    base = type(owner)
    sites = tuple(site for site, _ in cores)
    owner.__dict__[STATE] = OwnerState(sites, Signature(base.forward, method=True), cache)
    become(owner, ReEmitted)
    for site, core in cores:
        place(owner, site, core)
