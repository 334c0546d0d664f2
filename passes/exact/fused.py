"""Modules that compute one region by one generated kernel: gated layers and normalisations.

Each is found in the graph (`gated.py`, `norms.py`), run alone beside the original on random inputs,
timed against it, and changed in place as `linears.py` does it. A changed module runs its original
code where gradients are wanted, where somebody watches its inside, and on few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from rewriter.backends.measured import remembered
from rewriter.backends.ops.regions import plain
from rewriter.errors import UsageError
from rewriter.ir.contract import ContractResult, judged
from rewriter.passes.compare import max_difference
from rewriter.passes.realise.subclass import InPlace, become
from rewriter.plan import FusedModule
from rewriter.timing import interleaved

STATE = "_fused_region"
PROBED_ROWS = (64, 512, 4096)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_MARGIN = 0.95  # share of the original's time that a region has to stay under
_RUNS = 5


class Region(Protocol):
    """How a module computes its region. Instances are plain data, so that modules pickle."""

    def tensors(self, owner: nn.Module) -> tuple[torch.Tensor | None, ...]:
        """The parameters that are read."""

    def watched(self, owner: nn.Module) -> Sequence[nn.Module]:
        """Submodules that are not run, so that hooks on them would not be either."""

    def run(self, owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The output of the module."""


@dataclass(frozen=True)
class Fusion:
    """The state of a changed module.

    Attributes:
        rows: least number of rows from which the region was measured to be faster.
        kinds: classes of the submodules that are not run; another one in the place is honoured.
    """

    region: Region
    rows: int
    kinds: tuple[str, ...]

    def fits(self, owner: nn.Module, x: Any) -> bool:
        if torch.compiler.is_compiling() or owner.training or not isinstance(x, torch.Tensor):
            return False
        if x.dim() < 2 or x.numel() < self.rows * x.shape[-1]:
            return False
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        inside = self.region.watched(owner)
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in inside):
            return False
        return kinds_of(inside) == self.kinds and plain(x, *self.region.tensors(owner))


class Fused(InPlace):
    """Mixin of all changed modules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: Fusion = self.__dict__[STATE]
        if len(args) == 1 and not kwargs and state.fits(self, args[0]):
            return state.region.run(self, args[0])
        return super().forward(*args, **kwargs)


def kinds_of(modules: Sequence[nn.Module]) -> tuple[str, ...]:
    """Names of classes; a class that was made for one module has the name of its original."""
    return tuple(f"{type(m).__module__}.{type(m).__qualname__}" for m in modules)


def put(owner: nn.Module, region: Region, gains: dict[str, float]) -> None:
    """Change a module in place."""
    rows = next((n for n in PROBED_ROWS if str(n) in gains), PROBED_ROWS[-1])
    owner.__dict__[STATE] = Fusion(region, rows, kinds_of(region.watched(owner)))
    become(owner, Fused)


def checked(model: nn.Module, layer: FusedModule) -> nn.Module:
    """The module that a plan names.

    Raises:
        UsageError: the model has none, or it was changed before.
    """
    try:
        owner = model.get_submodule(layer.fqn)
    except AttributeError:
        raise UsageError(
            f"the plan fuses '{layer.fqn}', which this model does not have; make a new plan for it"
        ) from None
    if isinstance(owner, Fused):
        raise UsageError(f"'{layer.fqn}' is fused already")
    return owner


def proof(owner: nn.Module, region: Region, width: int, dtype: torch.dtype) -> float | str:
    """Largest difference of outputs relative to the largest, or why the region is not the module.

    Inputs are small and large, so that what is added to a square shows.
    """
    worst = 0.0
    for number, scale in enumerate((1.0, 1e-2, 8.0)):
        generator = torch.Generator().manual_seed(number)
        x = (scale * torch.randn(2, 19, width, generator=generator)).to(dtype)
        try:
            with torch.no_grad():
                ours, theirs = region.run(owner, x), owner(x)
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            return f"it does not run alone: {str(error).splitlines()[0]}"
        if not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape:
            return "it returns something else than its region computes"
        if theirs.dtype != ours.dtype:
            return f"it returns {theirs.dtype}"
        size = max(1e-6, float(theirs.float().abs().max()))
        worst = max(worst, max_difference(ours, theirs) / size)
    if not worst <= BOUND[dtype]:
        return f"generated code differs by {worst:.2g} from the original"
    return worst


def gains_of(
    owner: nn.Module, region: Region, width: int, dtype: torch.dtype, name: str, about: str
) -> dict[str, float]:
    """Measured speed-up by number of rows, from the least number from which there always is one."""
    threads = torch.get_num_threads()

    def measure(rows: int) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
            with torch.no_grad():
                times = interleaved(
                    {"ours": lambda: region.run(owner, x), "theirs": lambda: owner(x)},
                    seconds=0.0,
                    rounds=(_RUNS, _RUNS),
                    clock="cpu" if threads == 1 else "wall",
                )
            return times["ours"].median, times["theirs"].median

        return run

    gains: dict[str, float] = {}
    for rows in reversed(PROBED_ROWS):
        key = f"{name} {dtype} rows {rows} threads {threads}"
        ours, theirs = remembered("fused", about, key, measure(rows))
        if not ours < _MARGIN * theirs:
            break
        gains[str(rows)] = round(theirs / ours, 2)
    return gains


def results(layers: Sequence[FusedModule], dtype: torch.dtype) -> list[ContractResult]:
    """Contracts 8 and 10 of the modules that were changed: largest error, measured gains."""
    out: list[ContractResult] = []
    for kind, what in (("gated", "gated layers"), ("norm", "normalisations")):
        done = [x for x in layers if x.kind == kind and x.status != "refused"]
        if not done:
            continue
        worst = max(done, key=lambda x: x.error)
        check = f"{what} in one kernel: outputs equal the original"
        bound = BOUND.get(dtype, math.inf)
        out.append(judged(8, check, worst.fqn, worst.error, bound, f"{len(done)} modules"))
        gains = (
            f"{rows} rows: {median(all_):.2f}x in {len(all_)}"
            for rows in map(str, PROBED_ROWS)
            if (all_ := [x.gains[rows] for x in done if rows in x.gains])
        )
        check = f"{what} in one kernel: measured gain"
        out.append(ContractResult(10, check, "model", "reported", detail=", ".join(gains)))
    return out
