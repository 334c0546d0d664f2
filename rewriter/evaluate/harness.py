"""lm-evaluation-harness on tasks that lie on this machine. Needs the `eval` extra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rewriter.errors import InputError, UnsupportedError
from rewriter.evaluate.measurement import Measurement
from rewriter.evaluate.scoring import evaluation_mode

_Z = 1.959964
_LOW = ("perplexity", "bits_per_byte", "brier_score")


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Path,
    *,
    names: Sequence[str] = (),
    limit: int | None = None,
    batch: int = 1,
) -> list[Measurement]:
    """Every metric of every task of a folder, by the harness's own Python interface.

    The interval is the harness's standard error times 1.96. Tasks that the harness ships are not
    offered, since they fetch their data.

    Args:
        tasks: folder of task files (YAML) whose data sets are local files.
        names: tasks to run; all of the folder by default.
        limit: samples of each task at most.
        batch: requests of one forward.

    Raises:
        UnsupportedError: lm-eval is not installed.
        InputError: the folder has no task, a name is unknown, or a task cannot be run.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnsupportedError(
            "the harness is not installed: pip install 'attention-rewriter[eval]'"
        ) from error
    if not tasks.is_dir() or not any(tasks.rglob("*.yaml")):
        raise InputError(f"{tasks} is no folder with task files (.yaml)")
    try:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        known = sorted(manager.all_tasks)
        missing = [name for name in names if name not in known]
        if missing:
            raise InputError(f"{tasks} has no task '{missing[0]}'; it has {', '.join(known)}")
        with evaluation_mode(model):
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                tasks=list(names) or known,
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
            )
    except InputError:
        raise
    except Exception as error:  # task files fail in many ways
        text = " ".join(str(error).split())
        raise InputError(f"the tasks of {tasks} cannot be run: {text}") from error
    return _measurements(found)


def _measurements(found: Any) -> list[Measurement]:
    out = []
    for task, row in found["results"].items():
        count = int(found["n-samples"][task]["effective"])
        for key, value in row.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{how}")
            known = isinstance(error, int | float) and math.isfinite(error)
            half = _Z * float(error) if known else 0.0
            out.append(
                Measurement(
                    name=f"{task}: {metric}" + ("" if how == "none" else f" ({how})"),
                    value=float(value),
                    low=float(value) - half,
                    high=float(value) + half,
                    samples=count,
                    tokens=count,
                    interval="normal" if known else "none",
                    better="low" if metric.endswith(_LOW) else "high",
                )
            )
    return out
