"""`rewriter eval`: what a rewrite costs in quality, beside the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli.checkpoints import (
    Checkpoint,
    Dtype,
    documents,
    is_language_model,
    open_source,
    positions_of,
    same_tokens,
)
from rewriter.cli.session import Json, Session, Threads, Traceback, session
from rewriter.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rewriter.evaluate import QualityReport, SuiteOptions

ANSWER_ROOM = 16  # tokens that a pass key may take after its prompt


def evaluate(
    checkpoint: Checkpoint,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, .jsonl or saved data set; may be given several times."),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="The original checkpoint, to compare with.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="Another checkpoint to measure in a column of its own, such as a window-only "
            "rewrite or a teacher trained as long as the student; may be given several times.",
            show_default=False,
        ),
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Rows of text to score.")] = 4,
    length: Annotated[int, typer.Option(min=4, help="Tokens a row.")] = 1024,
    held_out: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.99, help="Use only this last part of the text, as distill leaves it out."
        ),
    ] = 0.0,
    metrics: Annotated[
        str,
        typer.Option(
            help="Which to measure, separated by commas; there are also recall (key and value "
            "pairs), lists (nested lists) and speed (times and cache by length)."
        ),
    ] = "perplexity,copy,passkey,teacher",
    gap: Annotated[int, typer.Option(min=0, help="Tokens between a passage and its copy.")] = 700,
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="Folder of lm-evaluation-harness tasks with local data, measured as well.",
            show_default=False,
        ),
    ] = None,
    branches: Annotated[
        bool, typer.Option(help="Also measure with each branch of the mixers switched off.")
    ] = True,
    dtype: Dtype = "auto",
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Measure quality: perplexity, copying, pass keys, and the distance to the original.

    Plain perplexity hardly notices that a model cannot look back, so it is never shown alone. An
    encoder is judged by how well its sentence similarities agree with the original's, one with a
    language head by the hidden tokens that it guesses.
    """
    with session(as_json, threads) as out:
        from rewriter.cli.show_quality import quality_view
        from rewriter.evaluate import SuiteOptions

        chosen = tuple(name.strip() for name in metrics.split(",") if name.strip())
        suite = SuiteOptions(metrics=chosen, rows=blocks, copy_gap=gap)  # refuses unknown names
        source = open_source(checkpoint, dtype)
        other = None if teacher is None else open_source(teacher, dtype)
        more = {_column(path, n): open_source(path, dtype) for n, path in enumerate(beside or [])}
        with out.working("loading"):
            tokenizer, model = source.tokenizer, source.model
            original = None if other is None else other.model
        if is_language_model(model):
            texts = documents(text or [])
            if other is not None:
                same_tokens(other.tokenizer, tokenizer, texts[0])
            suite = _fitting(suite, length, positions_of(source.config))
            rows = _rows(texts, tokenizer, length, held_out)
            for companion in more.values():
                same_tokens(companion.tokenizer, tokenizer, texts[0])
            report = _language_report(
                *(out, model, original, tokenizer, rows, suite, branches),
                {name: companion.model for name, companion in more.items()},
                tasks,
            )
        elif original is None:
            raise UsageError("an encoder is judged against the original; give it with --teacher")
        else:
            guesses = callable(getattr(model, "get_output_embeddings", None))
            if guesses and model.get_output_embeddings() is not None:
                rows = _rows(documents(text or []), tokenizer, min(length, 128), held_out)
                report = _masked_report(out, model, original, tokenizer, rows[:blocks])
            else:
                report = _encoder_report(out, model, original, tokenizer, text or [], branches)
        out.show(*quality_view(report))
        out.result(
            {
                "checkpoint": str(checkpoint),
                "teacher": None if teacher is None else str(teacher),
                "text": [str(path) for path in text or []],
                **report.to_json(),
            }
        )


def _fitting(suite: SuiteOptions, length: int, positions: int | None) -> SuiteOptions:
    """The options for a model of so many positions.

    Raises:
        UsageError: what was asked for is longer than the model can read.
    """
    from dataclasses import replace

    if positions is None:
        return suite
    needs = {"--length": length}
    if "copy" in suite.metrics:
        needs["--gap and two passages"] = suite.copy_gap + 2 * suite.copy_passage
    for name, need in needs.items():
        if need > positions:
            raise UsageError(
                f"{name}: {need} tokens are more than the {positions} positions of the model; give "
                "less, or leave the measure out with --metrics"
            )
    most = positions - ANSWER_ROOM
    return replace(
        suite,
        passkey_lengths=_up_to(suite.passkey_lengths, most),
        recall_pairs=_up_to(suite.recall_pairs, positions // 4),
        list_lengths=_up_to(suite.list_lengths, most),
        speed_lengths=_up_to(suite.speed_lengths, most),
    )


def _up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    return tuple(n for n in sizes if n <= most) or (most,)


def _rows(texts: list[str], tokenizer: Any, length: int, held_out: float) -> torch.Tensor:
    """(rows, length) token ids, cut where distillation cuts."""
    from rewriter.distill.data import packed_corpus

    corpus = packed_corpus(texts, tokenizer, length, held_out)
    return corpus.held_out.ids if held_out > 0 else corpus.train.ids


def _language_report(
    out: Session,
    model: nn.Module,
    original: nn.Module | None,
    tokenizer: Any,
    rows: torch.Tensor,
    suite: SuiteOptions,
    branches: bool,
    beside: Mapping[str, nn.Module],
    tasks: Path | None,
) -> QualityReport:
    from dataclasses import replace

    from rewriter.evaluate import QualityReport, branches_of, harness, measure, measure_branches

    columns = {}
    if original is not None:
        with out.working("measuring the original"):
            columns["teacher"] = measure(original, tokenizer, rows, options=suite)
    for label, companion in beside.items():
        with out.working(f"measuring {label}"):
            columns[label] = measure(companion, tokenizer, rows, teacher=original, options=suite)
    name = "model" if original is None else "student"
    with out.working("measuring the model"):
        columns[name] = measure(model, tokenizer, rows, teacher=original, options=suite)
    if tasks is not None:
        every = {"teacher": original, **beside, name: model}
        for label, judged in every.items():
            if judged is not None:
                with out.working(f"running tasks on {label}"):
                    columns[label] |= {m.name: m for m in harness(judged, tokenizer, tasks)}
    ablation = {}
    if branches and branches_of(model):
        with out.working("switching branches off"):
            kept = tuple(m for m in suite.metrics if m in ("perplexity", "copy"))
            ablation = measure_branches(
                model,
                tokenizer,
                rows,
                options=replace(suite, metrics=kept),
                whole={k: v for k, v in columns[name].items() if "perplexity" in k},
            )
    scored = min(suite.rows, rows.shape[0])
    said = [f"{scored} rows of {rows.shape[1]} tokens, scored on their second half"]
    if "copy" in suite.metrics:
        said.append(f"copies of {suite.copy_passage} tokens over {suite.copy_gap} others")
    if "passkey" in suite.metrics:
        said.append(f"pass keys in {', '.join(map(str, suite.passkey_lengths))} tokens")
    if "recall" in suite.metrics:
        said.append(f"recall of {', '.join(map(str, suite.recall_pairs))} pairs")
    if "lists" in suite.metrics:
        said.append(f"lists of {', '.join(map(str, suite.list_lengths))} tokens, chance is 0.1")
    if "speed" in suite.metrics:
        said.append("times are wall clock, one row; the cache has no interval")
    note = "; ".join(said)
    return QualityReport(columns, ablation, name if ablation else "", (note,))


def _masked_report(
    out: Session, model: nn.Module, original: nn.Module, tokenizer: Any, rows: torch.Tensor
) -> QualityReport:
    from rewriter.evaluate import QualityReport, masked_accuracy

    columns = {}
    for name, judged in {"teacher": original, "student": model}.items():
        with out.working(f"measuring the {name}"):
            found = masked_accuracy(judged, tokenizer, rows)
        columns[name] = {found.name: found}
    note = f"15 % of the tokens of {rows.shape[0]} rows of {rows.shape[1]} tokens are hidden."
    return QualityReport(columns, notes=(note,))


def _column(path: Path, number: int) -> str:
    """Name of a checkpoint's column that no other column has."""
    taken = path.name in ("teacher", "student", "model", "")
    return f"{path.name or 'beside'} {number + 1}" if taken else path.name


def _encoder_report(
    out: Session,
    model: nn.Module,
    original: nn.Module,
    tokenizer: Any,
    text: list[Path],
    branches: bool,
) -> QualityReport:
    from rewriter.evaluate import (
        SENTENCES,
        QualityReport,
        branches_of,
        embed,
        similarity_agreement,
        without_branch,
    )

    sentences = SENTENCES
    if text:
        lines = [line.strip() for d in documents(text) for line in d.splitlines()]
        sentences = tuple(line for line in lines if line)
    with out.working("embedding sentences"):
        before = embed(original, tokenizer, sentences)

        def agreement() -> dict[str, Any]:
            found = similarity_agreement(before, embed(model, tokenizer, sentences))
            return {m.name: m for m in (found.pearson, found.spearman)}

        columns = {"student": agreement()}
        ablation = {}
        if branches and branches_of(model):
            ablation["nothing"] = columns["student"]
            for branch in branches_of(model):
                with without_branch(model, branch):
                    ablation[branch] = agreement()
    note = f"Agreement with the original on {len(sentences)} sentences; 1 means unchanged."
    return QualityReport(columns, ablation, "student" if ablation else "", (note,))
