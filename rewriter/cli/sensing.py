"""`rewriter sensitivity`: what each layer loses by each candidate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.checkpoints import Checkpoint, open_original, token_stream
from rewriter.cli.session import Json, Threads, Traceback, session
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.planner import Candidate


def sensitivity(
    checkpoint: Checkpoint,
    text: Annotated[
        list[Path] | None, typer.Option(help="Calibration text; may be given several times.")
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            help="A mixer with options, 'sink_window:window=64,sinks=4'; may be given several "
            "times.",
            show_default="sink_window:window=64,sinks=4",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Probes; each costs two forwards a site.")] = 2,
    swaps: Annotated[
        bool, typer.Option(help="Measure whole models, not only statistics and gaps at the site.")
    ] = True,
    heads: Annotated[
        bool, typer.Option("--heads", help="Also give single key/value heads a window.")
    ] = False,
    to: Annotated[Path | None, typer.Option("--out", help="Write everything as JSON.")] = None,
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Measure what every attention loses by every candidate: alone, and once all others changed.

    Text loss hardly notices a model that cannot look back, so copying stands beside it.
    """
    with session(as_json, threads) as out:
        from rewriter.api import inspect
        from rewriter.atomic import write_file
        from rewriter.cli.show_sensitivity import sensitivity_view
        from rewriter.planner.sensitivity import sensitivities

        if not text:
            raise UsageError("give calibration text with --text FILE")
        wanted = [parsed(c) for c in candidate or ["sink_window:window=64,sinks=4"]]
        source = open_original(checkpoint)
        stream = token_stream(source.tokenizer, text)
        with out.working("loading the model"):
            model = source.model
        with out.working("reading its graph"):
            sites = inspect(model).sites
        found = sensitivities(
            model, sites, wanted, stream, rows=rows, swaps=swaps, heads=heads, note=out.note
        )
        out.show(*sensitivity_view(found))
        data = {"checkpoint": str(checkpoint), **found.to_json()}
        if to is not None:
            write_file(to, (json.dumps(data, indent=1) + "\n").encode())
        out.result(data)


def parsed(text: str) -> Candidate:
    """'mixer:option=value,option=value' as a candidate.

    Raises:
        UsageError: not of that form, or no such mixer or option.
    """
    import yaml

    from rewriter.planner import Candidate
    from rewriter.targets import TargetProblem, resolve

    name, _, rest = text.partition(":")
    options = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"'{part}' of --candidate is no option=value")
        options[key.strip()] = yaml.safe_load(value)
    found = resolve(name.strip(), options)
    if isinstance(found, TargetProblem):
        raise UsageError(f"--candidate '{text}': {found.message}")
    return Candidate(name.strip(), options)
