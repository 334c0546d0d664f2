"""`rewriter convert`: rewrite, prove, save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rewriter.cli.checkpoints import Checkpoint, Dtype, open_original
from rewriter.cli.session import Json, Session, Threads, Traceback, check_target, session
from rewriter.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from rewriter.plan import Plan
    from rewriter.policy import Policy
    from rewriter.report import Report


def convert(
    checkpoint: Checkpoint,
    target: Annotated[
        Path, typer.Option("--out", help="Directory of the new checkpoint.", show_default=False)
    ],
    policy: Annotated[
        str | None, typer.Option(help="Name of a shipped policy, or a YAML file.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan that 'rewriter plan --out' wrote, instead.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at --out.")
    ] = False,
    dtype: Dtype = "auto",
    verify: Annotated[
        Literal["full", "quick", "none"],
        typer.Option(help="Which contracts to check; quick leaves out timing and teacher gap."),
    ] = "full",
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens at which the rewrite must not be slower than before."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Accept a rewrite that is slower at --length.")
    ] = False,
    on_miss: Annotated[
        Literal["error", "warn", "ignore"],
        typer.Option(help="What to do about attention that was not understood."),
    ] = "warn",
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Replace the attention of a model, prove what can be proved, and save the result.

    The checkpoint appears at --out whole or not at all. Exit code 4: no attention to rewrite; 5: a
    contract failed, and nothing was written.
    """
    with session(as_json, threads) as out:
        check_target(target, overwrite)
        wanted = _wanted(policy, plan)
        from rewriter.api import plan_of, report_of, rewrite
        from rewriter.checkpoint.write import save

        source = open_original(checkpoint, dtype)
        with out.working("loading the model"):
            model = source.model
            tokenizer = source.tokenizer if source.has_tokenizer else None
        try:
            with out.working("rewriting and proving"):
                student = rewrite(
                    model,
                    wanted,
                    # warnings are written here, as one line each
                    on_miss="error" if on_miss == "error" else "ignore",
                    verify=verify,
                    length=length,
                    force=force,
                )
        except VerificationError as error:
            report = getattr(error, "report", None)
            if report is not None:
                _show(out, report)
            raise
        report = report_of(student)
        if on_miss == "warn":
            for miss in report.misses:
                out.warn(f"not rewritten: {miss.describe()}")
        _show(out, report)
        with out.working("saving"):
            save(student, target, plan_of(student), tokenizer, overwrite)
        note = "" if tokenizer is not None else " (the source has no tokenizer to save along)"
        out.show("", f"saved to {target}{note}")
        out.result({"checkpoint": str(checkpoint), "out": str(target), **report.to_json()})


def _wanted(policy: str | None, plan: Path | None) -> Policy | Plan:
    """The request, read before a model is loaded for nothing."""
    from rewriter.plan import Plan
    from rewriter.policy import Policy, preset_names

    if plan is not None and policy is not None:
        raise UsageError("give --policy or --plan, not both")
    if plan is not None:
        return Plan.load(plan)
    if policy is None:
        names = ", ".join(preset_names())
        raise UsageError(f"say what to do with --policy (one of {names}, or a file) or --plan FILE")
    wanted = Policy.load(policy)
    if wanted.budget is not None:
        raise UsageError(
            f"the policy '{policy}' is a budget, whose plan is measured on text: run 'rewriter "
            f"plan --policy {policy} --text FILE --out plan.json' first, then convert with --plan"
        )
    return wanted


def _show(out: Session, report: Report) -> None:
    from rewriter.cli.show_contracts import contracts_view
    from rewriter.cli.show_plan import plan_summary

    out.show(*plan_summary(report.plan.model_copy(update={"misses": []})))
    out.show(*contracts_view(report.contracts))
