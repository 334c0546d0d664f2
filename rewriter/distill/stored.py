"""Stage 1 from activations on disk: the teacher runs first, then each layer trains by itself.

The teacher's forwards (`activations`) go over the batches that the steps will use. Then the layers
train one after another, each over all its steps, with its parameters, gradients, moments and one
batch of its activations in memory; the teacher is not called any more. Layers never meet in
stage 1 (rows, rates and clipping are those of each), so the result is that of training them side by
side, bit for bit. Only what is drawn at random in a step (`drop_window`, `attention_queries`) is
drawn anew for each layer from the seed, and so differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rewriter.distill.activations import OneModule
from rewriter.distill.config import DistillConfig
from rewriter.distill.copies import learning_names
from rewriter.distill.data import Order, Rows
from rewriter.distill.match_layers import MatchLayers
from rewriter.distill.progress import Progress, Reporter
from rewriter.distill.resume import Snapshot
from rewriter.distill.sharding import size
from rewriter.distill.teaching import Teaching, place_of
from rewriter.distill.trainer import StageResult, Trainer
from rewriter.errors import UsageError


@dataclass(frozen=True)
class _Within:
    """Tells of one layer as a part of the stage."""

    reporter: Reporter
    number: int
    count: int
    begun: float

    def update(self, progress: Progress) -> None:
        steps, done = progress.steps or 0, self.number + progress.fraction
        spent = time.monotonic() - self.begun
        self.reporter.update(
            replace(
                progress,
                step=self.number * steps + progress.step,
                steps=self.count * steps,
                fraction=done / self.count,
                tokens_per_second=progress.tokens_per_second / self.count,
                seconds_left=spent / max(1e-9, progress.fraction) * (self.count - done),
            )
        )

    def message(self, text: str) -> None:
        self.reporter.message(text)


def train_stored(
    trainer: Trainer,
    teacher: nn.Module,
    student: nn.Module,
    config: DistillConfig,
    folder: Path | None,
    start: Snapshot | None,
) -> tuple[StageResult, dict[str, torch.Tensor]]:
    """Stage 1 from disk, to its end.

    Args:
        trainer: with the rows, their order and what is told and saved.
        teacher, student: the models as given; they are not changed.
        config: with `layers.stored`.
        folder: of the run, or None for a temporary one.
        start: a snapshot of this stage to go on from.

    Returns:
        What happened, and the trained float32 values by name.

    Raises:
        UsageError: modules that cannot train one after another, or several processes.
        OutputError: the disk has not the room.
        DivergedError: the loss is not finite.
    """
    budget = config.layers
    assert budget is not None and budget.stored is not None and budget.steps is not None
    groups = learning_names(student)
    _check(student, groups)
    paths, steps, elapsed = list(groups), budget.steps, 0.0
    number, step = 0, 0
    names = [name for group in groups.values() for name in group]
    values = {name: student.get_parameter(name).detach().float() for name in names}
    if start is not None:
        number, step = divmod(start.step, steps)
        values = {name: start.tensors[f"value.{name}"] for name in values}
        elapsed = start.elapsed
    order = Order(len(trainer.rows), budget.batch, trainer.seed)
    batches: dict[str, Rows] = {}
    for index in range(steps * budget.accumulate):
        rows = trainer.rows.take(order.batch_at(index))
        batches.setdefault(rows.digest(), rows)
    results: list[StageResult] = []
    with place_of(budget.stored, folder) as place:
        work = Teaching(place, teacher, student, config, paths, batches, trainer.reporter)
        for sweep in work.sweeps() if number < len(paths) else []:
            if paths.index(sweep[-1]) < number:
                continue
            begun = time.monotonic()
            store = work.stored(sweep)
            elapsed += time.monotonic() - begun
            for path in sweep[max(0, number - paths.index(sweep[0])) :]:
                tensors = {f"value.{n}": values[n] for n in groups[path]}
                if start is not None and step > 0:
                    mine = set(groups[path])
                    tensors = {
                        key: tensor
                        for key, tensor in start.tensors.items()
                        if key.partition(".")[2] in mine
                    }
                    tensors["rng"] = start.tensors["rng"]
                else:
                    torch.manual_seed(config.seed)
                    tensors["rng"] = torch.get_rng_state()
                keep = _keeper(trainer, values, number * steps, elapsed)
                told = _Within(trainer.reporter, number, len(paths), time.monotonic())
                one = replace(trainer, reporter=told, save=keep)
                stage = MatchLayers(teacher, student, config, OneModule(store, path))
                at = Snapshot(stage.name, step, 0.0, trainer.digest, tensors)
                result, trained = one.run(stage, budget, start=at)
                del stage
                values.update(trained)
                elapsed += result.seconds
                results.append(result)
                number, step = number + 1, 0
            if budget.stored.folder is None:
                store.remove()
    tokens = steps * budget.batch * budget.accumulate * int(trainer.rows.ids.shape[1])
    return _together(results, steps, tokens, elapsed), values


def _keeper(
    trainer: Trainer, values: Mapping[str, torch.Tensor], steps: int, elapsed: float
) -> Callable[[Snapshot], object] | None:
    """Saves a snapshot of a layer as one of the stage: with the values of all layers."""
    save = trainer.save
    if save is None:
        return None

    def keep(snapshot: Snapshot) -> object:
        everything = {f"value.{name}": value for name, value in values.items()}
        return save(
            replace(
                snapshot,
                step=steps + snapshot.step,
                elapsed=elapsed + snapshot.elapsed,
                tensors={**everything, **snapshot.tensors},
            )
        )

    return keep


def _together(
    results: Sequence[StageResult], steps: int, tokens: int, elapsed: float
) -> StageResult:
    """The layers' results as one: means over those that trained in this process."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else float("nan")

    parts = {name: loss for result in results for name, loss in result.parts.items()}
    return StageResult(
        "layers",
        steps,
        tokens,
        elapsed,
        mean([r.first for r in results]),
        mean([r.last for r in results]),
        parts,
    )


def _check(student: nn.Module, groups: Mapping[str, Sequence[str]]) -> None:
    """Raises:
    UsageError: modules that cannot train one after another, none at all, or several processes.
    """
    if not groups:
        raise UsageError(
            "No rewritten module has new parameters, so there is nothing to match layer by layer: "
            "leave out the 'layers' stage or choose a mixer that learns."
        )
    if size() > 1:
        raise UsageError(
            "Activations are stored in one process only: leave out 'stored' of the stage 'layers', "
            "or train in one process."
        )
    owner: dict[int, str] = {}
    for path, names in groups.items():
        prefix = f"{path}." if path else ""
        inner = next((p for p in groups if p != path and p.startswith(prefix)), None)
        if inner is not None:
            raise UsageError(
                f"'{inner}' learns inside '{path}', which learns too, so they cannot train one "
                "after another: leave out 'stored' of the stage 'layers'."
            )
        for name in names:
            other = owner.setdefault(id(student.get_parameter(name)), path)
            if other != path:
                raise UsageError(
                    f"'{other}' and '{path}' share new parameters, so they cannot train one after "
                    "another: leave out 'stored' of the stage 'layers'."
                )
