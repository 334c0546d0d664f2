"""Opening checkpoints for commands, and what commands need to know about the model inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

    from rewriter.checkpoint.read import Source
    from rewriter.plan import Plan

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A Hugging Face directory, a .safetensors file with its config, a .gguf file, or a "
        "rewritten checkpoint.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: auto (as stored), float32, bfloat16 or float16.")
]


def open_source(path: Path, dtype: str = "auto") -> Source:
    """Check a checkpoint's files; model, tokenizer and config load on first use."""
    from rewriter.checkpoint.read import open_checkpoint

    return open_checkpoint(path, dtype=dtype)


def open_original(path: Path, dtype: str = "auto") -> Source:
    """A checkpoint that was not rewritten.

    Raises:
        UsageError: it was.
    """
    source = open_source(path, dtype)
    if source.kind == "rewritten":
        raise UsageError(
            f"{path} is rewritten already; start from the original checkpoint, or look at its plan "
            f"with 'rewriter inspect {path}'"
        )
    return source


def open_rewritten(path: Path, dtype: str = "auto") -> Source:
    """A checkpoint that `convert` or `distill` wrote.

    Raises:
        UsageError: it was not rewritten.
    """
    source = open_source(path, dtype)
    if source.kind != "rewritten":
        raise UsageError(
            f"{path} is not a rewritten checkpoint, so there is nothing new in it to train; make "
            "one with 'rewriter convert'"
        )
    return source


def stored_plan(path: Path) -> Plan:
    """The plan that a rewritten checkpoint carries."""
    from rewriter.checkpoint.manifest import Manifest

    return Manifest.read(path, None).plan


def is_language_model(model: Any) -> bool:
    """Does it predict next tokens, so that it has perplexities and can generate?"""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def positions_of(config: Any) -> int | None:
    """Longest input the model was made for, in tokens, or None if it does not say."""
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def documents(paths: Sequence[Path]) -> list[str]:
    """The documents of all text sources, in order.

    Raises:
        UsageError: none was given.
        InputError: one cannot be read.
    """
    from rewriter.distill.data import read_texts

    if not paths:
        raise UsageError("give at least one text with --text FILE")
    return [text for path in paths for text in read_texts(path)]


def token_stream(tokenizer: Any, paths: Sequence[Path]) -> torch.Tensor:
    """(tokens,) int64: the tokens of all texts, one after the other."""
    import torch

    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in documents(paths)]
    return torch.tensor([i for part in ids for i in part], dtype=torch.int64)


def same_tokens(teacher: Any, student: Any, sample: str) -> None:
    """Make sure that both read text alike.

    Raises:
        InputError: their tokenizers differ, so their predictions cannot be compared.
    """
    if teacher.encode(sample[:2000]) != student.encode(sample[:2000]):
        raise InputError(
            "the tokenizers of the two checkpoints cut the text differently, so their predictions "
            "cannot be compared; is this the right teacher?"
        )
