"""`rewrite`: the line from a model and a policy to a verified model, readable top to bottom."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from rewriter.budgets import Budget
from rewriter.checkpoint.guard import guard, guarded_plan
from rewriter.errors import NoSiteError, UsageError, VerificationError
from rewriter.evaluate.scoring import evaluation_mode
from rewriter.ir.site import NearMiss
from rewriter.mixers.channel.base import Projection
from rewriter.passes.exact import padding
from rewriter.passes.exact.rest import layers
from rewriter.passes.examples import Examples, calls_of, examples_for
from rewriter.passes.find import Inspection, find
from rewriter.passes.realise import Caches, ReEmitted, realise, share_parameters, targets_of
from rewriter.passes.realise.channel import example_calls, rewrite_mlps, superseded
from rewriter.passes.step import attach
from rewriter.passes.verify import Level, MlpProof, SiteProof, prove_mlps, prove_sites
from rewriter.passes.verify import verify as run_contracts
from rewriter.plan import Plan
from rewriter.planner.budgeting import plan_under
from rewriter.policy import Policy, make_plan
from rewriter.report import Report

M = TypeVar("M", bound=nn.Module)
OnMiss = Literal["error", "warn", "ignore"]
PolicyLike = Policy | Budget | str | Path | Mapping[str, Any]
REPORT = "_rewrite_report"


def rewrite(
    model: M,
    policy: PolicyLike | Plan,
    example_inputs: Any = None,
    *,
    on_miss: OnMiss = "warn",
    verify: Level = "full",
    length: int | None = None,
    force: bool = False,
    calibration: Sequence[Any] = (),
) -> M:
    """Replace attention and MLP blocks of a trained model as the policy asks, and prove it.

    Args:
        model: any `nn.Module`; it is not changed. The result shares its parameters.
        policy: a preset name, a YAML file, a dict, a `Policy`, a budget, or a `Plan` to replay.
        example_inputs: tensor, tuple or dict to call the model with; derived from the config of
            Hugging Face models by default.
        on_miss: what to do about attention-like blocks that were not understood.
        verify: 'full', 'quick' (no timing, no teacher gap) or 'none'.
        length: tokens at which the rewrite must not be slower than the original.
        force: accept a rewrite that is slower at `length`.
        calibration: calls of the model (as `example_inputs`) whose activations decide what a
            channel mixer keeps; the example call by default, whose tokens are random. A budget is
            measured on their tokens.

    Returns:
        A model of the same kind. `report_of(result)` is the report, `plan_of(result)` the plan.

    Raises:
        UsageError: policy, plan or example inputs do not fit.
        NoSiteError: nothing to rewrite was found, or `on_miss='error'` and something was missed.
        VerificationError: a contract failed; the report is in its `report` attribute.
    """
    if any(isinstance(m, ReEmitted | Projection) for m in model.modules()):
        raise UsageError("the model is rewritten already; rewrite the original model instead")
    clock = _Clock()
    with evaluation_mode(model):
        examples = examples_for(model, example_inputs)
    wanted = policy if isinstance(policy, Plan) else Policy.load(policy)
    with evaluation_mode(model):
        found = find(model, examples, isinstance(wanted, Policy) and wanted.linears)
        clock.lap("find")
        _mind_misses(found.misses, on_miss)
        if isinstance(wanted, Policy) and wanted.budget is not None and found.sites:
            stream = _tokens_of(calibration, examples)
            wanted = plan_under(model, found.sites, wanted.budget, stream, examples=examples).plan
            clock.lap("search")
        plan = _plan(wanted, found)
        caches: Caches = {}
        identity, proofs = prove_sites(model, found.sites, examples, caches)
        plan = _refuse_unproved(plan, proofs)
        asked = {d.index for d in plan.mlps}
        mlp_proofs = prove_mlps(model, [m for m in found.mlps if m.index in asked], examples)
        plan = _refuse_unproved_mlps(plan, mlp_proofs)
        clock.lap("prove")
        targets = targets_of(plan)
        if not targets and all(d.status == "refused" for d in plan.mlps):
            raise NoSiteError(_nothing_left(plan))
        result = realise(share_parameters(model), targets, examples, caches)
        given = [call for inputs in calibration for call in calls_of(inputs)]
        mlps = rewrite_mlps(result, plan.mlps, model, given or example_calls(examples))
        plan = _beside_mlps(plan.model_copy(update={"mlps": mlps}))
        if isinstance(wanted, Policy) and wanted.packed and not superseded(plan.mlps):
            plan = plan.model_copy(update={"packed": padding.plan(model, result, examples)})
        layers(result, plan)
        padding.apply(result, plan.packed)
        clock.lap("realise")
        contracts = run_contracts(
            *(model, identity, result, targets, proofs, examples, verify, length, force, caches),
            *(plan, mlp_proofs),
        )
        for cache in caches.values():
            cache.forget_captures()
        clock.lap("verify")
    _restore_modes(model, result)
    if found.graph is not None and not superseded(plan.mlps):
        attach(result, found.graph.captured, found.graph.matches)
    plan = plan.carried_out()
    report = Report(found.sites, found.misses, plan, tuple(contracts), clock.laps, found.mlps)
    if report.failures:
        raise _failed(report)
    guard(result, plan)
    result.__dict__[REPORT] = report
    return result


def inspect(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Find the attention of a model and say what was not understood; changes nothing."""
    with evaluation_mode(model):
        return find(model, examples_for(model, example_inputs))


def make_plan_for(
    model: nn.Module, policy: PolicyLike, example_inputs: Any = None
) -> tuple[Plan, Inspection]:
    """The plan a policy gives for a model, without rewriting it."""
    wanted = Policy.load(policy)
    with evaluation_mode(model):
        found = find(model, examples_for(model, example_inputs), wanted.linears)
    return _plan_of(wanted, found), found


def report_of(model: nn.Module) -> Report:
    """The report of the rewrite that made this model.

    Raises:
        UsageError: the model was not made by `rewrite` (a loaded one has a plan but no report).
    """
    report = model.__dict__.get(REPORT)
    if not isinstance(report, Report):
        raise UsageError("this model carries no report; only the result of rewriter.rewrite does")
    return report


def plan_of(model: nn.Module) -> Plan:
    """The plan that was carried out on this model.

    Raises:
        UsageError: the model was made by neither `rewrite` nor `load`.
    """
    plan = guarded_plan(model)
    if plan is None:
        raise UsageError("this model was not made by rewriter.rewrite or rewriter.load")
    return plan


def _mind_misses(misses: Sequence[NearMiss], on_miss: OnMiss) -> None:
    if not misses or on_miss == "ignore":
        return
    text = f"{len(misses)} attention-like blocks were not understood; first: {misses[0].describe()}"
    if on_miss == "error":
        raise NoSiteError(f"{text}; pass on_miss='warn' to rewrite the others")
    warnings.warn(text, stacklevel=3)


def _plan(wanted: Policy | Plan, found: Inspection) -> Plan:
    if isinstance(wanted, Plan):
        wanted.check_against(found.sites)
        wanted.check_mlps(found.mlps)
        return wanted
    if not found.sites and not (found.mlps and any(r.site == "mlp" for r in wanted.rules)):
        why = f"; {found.misses[0].describe()}" if found.misses else ""
        raise NoSiteError(f"no attention was found in the model{why}")
    return _plan_of(wanted, found)


def _plan_of(policy: Policy, found: Inspection) -> Plan:
    plan = make_plan(policy, found.sites, found.misses, found.mlps)
    return plan.model_copy(update={"linears": list(found.linears), "fused": list(found.fused)})


def _tokens_of(calibration: Sequence[Any], examples: Examples) -> torch.Tensor:
    """(tokens,) the token ids of all calls, one after the other."""
    ids = [
        tensor.flatten()
        for inputs in calibration
        for call in calls_of(inputs)
        for tensor in [call.kwargs.get(examples.tokens or "", next(iter(call.args), None))]
        if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point()
    ]
    if not ids:
        raise UsageError(
            "a budget is measured on text: pass calibration=[...] with (rows, tokens) token ids"
        )
    return torch.cat(ids).cpu()


def _beside_mlps(plan: Plan) -> Plan:
    """The plan without what relies on weights of MLP blocks that structures replace.

    A replaced weight is no linear layer any more, and packed layers were proved with the original.
    """
    replaced = superseded(plan.mlps)
    if not replaced:
        return plan
    gone = {"status": "refused", "reason": "structures replace its weights"}
    linears = [
        x.model_copy(update=gone) if f"{x.fqn}.{x.weight}" in replaced else x for x in plan.linears
    ]
    inside = {f"{x.fqn}.": x for x in plan.fused if x.kind == "gated"}
    touched = {x.fqn for at, x in inside.items() if any(w.startswith(at) for w in replaced)}
    fused = [x.model_copy(update=gone) if x.fqn in touched else x for x in plan.fused]
    unproved = {"status": "refused", "reason": "it was proved with the original MLP weights"}
    packed = [x.model_copy(update=unproved) for x in plan.packed]
    return plan.model_copy(update={"linears": linears, "fused": fused, "packed": packed})


def _refuse_unproved(plan: Plan, proofs: Sequence[SiteProof]) -> Plan:
    refusals = {p.site.index: p.refusal for p in proofs if p.refusal is not None}
    decisions = [
        d.model_copy(update={"status": "refused", "reason": f"not proved: {refusals[d.index]}"})
        if d.index in refusals and d.status != "refused"
        else d
        for d in plan.decisions
    ]
    return plan.model_copy(update={"decisions": decisions})


def _refuse_unproved_mlps(plan: Plan, proofs: Sequence[MlpProof]) -> Plan:
    refusals = {p.site.index: p.refusal for p in proofs if p.refusal is not None}
    mlps = [
        d.model_copy(update={"status": "refused", "reason": f"not proved: {refusals[d.index]}"})
        if d.index in refusals and d.status != "refused"
        else d
        for d in plan.mlps
    ]
    return plan.model_copy(update={"mlps": mlps})


def _nothing_left(plan: Plan) -> str:
    blocks = [*plan.decisions, *plan.mlps]
    first = next((d for d in blocks if d.reason), None)
    why = f"; first reason, at '{first.fqn}': {first.reason}" if first else ""
    return f"none of the {len(blocks)} blocks can be rewritten as asked{why}"


def _failed(report: Report) -> VerificationError:
    first = report.failures[0]
    error = VerificationError(
        f"contract {first.number} ({first.title}) failed at {first.subject}: {first.check}: "
        f"{first.measured:.3g}, allowed {first.bound:.3g}"
        + (f" ({first.detail})" if first.detail else "")
        + "; see the report of this error, or exclude the site in the policy"
    )
    error.report = report  # type: ignore[attr-defined]
    return error


def _restore_modes(model: nn.Module, result: nn.Module) -> None:
    """Training flags of the result follow the original."""
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in result.named_modules():
        owner = name.rsplit(".core", 1)[0] if name not in flags else name
        module.training = flags.get(owner, model.training)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now


__all__ = ["Inspection", "inspect", "make_plan_for", "plan_of", "report_of", "rewrite"]
