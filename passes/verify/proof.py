"""Proof of a site: re-emitted with the exact core, the owner must equal what it was."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from rewriter.errors import RewriterError
from rewriter.ir.site import AttentionSite
from rewriter.passes.compare import first_tensor, max_difference, tensors_of
from rewriter.passes.examples import Examples
from rewriter.passes.realise import Caches, Target, realise, share_parameters
from rewriter.passes.realise.cache_probe import new_cache
from rewriter.passes.realise.calls import Observed, map_leaves, observe, own_caches
from rewriter.passes.realise.owner import UntracedError
from rewriter.passes.realise.visibility import UncalledError

M = TypeVar("M", bound=nn.Module)
EXACT = "keep"
TOLERANCE = 2e-5  # relative to the largest output; the same ops in another memory layout


@dataclass(frozen=True)
class SiteProof:
    """Whether a site proved itself.

    Attributes:
        site: the site.
        difference: largest output difference over all probe calls, relative to the largest output.
        refusal: why the site cannot be rewritten, or None.
    """

    site: AttentionSite
    difference: float
    refusal: str | None = None

    @property
    def bit_exact(self) -> bool:
        return self.refusal is None and self.difference == 0.0


def prove_sites(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    examples: Examples,
    caches: Caches | None = None,
) -> tuple[nn.Module, list[SiteProof]]:
    """Re-emit every site with the exact core and compare with the original.

    Every owner is compared on the inputs it gets in each example call, and on the same inputs
    enlarged, since small random inputs make attention nearly uniform and hide a wrong mask.

    Returns:
        The identity rewrite of all proved sites (parameters shared with `model`), and one proof
        per site in order.
    """
    seen = observe(model, list(dict.fromkeys(s.fqn for s in sites)), examples.primary)
    together: dict[str, list[AttentionSite]] = {}
    for site in sites:
        together.setdefault(site.fqn, []).append(site)
    unfit = {fqn: _unfit(members, len(seen[fqn])) for fqn, members in together.items()}
    proofs = [SiteProof(s, 0.0, unfit[s.fqn]) for s in sites]
    good = [p.site for p in proofs if p.refusal is None]
    while True:
        try:
            identity = realise(
                share_parameters(model), [Target(s, EXACT, {}) for s in good], examples, caches
            )
        except UntracedError as error:  # and so would be all layers like it
            like = {s.fqn for s in good if _alike(model, s, error.site)}
            proofs = _refused(proofs, like, str(error))
        except UncalledError as error:
            proofs = _refused(proofs, set(error.silent), str(error))
        except RewriterError:
            raise
        except Exception as error:  # of the model itself, in whatever it does with its modules
            reason = f"the model with its attention re-emitted fails with {_line(error)}"
            proofs = _refused(proofs, {s.fqn for s in good}, reason)
        else:
            compared = {p.site.index: p for p in _compare(model, identity, good, examples)}
            proofs = [compared.get(p.site.index, p) for p in proofs]
            left = [p.site for p in proofs if p.refusal is None]
            if left == good:
                return identity, proofs
        good = [p.site for p in proofs if p.refusal is None]


def _refused(proofs: list[SiteProof], owners: set[str], reason: str) -> list[SiteProof]:
    """The sites of these owners refused, unless they were already."""
    return [
        replace(p, refusal=reason) if p.refusal is None and p.site.fqn in owners else p
        for p in proofs
    ]


def _alike(model: nn.Module, site: AttentionSite, other: AttentionSite) -> bool:
    """Whether one trace serves the owners of both."""
    kinds = {type(model.get_submodule(s.fqn)) for s in (site, other)}
    same = bool(site.fingerprint) and site.fingerprint == other.fingerprint
    return site.fqn == other.fqn or (same and len(kinds) == 1)


def _unfit(sites: Sequence[AttentionSite], calls: int) -> str | None:
    """Why the sites of one owner cannot be rewritten, by how often it runs and what runs give."""
    runs = sites[0].runs
    if calls != runs:
        return (
            f"the module runs {calls} times in one forward pass, but its attention was found in "
            f"{runs} of them"
        )
    first = {s.slot: s.core_facts() for s in sites if s.run == 0}
    for site in sites:
        if site.slots != len(first):
            return f"its runs compute {len(first)} and {site.slots} attention blocks"
        facts = site.core_facts()
        odd = [name for name in facts if facts[name] != first[site.slot][name]]
        if odd:
            return f"its runs compute different attention: they differ in {', '.join(odd)}"
    return None


def _compare(
    model: nn.Module, identity: nn.Module, sites: Sequence[AttentionSite], examples: Examples
) -> list[SiteProof]:
    """Every owner on what it is given in each example call, as it is and sharpened."""
    # One proof for each owner, shared by its sites.
    worst = {site.fqn: SiteProof(site, 0.0) for site in sites}
    for name, call in {"captured call": examples.primary, **examples.variants}.items():
        streams = observe(model, list(worst), call)
        for fqn, proof in worst.items():
            if proof.refusal is None:
                ours, theirs = identity.get_submodule(fqn), model.get_submodule(fqn)
                worst[fqn] = _judge(proof, name, ours, theirs, streams[fqn])
    return [replace(worst[site.fqn], site=site) for site in sites]


def _judge(
    proof: SiteProof, name: str, ours: nn.Module, theirs: nn.Module, calls: Sequence[Observed]
) -> SiteProof:
    largest = proof.difference
    for observed in calls:
        for inputs in (observed.named, _sharpened(observed)):
            try:
                largest = max(largest, _difference(ours, theirs, inputs))
            except RewriterError as error:
                return SiteProof(proof.site, float("inf"), f"{name}: {error}")
            except Exception as error:
                reason = f"{name}: the re-emitted module fails with {_line(error)}"
                return SiteProof(proof.site, float("inf"), reason)
    if largest > TOLERANCE:
        reason = f"{name}: the re-emitted module differs from the original by {largest:.1e}"
        return SiteProof(proof.site, largest, reason)
    return SiteProof(proof.site, largest)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _difference(ours: nn.Module, theirs: nn.Module, named: Mapping[str, Any]) -> float:
    with torch.no_grad():
        expected = tensors_of(theirs(**own_caches(named)))
        got = tensors_of(ours(**own_caches(named)))
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        scale = max(float(b.float().abs().max()), 1e-6) if b.numel() else 1.0
        worst = max(worst, max_difference(a, b) / scale)
    return worst


def _sharpened(observed: Observed) -> dict[str, Any]:
    """The call with its first floating 3-D input enlarged, which sharpens the attention."""
    done: dict[int, torch.Tensor] = {}
    chosen = [0]

    def change(_: Any, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if id(value) in done:
            return done[id(value)]
        if value.dim() == 3 and not chosen[0]:
            chosen[0] = 1
            generator = torch.Generator().manual_seed(7)
            noise = torch.randn(value.shape, generator=generator).to(value)
            done[id(value)] = 3.0 * (value / (value.std() + 1e-6) + noise)
            return done[id(value)]
        done[id(value)] = value
        return value

    return map_leaves(observed.named, change)


def cached_difference(
    ours: nn.Module, theirs: nn.Module, examples: Examples, split: int = 9
) -> float:
    """Largest logit difference of prefill + decode between two models, each with its own cache."""
    steps: list[torch.Tensor] = []
    for model in (ours, theirs):
        steps.append(torch.cat(cached_logits(model, examples, split), dim=1))
    return max_difference(steps[0], steps[1])


def cached_logits(model: nn.Module, examples: Examples, split: int) -> list[torch.Tensor]:
    """Logits of a prefill of `split` tokens followed by single tokens."""
    call = examples.primary
    ids = call.kwargs[str(examples.tokens)]
    mask = call.kwargs.get(examples.padded) if examples.padded is not None else None
    cache = new_cache(model)
    out: list[torch.Tensor] = []
    edges = [0, split, *range(split + 1, ids.shape[1] + 1)]
    with torch.no_grad():
        for start, stop in itertools.pairwise(edges):
            kwargs = examples.with_tokens(ids[:, start:stop])
            if mask is not None:
                kwargs[str(examples.padded)] = mask[:, :stop]
            result = model(**kwargs, past_key_values=cache, use_cache=True)
            out.append(first_tensor(result))
    return out
