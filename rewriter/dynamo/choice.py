"""Which sites of a graph the policy wants replaced, and by what."""

from __future__ import annotations

from dataclasses import dataclass

from rewriter import targets
from rewriter.backends.lowering import lowered
from rewriter.errors import UsageError
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.kernels import WindowAttention
from rewriter.ir.site import AttentionSite
from rewriter.passes.match import Match, MatchResult
from rewriter.passes.splice import Outcome
from rewriter.plan import Decision
from rewriter.policy import Policy, make_plan


@dataclass(frozen=True)
class Choice:
    """Attributes:
    replaced: the matches to replace.
    instead: by site index, what an approximate mixer computes in the place of the original.
    kept: the outcomes of the sites that stay as they are.
    """

    replaced: tuple[Match, ...]
    instead: dict[int, BlockSparse]
    kept: tuple[Outcome, ...]


def choose(policy: Policy, found: MatchResult) -> Choice:
    """Decide every site of one graph. A graph without attention is fine: others may have some.

    Raises:
        UsageError: a mixer with parameters, or one that has no form as a single operator.
    """
    sites = [m.site for m in found.matches]
    plan = make_plan(policy.model_copy(update={"minimum_sites": 0}), sites, found.misses)
    replaced: list[Match] = []
    instead: dict[int, BlockSparse] = {}
    kept: list[Outcome] = []
    for item, decision in zip(found.matches, plan.decisions, strict=True):
        if decision.target == "keep":
            kept.append(Outcome(item.site, "kept", "the policy keeps it"))
            continue
        if decision.tier != "exact":
            instead[item.site.index] = _approximate(item.site, decision, policy)
        if decision.status == "refused":
            kept.append(Outcome(item.site, "kept", str(decision.reason)))
        else:
            replaced.append(item)
    return Choice(tuple(replaced), instead, tuple(kept))


def _approximate(site: AttentionSite, decision: Decision, policy: Policy) -> BlockSparse:
    advice = (
        f"call rewriter.rewrite(model, '{policy.name or decision.target}') and compile its result"
    )
    if decision.tier == "distilled":
        raise UsageError(
            f"'{decision.target}' has parameters to learn, which a compiled graph cannot hold; "
            + advice
        )
    target = targets.resolve(decision.target, decision.options)
    spec = None
    if isinstance(target, targets.Target) and hasattr(target.mixer, "kernel_spec"):
        spec = target.mixer.kernel_spec(site, target.options)
    if isinstance(spec, WindowAttention):
        spec = lowered(spec, site.heads.key_dim, site.heads.value_dim)
    if not isinstance(spec, BlockSparse):
        raise UsageError(f"'{decision.target}' has no form as one operator of a graph; {advice}")
    return spec
