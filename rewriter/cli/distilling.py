"""`rewriter distill`: a rewritten checkpoint learns from the original."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewriter.cli.checkpoints import (
    documents,
    is_language_model,
    open_original,
    open_rewritten,
    positions_of,
    same_tokens,
    stored_plan,
)
from rewriter.cli.session import Json, Session, Threads, Traceback, check_target, session
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.distill import DistillConfig, DistillResult, Rows

MINUTES = 6.0
SHARES = {"layers": 4.0, "logits": 6.0, "long": 2.0}  # of the budget


def distill(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", help="The original checkpoint.", show_default=False)
    ],
    student: Annotated[
        Path,
        typer.Argument(
            metavar="STUDENT_DIR", help="The directory that 'convert' wrote.", show_default=False
        ),
    ],
    target: Annotated[
        Path, typer.Option("--out", help="Directory of the new checkpoint.", show_default=False)
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            help="Text file, .jsonl or saved data set; may be given several times.",
            show_default=False,
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(help="All settings: a recipe or a YAML or JSON file; options change them."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Training time in all.", show_default=f"{MINUTES:g}"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps in all, instead of or with minutes.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a row.", show_default="1024")
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.9, help="Last part not trained on.", show_default="0.1"),
    ] = None,
    train: Annotated[
        Literal["core", "lora", "all"] | None,
        typer.Option(help="What the second stage trains.", show_default="lora"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the order of rows.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="Of the computation.", show_default="bfloat16"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at --out.")
    ] = False,
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Train the new parts of a converted checkpoint to imitate the original.

    First every rewritten layer learns its original's output, then the whole model learns the
    original's predictions. A run may be killed at any time; --resume goes on from its last
    checkpoint, kept in OUT.distill until the run is complete.
    """
    with session(as_json, threads) as out:
        check_target(target, overwrite)
        work = target.with_name(f"{target.name}.distill")
        _check_work(work, resume)
        given: dict[str, Any] = {
            "length": length,
            "held_out": held_out,
            "seed": seed,
            "dtype": dtype,
        }
        settings = _settings(config, given, train, minutes, steps)
        texts = documents(text)
        original, source = open_original(teacher), open_rewritten(student)
        with out.working("loading"):
            tokenizer = source.tokenizer if source.has_tokenizer else original.tokenizer
            same_tokens(original.tokenizer, tokenizer, texts[0])
            wanted = settings.long
            settings = _fitting(settings, source.config, is_language_model(original.model))
            if wanted is not None and settings.long != wanted:
                what = "is left out" if settings.long is None else "takes rows of as many"
                out.note(f"the model reads fewer tokens than the stage 'long' has: it {what}")
            train_rows = _rows(texts, tokenizer, settings, is_language_model(original.model))
            models = original.model, source.model
            _check_reach(source.model, settings.length)
        result = _run(out, *models, train_rows, settings, work, target, resume)
        from rewriter.checkpoint.write import save

        with out.working("saving"):
            save(source.model, target, stored_plan(student), tokenizer, overwrite)
        shutil.rmtree(work, ignore_errors=True)
        _show(out, result, target)
        out.result(
            {
                "teacher": str(teacher),
                "student": str(student),
                "out": str(target),
                "rows": len(train_rows),
                "length": settings.length,
                "seconds": result.seconds,
                "stages": [asdict(stage) for stage in result.stages],
                "config": settings.model_dump(mode="json"),
            }
        )


def _run(
    out: Session,
    teacher: Any,
    student: Any,
    rows: Rows,
    settings: DistillConfig,
    work: Path,
    target: Path,
    resume: bool,
) -> DistillResult:
    from rewriter.distill import LiveProgress
    from rewriter.distill import distill as run

    try:
        with LiveProgress(out.notes) as progress:
            return run(
                teacher, student, rows, settings, folder=work, resume=resume, reporter=progress
            )
    except KeyboardInterrupt:
        if work.is_dir():
            out.note(f"stopped; the same command with --resume goes on from {work}")
        raise


def _check_work(work: Path, resume: bool) -> None:
    """An unfinished run is neither continued nor thrown away unasked."""
    if work.is_dir() and any(work.iterdir()) and not resume:
        raise UsageError(
            f"an unfinished run is in {work}; add --resume to go on with it, or delete it to start "
            "again"
        )
    if work.is_file():
        raise UsageError(
            f"{work} is a file, but checkpoints of the run go there; choose another --out"
        )


def _settings(
    source: str | None,
    given: dict[str, Any],
    train: str | None,
    minutes: float | None,
    steps: int | None,
) -> DistillConfig:
    """The recipe, the config file or the default, with what the command line says on top.

    Raises:
        UsageError: the options do not fit together.
    """
    from rewriter.distill import named_config, parse_config

    data: dict[str, Any]
    if source is not None:
        data = named_config(source).model_dump(mode="json")
    else:
        data = {"layers": {}, "logits": {}}
        if minutes is None and steps is None:
            minutes = MINUTES
    data.update({key: value for key, value in given.items() if value is not None})
    stages = [name for name in SHARES if data.get(name) is not None]
    if train is not None:
        if "logits" not in stages:
            raise UsageError("--train is for the stage 'logits', which the config leaves out")
        data["logits"]["train"] = train
    if minutes is not None or steps is not None:
        for name in stages:
            share = SHARES[name] / sum(SHARES[other] for other in stages)
            data[name]["max_seconds"] = None if minutes is None else 60 * minutes * share
            data[name]["steps"] = None if steps is None else max(1, round(steps * share))
    return parse_config(data, "the distillation config" if source is None else f"'{source}'")


def _fitting(settings: DistillConfig, config: Any, language: bool) -> DistillConfig:
    """Rows no longer than the model reads, and no logits from a model that predicts none.

    A stage on longer rows takes the longest that the model reads; one that would not be longer then
    is left out.
    """
    changes: dict[str, Any] = {}
    positions = positions_of(config)
    if positions is not None and settings.length > positions:
        changes["length"] = positions
    length = changes.get("length", settings.length)
    if settings.long is not None and positions is not None and settings.long.length > positions:
        most = positions // length * length
        long = settings.long.model_copy(update={"length": most})
        changes["long"] = long if most > length else None
    if not language:
        inside = settings.logits
        if inside is not None:
            other = inside.hidden > 0 or inside.relations is not None
            inside = inside.model_copy(update={"divergence": 0.0}) if other else None
        if settings.layers is None and inside is None:
            raise UsageError(
                "an encoder has no logits to match; give the config a stage 'layers', or 'hidden' "
                "or 'relations' in the stage 'logits'"
            )
        changes |= {"logits": inside, "long": None}
    fitted = settings.model_copy(update=changes)
    if fitted.layers is None and fitted.logits is None and fitted.long is None:
        raise UsageError(
            f"the model reads {positions} tokens, too few for the rows of the stage 'long', and "
            "the config has no other stage"
        )
    return fitted


def _check_reach(student: Any, length: int) -> None:
    """Rows must be long enough that what learns is at work at all.

    Raises:
        UsageError: a far field, say, begins only after the end of the rows.
    """
    from rewriter.distill.copies import rewritten_cores
    from rewriter.mixers.base import Mixer

    for core in rewritten_cores(student).values():
        if type(core).test_length is not Mixer.test_length and core.test_length() > length:
            raise UsageError(
                f"rows of {length} tokens are too short for '{core.info.name}' at "
                f"'{core.site.fqn}' to learn from; use --length {core.test_length()} or more"
            )


def _rows(texts: list[str], tokenizer: Any, settings: DistillConfig, language: bool) -> Rows:
    """Packed rows for a language model, one line a row for an encoder."""
    from rewriter.distill import packed_corpus, padded_corpus

    if language:
        return packed_corpus(texts, tokenizer, settings.length, settings.held_out).train
    lines = [line.strip() for text in texts for line in text.splitlines()]
    used = [line for line in lines if line]
    return padded_corpus(used, tokenizer, min(settings.length, 128), settings.held_out).train


def _show(out: Session, result: DistillResult, target: Path) -> None:
    from rewriter.cli.tables import Column, number, table

    rows = [
        (s.name, str(s.steps), str(s.tokens), f"{s.seconds:.0f} s", number(s.first), number(s.last))
        for s in result.stages
    ]
    columns: list[Column] = [
        "stage",
        ("steps", "right"),
        ("tokens", "right"),
        ("time", "right"),
        ("first loss", "right"),
        ("last loss", "right"),
    ]
    out.show(table(columns, rows))
    out.show("", f"saved to {target}")
