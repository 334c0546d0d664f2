"""Text in, token rows out: reading, packing, the held-out tail and the seeded order.

Documents are joined by the end-of-sequence token and cut into rows of equal length, so no row
holds padding. The tail of the token stream is held out before rows are cut: text that is used for
evaluation is never trained on. Which rows a step sees is a function of (seed, step) alone, which
is what makes an interrupted run resumable without storing a reader's position.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rewriter.errors import InputError, UsageError

FORM_FEED = "\f"
Source = str | Path | Sequence[str]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that packing needs."""

    @property
    def eos_token_id(self) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


@dataclass(frozen=True)
class Rows:
    """Token rows of one length.

    Attributes:
        ids: (rows, length) int64.
        mask: (rows, length) int64, 1 at tokens and 0 at padding; None means no padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def take(self, index: torch.Tensor) -> Rows:
        """The rows at `index`, an int64 vector."""
        return Rows(self.ids[index], None if self.mask is None else self.mask[index])

    def joined(self, count: int) -> Rows:
        """Rows `count` times as long: neighbours in their order, a remainder left out.

        Raises:
            UsageError: the rows are padded, or there are too few.
        """
        if self.mask is not None:
            raise UsageError(
                "Rows with padding cannot be joined to longer ones: leave out the stage 'long'."
            )
        rows, length = self.ids.shape
        if rows < count:
            raise UsageError(
                f"The stage 'long' needs {count} rows of {length} tokens for one of its own, and "
                f"there are {rows}: give more text, or a smaller 'length' of 'long'."
            )
        kept = self.ids[: rows // count * count]
        return Rows(kept.reshape(-1, count * length))

    def digest(self) -> str:
        """Hash of the content: two runs with equal digests train on the same rows."""
        hasher = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        for tensor in (self.ids, self.mask):
            if tensor is not None:
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Rows to train on and rows that are never trained on."""

    train: Rows
    held_out: Rows


@dataclass(frozen=True)
class Order:
    """Which rows a step sees: every epoch is a permutation drawn from (seed, epoch)."""

    rows: int
    batch: int
    seed: int

    def batch_at(self, index: int) -> torch.Tensor:
        """Row numbers of the batch with this index, counted from the start of training."""
        first = index * self.batch
        picked: list[int] = []
        while len(picked) < self.batch:
            epoch, offset = divmod(first + len(picked), self.rows)
            picked += self._permutation(epoch)[offset : offset + self.batch - len(picked)].tolist()
        return torch.tensor(picked, dtype=torch.int64)

    def _permutation(self, epoch: int) -> torch.Tensor:
        text = f"{self.seed}/{epoch}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))


def read_texts(source: Source) -> list[str]:
    """Documents of a source, in file order, empty ones left out.

    Args:
        source: a text file (documents separated by form feeds), a `.jsonl` file with a 'text'
            field on each line, a directory written by `datasets.save_to_disk` with a 'text'
            column, or a list of texts.

    Raises:
        InputError: nothing there, not readable as text, a line without 'text', or no text at all.
    """
    if not isinstance(source, str | Path):
        texts, name = list(source), "the list of texts"
    else:
        path, name = Path(source), f"'{source}'"
        if path.is_dir():
            texts = _read_dataset(path)
        elif path.is_file():
            texts = _read_jsonl(path) if path.suffix == ".jsonl" else _decode(path).split(FORM_FEED)
        else:
            raise InputError(f"There is no text at {name}: give a text file, JSONL or data set.")
    texts = [text.strip() for text in texts]
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(f"{name} holds no text: give a source with at least one document.")
    return texts


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is not UTF-8 text (byte {error.start}): convert it to UTF-8 first."
        ) from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}).") from error


def _read_jsonl(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(_decode(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"'{path}' line {number} is not JSON ({error.msg}).") from error
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise InputError(f"'{path}' line {number} has no 'text' field that holds a string.")
        texts.append(item["text"])
    return texts


def _read_dataset(path: Path) -> list[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(
            f"'{path}' is a directory, and reading a data set needs the package 'datasets': "
            "install attention-rewriter[data] or give a text file."
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the package raises many kinds; the person needs one sentence
        raise InputError(f"'{path}' is not a saved data set ({error}).") from error
    if isinstance(loaded, dict):  # a DatasetDict
        if "train" not in loaded:
            raise InputError(f"The data set '{path}' has no 'train' split.")
        loaded = loaded["train"]
    if "text" not in loaded.column_names:
        raise InputError(f"The data set '{path}' has no 'text' column.")
    return [str(text) for text in loaded["text"]]


def token_stream(texts: Sequence[str], tokenizer: Tokenizer) -> torch.Tensor:
    """All documents as one int64 vector, each followed by the end-of-sequence token if any."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
    return torch.tensor(ids, dtype=torch.int64)


def pack(stream: torch.Tensor, length: int) -> Rows:
    """Cut a token vector into (rows, length); the incomplete last row is dropped."""
    rows = stream.numel() // length
    return Rows(stream[: rows * length].reshape(rows, length).clone())


def packed_corpus(
    source: Source, tokenizer: Tokenizer, length: int = 1024, held_out: float = 0.1
) -> Corpus:
    """Rows for a language model.

    Args:
        source: see `read_texts`.
        tokenizer: the model's own.
        length: tokens a row.
        held_out: fraction of the tokens, from the end, that is kept for evaluation.

    Raises:
        InputError: the text is missing, empty, or too short for one row on either side.
    """
    stream = token_stream(read_texts(source), tokenizer)
    # At least one row stays for evaluation, and the cut lies on a row border.
    total = stream.numel() // length
    kept = max(1, round(total * held_out)) if held_out > 0 else 0
    if total - kept < 1:
        raise InputError(
            f"The text has {stream.numel()} tokens, too few for rows of {length} tokens with "
            f"{kept} held out: give at least {(kept + 1) * length} tokens or a smaller length."
        )
    cut = (total - kept) * length
    return Corpus(pack(stream[:cut], length), pack(stream[cut:], length))


def padded_corpus(
    texts: Sequence[str], tokenizer: Any, length: int = 128, held_out: float = 0.1
) -> Corpus:
    """Rows for an encoder: one text a row, cut to `length` tokens and padded on the right.

    The tokenizer's own special tokens are added. The last texts are held out.

    Raises:
        InputError: no text, or too few for one row on either side.
    """
    texts = read_texts(texts)
    kept = max(1, round(len(texts) * held_out)) if held_out > 0 else 0
    if len(texts) - kept < 1:
        raise InputError(f"{len(texts)} texts are too few to train and hold some out: give more.")
    coded = tokenizer(
        list(texts),
        truncation=True,
        padding="max_length",
        max_length=length,
        return_tensors="pt",
    )
    rows = Rows(coded["input_ids"].long(), coded["attention_mask"].long())
    cut = len(texts) - kept
    return Corpus(rows.take(torch.arange(cut)), rows.take(torch.arange(cut, len(texts))))
