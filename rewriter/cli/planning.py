"""`rewriter plan`: what a policy, or a budget, would do to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli.checkpoints import Checkpoint, open_original, token_stream
from rewriter.cli.session import Json, Threads, Traceback, session
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.policy import Policy


def plan(
    checkpoint: Checkpoint,
    policy: Annotated[
        str | None,
        typer.Option(help="Name of a shipped policy, or a YAML file.", show_default=False),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(help="Instead of a policy: what one forward may take: '40 ms', '0.5x'."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Instead of a policy: what the cache may take: '20 MiB', '0.25x'."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the budget speaks of.")
    ] = None,
    phase: Annotated[
        str, typer.Option(help="The forward that --latency means: prefill or decode.")
    ] = "prefill",
    device: Annotated[
        str, typer.Option(help="Where it will run: here, a device by name, or a profile file.")
    ] = "here",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text to measure on, for a budget; may be given several times."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Write the plan as JSON, to edit and replay.")
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Show what a policy would do to a model, site by site, without doing it.

    Under a budget the plan is searched: candidates are measured on --text (perplexity and copying),
    their times come from the profile of the device. That takes minutes to an hour.
    """
    with session(as_json, threads) as out:
        from rewriter.cli.show_plan import plan_view

        wanted = _wanted(policy, latency, memory, context, phase, device)
        if wanted.budget is not None and not text:
            raise UsageError("a budget is measured on text: give at least one --text FILE")
        source = open_original(checkpoint)
        measured = wanted.budget is not None or wanted.linears  # on the weights themselves
        with out.working("loading the model"):
            model = source.model if measured else source.skeleton
        more: dict[str, Any] = {}
        if wanted.budget is None:
            from rewriter.api import make_plan_for

            with out.working("reading its graph"):
                made, _ = make_plan_for(model, wanted)
            out.show(*plan_view(made))
        else:
            from rewriter.api import inspect
            from rewriter.cli.show_budget import budget_view
            from rewriter.planner.budgeting import plan_under

            stream = token_stream(source.tokenizer, text or [])
            with out.working("reading its graph"):
                sites = inspect(model).sites
            found = plan_under(model, sites, wanted.budget, stream, note=out.note)
            made, more = found.plan, {"budget": found.to_json()}
            out.show(*plan_view(made), *budget_view(found, wanted.budget))
        if to is not None:
            made.save(to)
            out.show("", f"written to {to}; carry it out with 'rewriter convert --plan {to}'")
        out.result({**made.to_json(), **more})


def _wanted(
    policy: str | None,
    latency: str | None,
    memory: str | None,
    context: int | None,
    phase: str,
    device: str,
) -> Policy:
    """The policy, or the budget that the options describe."""
    from rewriter.budgets import budget
    from rewriter.policy import Policy, preset_names

    if policy is not None:
        if latency is not None or memory is not None:
            raise UsageError("give --policy or a budget, not both; a policy file can hold a budget")
        return Policy.load(policy)
    if latency is None and memory is None:
        names = ", ".join(preset_names())
        raise UsageError(
            f"say what is wanted with --policy (one of {names}, or a file), --latency or --memory"
        )
    fields: dict[str, Any] = {"phase": phase, "device": device}
    for name, value in (("latency", latency), ("memory", memory), ("context", context)):
        if value is not None:
            fields[name] = value
    return Policy(name="budget", budget=budget(**fields))
