"""One kernel launch as a value, so that the same plan can be run, or compiled ahead of time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: programs along up to three axes.
        args: tensors, integers and floats by parameter name.
        constants: compile-time parameters by name.
        warps, stages: compile options.
        repeatable: running it twice gives the same result, so that it may be timed on its own data.
    """

    kernel: Any
    grid: Grid
    args: Mapping[str, Tensor | int | float]
    constants: Mapping[str, int | float] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    repeatable: bool = True

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


Runner = Callable[[Launch], None]


def execute(launch: Launch) -> None:
    """Run it, on a GPU or under Triton's interpreter.

    On a GPU the first call for a set of compile-time sizes times several compile options and keeps
    the fastest; elsewhere, and for kernels that add to their outputs, the fixed ones are used.
    """
    if 0 in launch.grid:
        return
    if launch.repeatable and not interpreted() and torch.cuda.is_available():
        tuned = _tuned(launch.kernel, candidates(launch), tuple(launch.constants))
        tuned[launch.grid](**launch.args, **launch.constants, enable_fp_fusion=True)
        return
    launch.kernel[launch.grid](
        **launch.args,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )


def candidates(launch: Launch) -> tuple[tuple[int, int], ...]:
    """(warps, stages) that are tried on a GPU, the fixed choice first."""
    fixed = (launch.warps, launch.stages)
    warps = {launch.warps, max(1, launch.warps // 2), min(8, launch.warps * 2)}
    others = sorted((w, s) for w in warps for s in (1, 2, 3))
    return (fixed, *(c for c in others if c != fixed))


@lru_cache(maxsize=512)
def _tuned(kernel: Any, options: tuple[tuple[int, int], ...], key: tuple[str, ...]) -> Any:
    import triton

    configs = [triton.Config({}, num_warps=w, num_stages=s) for w, s in options]
    return triton.autotune(configs=configs, key=list(key))(kernel)


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install 'attention-rewriter[triton]'"
    return None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET was set before its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
