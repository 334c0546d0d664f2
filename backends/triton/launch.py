"""One kernel launch as a value, so that the same plan can be run, or compiled ahead of time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

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
    """

    kernel: Any
    grid: Grid
    args: Mapping[str, Tensor | int | float]
    constants: Mapping[str, int | float] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


Runner = Callable[[Launch], None]


def execute(launch: Launch) -> None:
    """Run it, on a GPU or under Triton's interpreter."""
    if 0 in launch.grid:
        return
    launch.kernel[launch.grid](
        **launch.args,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed: pip install 'attention-rewriter[triton]'"
    return None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET was set before its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
