"""The loop: optimiser on float32 masters, schedule, budget, progress, checkpoints, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewriter.distill import sharding
from rewriter.distill.config import Budget
from rewriter.distill.data import Order, Rows
from rewriter.distill.progress import Progress, Reporter
from rewriter.distill.resume import Snapshot
from rewriter.distill.stages import Losses, Ready, Stage
from rewriter.errors import RewriterError

BETAS = (0.9, 0.95)
SLOTS = ("exp_avg", "exp_avg_sq", "step")


class DivergedError(RewriterError):
    """The loss is not finite any more."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
        name: 'layers' or 'logits'.
        steps: optimiser steps, over all resumed parts.
        tokens: tokens trained on.
        seconds: training time, over all resumed parts.
        first, last: mean loss over the first and the last tenth of the steps of this process.
        parts: mean loss of each rewritten module over the last tenth (stage 1).
    """

    name: str
    steps: int
    tokens: int
    seconds: float
    first: float
    last: float
    parts: Mapping[str, float] = field(default_factory=dict)


def learning_rate(budget: Budget, base: float, fraction: float) -> float:
    """Learning rate at a fraction (0 to 1) of the budget: warm-up, then the schedule."""
    if budget.warmup > 0 and fraction < budget.warmup:
        return base * fraction / budget.warmup
    if budget.schedule == "constant":
        return base
    rest = min(1.0, (fraction - budget.warmup) / (1.0 - budget.warmup))
    shape = 1.0 - rest if budget.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * rest))
    return base * (budget.final + (1.0 - budget.final) * shape)


class Masters:
    """Float32 values of what trains, beside the parameters that the forward pass reads."""

    def __init__(self, stage: Stage, core_lr: float, body_lr: float):
        self.live: dict[str, nn.Parameter] = {**stage.core, **stage.body}
        self.values: dict[str, torch.Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True)
            for name, p in self.live.items()
        }
        rates = {n: core_lr * stage.rates[n] for n in stage.core} | dict.fromkeys(
            stage.body, body_lr
        )
        self.base_lr = sorted(set(rates.values()), reverse=True)
        self.groups = stage.groups
        # One optimiser a group: a group takes its step while others still collect gradients.
        self.optimisers = [self._optimiser({n: rates[n] for n in names}) for names in self.groups]
        self._make_moments()

    def _optimiser(self, rates: Mapping[str, float]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [
                {"params": [self.values[n] for n in rates if rates[n] == lr], "lr": lr, "base": lr}
                for lr in sorted(set(rates.values()), reverse=True)
            ],
            betas=BETAS,
            weight_decay=0.0,
        )

    def _make_moments(self) -> None:
        """Optimiser state as the first step would make it, but before activations come and go:
        among them it would break up the heap, which then cannot shrink."""
        for names, optimiser in zip(self.groups, self.optimisers, strict=True):
            for name in names:
                value = self.values[name]
                moments = {slot: torch.zeros_like(value.detach()) for slot in SLOTS[:2]}
                optimiser.state[value] = {"step": torch.tensor(0.0), **moments}

    def step(self, number: int, rates: Mapping[float, float], clip: float | None) -> None:
        """One optimiser step of a group with its accumulated gradients, which it clears.

        Args:
            number: of the group.
            rates: learning rates of the step by what they are at the start (`base_lr`).
            clip: largest norm of the group's gradients, or None.
        """
        names, optimiser = self.groups[number], self.optimisers[number]
        for name in names:
            master, parameter = self.values[name], self.live[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([self.values[n] for n in names], clip)
        for group in optimiser.param_groups:
            group["lr"] = rates[group["base"]]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self._publish(names)

    def _publish(self, names: Iterable[str]) -> None:
        with torch.no_grad():
            for name in names:
                if self.values[name] is not self.live[name]:
                    self.live[name].copy_(self.values[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Values and optimiser state by flat names."""
        out = {f"value.{n}": sharding.whole(v.detach()) for n, v in self.values.items()}
        for names, optimiser in zip(self.groups, self.optimisers, strict=True):
            for name in names:
                for slot, tensor in optimiser.state[self.values[name]].items():
                    out[f"{slot}.{name}"] = sharding.whole(tensor)
        return out

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(sharding.as_sharded(tensors[f"value.{name}"], value))
        of = {n: o for names, o in zip(self.groups, self.optimisers, strict=True) for n in names}
        for name, value in self.values.items():
            slots = {s: tensors[f"{s}.{name}"].clone() for s in SLOTS if f"{s}.{name}" in tensors}
            # Dealing out is collective: every process has to take the slots in the same order,
            # which that of a set of strings is not.
            for slot in (s for s in slots if s != "step"):
                slots[slot] = sharding.as_sharded(slots[slot], value)
            if slots:
                of[name].state[value] = slots
        self._publish(self.values)


class _Means:
    """Mean losses over the first and last tenth of the steps."""

    def __init__(self) -> None:
        self.rows: list[Losses] = []

    def add(self, losses: Losses) -> None:
        self.rows.append(losses)

    def result(self, stage: Stage, steps: int, tokens: int, seconds: float) -> StageResult:
        count = max(1, len(self.rows) // 10)
        head, tail = self.rows[:count], self.rows[-count:]

        def mean(rows: list[Losses]) -> float:
            return sum(r.total for r in rows) / len(rows) if rows else math.nan

        names = tail[-1].parts if tail else {}
        parts = {n: sum(r.parts[n] for r in tail) / len(tail) for n in names}
        return StageResult(stage.name, steps, tokens, seconds, mean(head), mean(tail), parts)


@dataclass
class Trainer:
    """Runs one stage.

    Attributes:
        rows: what to train on.
        seed: of the row order.
        reporter: told after every step.
        save: called with a snapshot every `every` steps and at the end, or None.
        every: steps between snapshots; 0 for the end alone.
        digest: identity of the run, for snapshots.
    """

    rows: Rows
    seed: int
    reporter: Reporter
    digest: str = ""
    save: Callable[[Snapshot], object] | None = None
    every: int = 0

    def run(
        self, stage: Stage, budget: Budget, body_lr: float = 0.0, start: Snapshot | None = None
    ) -> tuple[StageResult, dict[str, torch.Tensor]]:
        """Train a stage to the end of its budget.

        Args:
            start: a snapshot of the same stage to go on from.

        Returns:
            What happened, and the trained float32 values by name.

        Raises:
            DivergedError: the loss became NaN or infinite.
        """
        masters = Masters(stage, budget.lr, body_lr)
        step, spent = 0, 0.0
        if start is not None:
            masters.load(start.tensors)
            torch.set_rng_state(start.tensors["rng"])
            step, spent = start.step, start.elapsed
        order = Order(len(self.rows), budget.batch, self.seed)
        means = _Means()
        begun, first = time.monotonic(), step
        tokens_a_step = budget.batch * budget.accumulate * int(self.rows.ids.shape[1])
        elapsed = spent
        while (fraction := _fraction(budget, step, elapsed)) < 1.0:
            # The rate of a step is taken in its middle, so that neither end of it is wasted.
            point = fraction if budget.steps is None else max(fraction, (step + 0.5) / budget.steps)
            rates = {lr: learning_rate(budget, lr, min(1.0, point)) for lr in masters.base_lr}
            waiting = set(range(len(stage.groups)))

            def ready(number: int, rates: Any = rates, waiting: Any = waiting) -> None:
                waiting.remove(number)
                masters.step(number, rates, budget.clip)

            losses = self._accumulate(stage, order, budget, step, masters, ready)
            for number in sorted(waiting):
                ready(number)
            means.add(losses)
            step += 1
            (elapsed,) = self._agreed([spent + time.monotonic() - begun], masters)
            done = _fraction(budget, step, elapsed)
            self.reporter.update(
                Progress(
                    stage=stage.name,
                    step=step,
                    steps=budget.steps,
                    fraction=min(1.0, done),
                    loss=losses.total,
                    parts=losses.parts,
                    lr=learning_rate(budget, budget.lr, min(1.0, point)),
                    tokens_per_second=(step - first) * tokens_a_step / max(1e-9, elapsed - spent),
                    seconds_left=max(0.0, elapsed * (1.0 - done) / max(done, 1e-9)),
                )
            )
            if self.save is not None and (
                done >= 1.0 or (self.every > 0 and step % self.every == 0)
            ):
                tensors = {**masters.state(), "rng": torch.get_rng_state()}
                if sharding.is_first():
                    self.save(Snapshot(stage.name, step, elapsed, self.digest, tensors))
        values = {n: sharding.whole(v.detach()).clone() for n, v in masters.values.items()}
        return means.result(stage, step, step * tokens_a_step, elapsed), values

    @staticmethod
    def _agreed(numbers: list[float], masters: Masters) -> list[float]:
        """Means over the processes that train together, so that all of them go the same way."""
        return sharding.mean(numbers, next(iter(masters.values.values())).device)

    def _accumulate(
        self,
        stage: Stage,
        order: Order,
        budget: Budget,
        step: int,
        masters: Masters,
        ready: Ready,
    ) -> Losses:
        total, parts = 0.0, dict[str, float]()
        for micro in range(budget.accumulate):
            index = order.batch_at(step * budget.accumulate + micro)
            rows, weight = sharding.part(self.rows.take(index))
            last = micro == budget.accumulate - 1
            losses = stage.backward(rows, weight / budget.accumulate, ready if last else None)
            total += losses.total * weight / budget.accumulate
            for name, value in losses.parts.items():
                parts[name] = parts.get(name, 0.0) + value * weight / budget.accumulate
        total, *agreed = self._agreed([total, *parts.values()], masters)
        parts = dict(zip(parts, agreed, strict=True))
        if not math.isfinite(total):
            bad = next((n for n, v in parts.items() if not math.isfinite(v)), "the logits")
            raise DivergedError(
                f"Stage '{stage.name}' diverged at step {step + 1} (the loss of {bad} is not "
                "finite): lower the learning rate or train in float32."
            )
        return Losses(total, parts)


def _fraction(budget: Budget, step: int, elapsed: float) -> float:
    by_steps = step / budget.steps if budget.steps is not None else 0.0
    by_time = elapsed / budget.max_seconds if budget.max_seconds is not None else 0.0
    return max(by_steps, by_time)
