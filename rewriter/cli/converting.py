"""`rewriter convert`: rewrite, prove, save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rewriter.cli.checkpoints import Checkpoint, Dtype, open_original
from rewriter.cli.session import Json, Session, Threads, Traceback, check_target, session
from rewriter.errors import InputError, UsageError, VerificationError

if TYPE_CHECKING:
    from rewriter.checkpoint.paging import Pages
    from rewriter.checkpoint.read import Source
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
        Literal["full", "quick", "layers", "none"] | None,
        typer.Option(
            help="Which contracts to check: quick leaves out timing and teacher gap, layers checks "
            "module by module.",
            show_default="full, or layers of a model larger than --memory",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What it may take, such as '8 GB'; the weights of a larger model stay in their "
            "files and are read layer by layer.",
            show_default="half of what is free",
        ),
    ] = None,
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

    A model may be larger than memory: weights of its own dtype are mapped from their files, read
    layer by layer and written one file at a time.
    """
    with session(as_json, threads) as out:
        check_target(target, overwrite)
        wanted = _wanted(policy, plan)
        room = _room(memory)
        from rewriter.api import plan_of, report_of, rewrite
        from rewriter.checkpoint.write import MAX_SHARD_BYTES, save

        source = open_original(checkpoint, dtype)
        pages = _pages(source, room)
        with out.working("loading the model"):
            model = source.model
            tokenizer = source.tokenizer if source.has_tokenizer else None
        try:
            with out.working("rewriting and proving"), pages.kept_within():
                student = rewrite(
                    model,
                    wanted,
                    # warnings are written here, as one line each
                    on_miss="error" if on_miss == "error" else "ignore",
                    verify=verify or ("layers" if pages.files else "full"),
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
            shard = min(MAX_SHARD_BYTES, room // 4)
            save(student, target, plan_of(student), tokenizer, overwrite, shard, pages.give_back)
        note = "" if tokenizer is not None else " (the source has no tokenizer to save along)"
        out.show("", f"saved to {target}{note}")
        out.result({"checkpoint": str(checkpoint), "out": str(target), **report.to_json()})


def _room(memory: str | None) -> int:
    from rewriter.budgets import size_in_bytes
    from rewriter.checkpoint.paging import available_bytes

    return available_bytes() // 2 if memory is None else size_in_bytes(memory)


def _pages(source: Source, room: int) -> Pages:
    """What keeps a model larger than `room` bytes out of memory; of a smaller one it does nothing.

    Raises:
        InputError: the weights are larger and have to be converted, so they cannot stay in files.
    """
    from rewriter.checkpoint.paging import Pages

    if source.weight_bytes <= room:
        return Pages((), room)
    if not source.mapped_files:
        raise InputError(
            f"{source.path} has {source.weight_bytes / 1e9:.1f} GB of weights, more than the "
            f"{room / 1e9:.1f} GB of memory for them, and only safetensors of the dtype they are "
            "stored in stay in their files; leave out --dtype, or raise --memory"
        )
    return Pages(source.mapped_files, room // 8)


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
