"""Settings of a distillation: a strict document in JSON or YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rewriter.budgets import size_in_bytes
from rewriter.distill.precision import Precision
from rewriter.errors import InputError, UsageError

Schedule = Literal["cosine", "linear", "constant"]
Trained = Literal["core", "lora", "all"]
AttentionLoss = Literal["cross_entropy", "frobenius"]
RelationPair = Literal["qq", "kk", "vv", "qk"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(_Strict):
    """What every stage needs to know.

    Attributes:
        steps: optimiser steps, or None to go by time alone.
        max_seconds: stop when this much training time is spent, whichever limit comes first. Only
            a run that is limited by steps alone resumes to bit-identical weights.
        batch: rows of one forward.
        accumulate: forwards of one optimiser step.
        lr: learning rate of the new (`core.*`) parameters. A mixer may ask for a part of it for
            some of them (`rates` of the module that holds them).
        schedule: shape of the learning rate after the warm-up.
        warmup: fraction of the budget over which the learning rate rises from 0.
        final: fraction of the learning rate that is left at the end.
        clip: largest gradient norm (per layer where layers train apart), or None.
        drop_window: probability that a mixer with branches computes a forward without its branch
            'window', drawn for each of them, so that the other branch has something to learn.
    """

    steps: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    batch: int = Field(default=1, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-2, gt=0)
    schedule: Schedule = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final: float = Field(default=0.05, ge=0, le=1)
    clip: float | None = Field(default=1.0, gt=0)
    drop_window: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _limited(self) -> Budget:
        if self.steps is None and self.max_seconds is None:
            raise ValueError("give 'steps' or 'max_seconds'")
        return self


class Stored(_Strict):
    """Stage 1 from activations on disk, one layer after another.

    Attributes:
        disk: most that they may take at a time, such as '20 GB'; None for what is free. Where that
            is less than all layers need, the teacher runs once for every few layers.
        folder: where they go and stay, so that another run with the same teacher and text finds
            them; None for a folder that is deleted with the end of the stage.
    """

    disk: str | None = None
    folder: str | None = None

    @field_validator("disk")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                size_in_bytes(value)
            except UsageError as error:
                raise ValueError(str(error)) from error
        return value


class LayerStage(Budget):
    """Stage 1: every rewritten module imitates its original on the teacher's own stream.

    A short run wants a high rate: in layer 3 of SmolLM2-135M, 48 steps of one row of 1,024 tokens
    brought the held-out loss from 0.74 to 0.37 at 1e-2 and to 0.26 at 3e-2.

    Attributes:
        output: weight of the error of the outputs (`losses.output_error`).
        attention: a loss on the attention weights beside it, or None. For mixers that state
            theirs (hedgehog, hedgehog_window), in one process.
        attention_weight: its weight.
        attention_rows: queries of a layer whose weights are held in float32 at once.
        attention_queries: queries of a row, drawn anew at every step, that the loss on the weights
            is taken of; None for all. The maps of all pairs cost more than the layer itself.
        stored: keep the teacher's activations on disk and train one layer at a time from there,
            with the same result; true for the defaults. In one process, limited by steps alone.
    """

    lr: float = Field(default=3e-2, gt=0)
    output: float = Field(default=1.0, ge=0)
    attention: AttentionLoss | None = None
    attention_weight: float = Field(default=1.0, gt=0)
    attention_rows: int = Field(default=128, ge=1)
    attention_queries: int | None = Field(default=None, ge=1)
    stored: Stored | None = None

    @field_validator("stored", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _sized(self) -> LayerStage:
        if self.stored is not None and (self.steps is None or self.max_seconds is not None):
            raise ValueError("'stored' needs 'steps' and no 'max_seconds', to know its size")
        return self

    @model_validator(mode="after")
    def _some_loss(self) -> LayerStage:
        if self.output == 0 and self.attention is None:
            raise ValueError("give 'output' a weight or choose a loss for 'attention'")
        return self


class Relations(_Strict):
    """Relations between tokens at one rewritten module (MiniLM, `rewriter.distill.relations`).

    Attributes:
        of: pairs of queries (q), keys (k) and values (v). MiniLM has 'qk', the attention weights,
            and 'vv'; MiniLMv2 'qq', 'kk' and 'vv'.
        heads: relation heads, None for as many as the teacher has of a pair's first side: query
            heads, or for 'kk' and 'vv' key heads.
        layer: which rewritten module, counted in order; -1 is the last.
        weight: of the loss.
        rows: tokens whose relations are held in float32 at once.
    """

    of: tuple[RelationPair, ...] = Field(default=("qq", "kk", "vv"), min_length=1)
    heads: int | None = Field(default=None, ge=1)
    layer: int = -1
    weight: float = Field(default=1.0, gt=0)
    rows: int = Field(default=128, ge=1)


class LogitStage(Budget):
    """Stage 2: the whole student imitates the teacher.

    By its distribution over the next token, unless told otherwise; a model without logits, such as
    an encoder, by hidden states and relations alone (`divergence` 0).

    Attributes:
        divergence: weight of the loss on logits.
        hidden: weight of the error of the rewritten modules' outputs (`losses.output_error`, mean
            over the modules), each model in its own stream. In one process.
        relations: a loss on relations between tokens, or None. In one process.
        train: 'core' trains the new parameters alone, 'lora' adds low-rank updates of the sites'
            projections (merged at the end), 'all' trains every parameter.
        body_lr: learning rate of what is not `core.*`.
        rank, alpha: of the low-rank updates.
        ce: share of the cross-entropy on the text in the loss on logits; the Kullback-Leibler
            term has 1 - ce.
        chunk: tokens whose logits are held at once.
    """

    divergence: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    relations: Relations | None = None

    lr: float = Field(default=1e-3, gt=0)
    train: Trained = "lora"
    body_lr: float = Field(default=1e-4, gt=0)
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    ce: float = Field(default=0.0, ge=0, le=1)
    chunk: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _some_loss(self) -> LogitStage:
        if self.divergence == 0 and self.hidden == 0 and self.relations is None:
            raise ValueError("give 'divergence' or 'hidden' a weight, or 'relations'")
        return self


class LongStage(LogitStage):
    """Stage 3: the whole student on longer rows, by cross-entropy unless told otherwise.

    Attributes:
        length: tokens a row, a multiple of the run's: neighbouring rows are joined.
    """

    length: int = Field(ge=4)
    ce: float = Field(default=1.0, ge=0, le=1)


class DistillConfig(_Strict):
    """A whole distillation.

    Attributes:
        length: tokens a row.
        held_out: fraction of the text, from the end, that is never trained on.
        seed: of the row order and of new low-rank updates.
        fit: tokens of the text from which new cores set what they can before stage 1 (the gain of
            a norm, a least-squares map); 0 leaves them as they are.
        dtype: of the forward and backward passes; trained weights are float32 either way. 'auto'
            is bfloat16 where the hardware multiplies it, else float32.
        layers: stage 1, or None to skip it.
        logits: stage 2, or None to skip it.
        long: stage 3, or None to skip it.
        checkpoint_every: optimiser steps between checkpoints; 0 keeps only the end of each stage.
    """

    length: int = Field(default=1024, ge=2)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    fit: int = Field(default=4096, ge=0)
    dtype: Precision = "auto"
    layers: LayerStage | None = None
    logits: LogitStage | None = None
    long: LongStage | None = None
    checkpoint_every: int = Field(default=50, ge=0)

    @model_validator(mode="after")
    def _some_stage(self) -> DistillConfig:
        if self.layers is None and self.logits is None and self.long is None:
            raise ValueError("give at least one of 'layers', 'logits' and 'long'")
        if self.long is not None and (
            self.long.length % self.length or self.long.length <= self.length
        ):
            raise ValueError("'length' of 'long' must be a multiple of the run's, and larger")
        return self


def parse_config(data: Any, name: str = "the distillation config") -> DistillConfig:
    """Validate a plain document.

    Raises:
        UsageError: an unknown field or a value out of range; the message names each field.
    """
    try:
        return DistillConfig.model_validate(data)
    except ValidationError as error:
        parts = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "document"
            parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
        raise UsageError(f"{name} is not valid ({'; '.join(parts)}).") from error


def load_config(path: str | Path) -> DistillConfig:
    """Read a config from a JSON or YAML file (JSON is YAML too).

    Raises:
        InputError: the file is missing or not YAML.
        UsageError: its content is not a valid config.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The config '{path}' cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The config '{path}' is neither JSON nor YAML ({error}).") from error
    return parse_config(data, f"'{path}'")
