"""The whole distillation: its stages, checkpoints between, results into the student."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from rewriter.distill.config import DistillConfig, LayerStage, LogitStage, LongStage
from rewriter.distill.copies import (
    core_names,
    hash_values,
    replacer,
    rewritten_cores,
    write_body,
    write_core,
)
from rewriter.distill.data import Rows
from rewriter.distill.fitting import fit_cores
from rewriter.distill.match_layers import MatchLayers
from rewriter.distill.match_logits import MatchLogits
from rewriter.distill.precision import compute_dtype
from rewriter.distill.progress import Reporter, Silent, duration
from rewriter.distill.resume import Snapshot, latest, save
from rewriter.distill.stages import Stage
from rewriter.distill.stored import train_stored
from rewriter.distill.trainer import StageResult, Trainer
from rewriter.errors import UsageError

STAGE_ORDER: tuple[Literal["layers", "logits", "long"], ...] = ("layers", "logits", "long")
_BODY = "body."  # parameters in a snapshot of stage 3 that stage 2 replaced
_SEEDS = 2  # the order of rows of older runs, which had two stages, stays what it was


@dataclass(frozen=True)
class DistillResult:
    """What each stage did, in order. A stage that a resumed run had behind it is left out."""

    stages: tuple[StageResult, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    rows: Rows,
    config: DistillConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = True,
    reporter: Reporter | None = None,
) -> DistillResult:
    """Train the new parts of a student to imitate its teacher.

    New cores first set what they can from the first rows (`config.fit`), unless stage 1 is left
    out. The teacher is never changed. The student is changed only at the end of each stage: its
    `core.*` parameters in place, any other trained parameter by a new one, so that what it shares
    with the teacher stays as it was. Both stay on the CPU or device they are on.

    Args:
        teacher: the original model.
        student: the rewritten model, of the same class and with the same module paths.
        rows: what to train on (see `data.packed_corpus`).
        config: stages and budgets.
        folder: where checkpoints go; None keeps none.
        resume: go on from the newest checkpoint in `folder`. With budgets in steps alone the
            result is bit-identical to that of a run that was never interrupted (same machine,
            same number of threads).
        reporter: told about progress.

    Raises:
        UsageError: nothing to train, or a checkpoint of another run.
        OutputError: a checkpoint cannot be written.
        DivergedError: the loss is not finite.
    """
    report = reporter or Silent()
    digest = run_digest(teacher, student, rows, config)
    where = None if folder is None else Path(folder)
    found = latest(where, digest) if where is not None and resume else None
    if found is not None:
        report.message(f"resuming stage '{found.stage}' after step {found.step}")

    def keep(snapshot: Snapshot) -> object:
        return None if where is None else save(where, snapshot)

    joined = None if config.long is None else _long(rows, config.long)
    if found is None and config.layers is not None and config.fit > 0:
        _fit(student, rows, config, report)
    results: list[StageResult] = []
    with torch.random.fork_rng(devices=[]):
        for number, name in enumerate(STAGE_ORDER):
            budget: LayerStage | LogitStage | None = getattr(config, name)
            if budget is None:
                continue
            if found is not None and STAGE_ORDER.index(found.stage) > number:
                continue  # its result is part of the later stage's snapshot
            torch.manual_seed(config.seed)
            trainer = Trainer(
                rows=joined if name == "long" and joined is not None else rows,
                seed=config.seed * _SEEDS + number,
                reporter=report,
                digest=digest,
                save=None if where is None else keep,
                every=config.checkpoint_every,
            )
            start = found if found is not None and found.stage == name else None
            if name == "long":
                _keep_body(trainer, teacher, student, start)
            body_lr = budget.body_lr if isinstance(budget, LogitStage) else 0.0
            if name == "layers" and config.layers is not None and config.layers.stored is not None:
                result, values = train_stored(trainer, teacher, student, config, where, start)
                write_core(student, values)
            else:
                stage: Stage
                if name == "layers":
                    stage = MatchLayers(teacher, student, config)
                else:
                    stage = MatchLogits(teacher, student, config, name)
                result, values = trainer.run(stage, budget, body_lr, start)
                stage.write(values, student)
                del stage
            results.append(result)
            # A stage that was done before this process began has no losses here.
            losses = "" if math.isnan(result.last) else f"{result.first:.4f} -> {result.last:.4f}"
            report.message(
                f"stage '{name}': {result.steps} steps, {result.tokens} tokens in "
                f"{duration(result.seconds)}, {f'loss {losses}' if losses else 'done before'}"
            )
            del values
    return DistillResult(tuple(results))


def _long(rows: Rows, stage: LongStage) -> Rows:
    width = int(rows.ids.shape[1])
    if stage.length % width or stage.length <= width:
        raise UsageError(
            f"The rows have {width} tokens, and those of the stage 'long' are made of them: give "
            "its 'length' a multiple of that."
        )
    return rows.joined(stage.length // width)


def _keep_body(
    trainer: Trainer, teacher: nn.Module, student: nn.Module, start: Snapshot | None
) -> None:
    """Checkpoints of the last stage bring what the one before it made of the body.

    What a stage trains need not hold it: new parameters alone, say, or low-rank updates of it.
    """
    if start is not None:
        update = {
            name.removeprefix(_BODY): replacer(value)
            for name, value in start.tensors.items()
            if name.startswith(_BODY)
        }
        write_body(student, teacher, update)
    save = trainer.save
    if save is None:
        return
    theirs, new = dict(teacher.named_parameters()), set(core_names(student))
    body = {
        _BODY + name: value.detach().clone()
        for name, value in student.named_parameters()
        if name not in new and not (name in theirs and torch.equal(theirs[name], value))
    }
    trainer.save = lambda s: save(replace(s, tensors={**s.tensors, **body}))


def _fit(student: nn.Module, rows: Rows, config: DistillConfig, report: Reporter) -> None:
    """The start from data, on the first rows."""
    count = max(1, config.fit // rows.ids.shape[1])
    fitted = fit_cores(student, rows.take(torch.arange(min(count, len(rows)))))
    if fitted:
        before, after = (
            sum(values) / len(fitted)
            for values in ([f.before for f in fitted], [f.after for f in fitted])
        )
        report.message(
            f"{len(fitted)} cores fitted to the original's outputs: "
            f"mean distance {before:.3f} -> {after:.3f}"
        )


def run_digest(teacher: nn.Module, student: nn.Module, rows: Rows, config: DistillConfig) -> str:
    """Identity of a run: equal digests mean that a checkpoint of one continues the other."""
    settings = config.model_dump_json(exclude={"checkpoint_every": True, "layers": {"stored"}})
    if config.layers is not None and config.layers.stored is not None:
        settings += " stored"  # how its checkpoints go on; where it stores does not matter
    dtype = compute_dtype(config.dtype, teacher)  # what "auto" means on this machine
    hasher = hashlib.sha256(f"{settings} {dtype} {rows.digest()}".encode())
    hash_values(hasher, teacher)
    # Values of the new parameters do not count: a checkpoint brings its own.
    for path, core in rewritten_cores(student).items():
        hasher.update(f"{path} {core.info.name} {core.options!r}".encode())
    for name in core_names(student):
        hasher.update(f"{name} {tuple(student.get_parameter(name).shape)}".encode())
    return hasher.hexdigest()[:24]
