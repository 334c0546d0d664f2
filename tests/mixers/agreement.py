"""Agreement of a mixer with its oracle, judged in one way and recorded for the page of figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Agreement:
    """Errors relative to the largest value: 1e-5 for outputs, 1e-4 for gradients.

    Each is recorded as '<mixer> outputs' or '<mixer> gradients'; `examples/mixer_contracts.py`
    reads them.
    """

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def outputs(self, mixer: str, got: Tensor, wanted: Tensor) -> None:
        self._judge(f"{mixer} outputs", got, wanted, 1e-5)

    def gradient(self, mixer: str, got: Tensor, wanted: Tensor) -> None:
        self._judge(f"{mixer} gradients", got, wanted, 1e-4)

    def gradients(self, mixer: str, got: Tensor, wanted: Tensor, leaves: Sequence[Tensor]) -> None:
        """Of a random projection of both with respect to leaves they are made of."""
        probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(7))
        mine, theirs = (
            torch.autograd.grad((out * probe).sum(), leaves, retain_graph=True)
            for out in (got, wanted)
        )
        for a, b in zip(mine, theirs, strict=True):
            self.gradient(mixer, a, b)

    def both(self, mixer: str, got: Tensor, wanted: Tensor, leaves: Sequence[Tensor]) -> None:
        self.outputs(mixer, got, wanted)
        self.gradients(mixer, got, wanted, leaves)

    def _judge(self, what: str, got: Tensor, wanted: Tensor, bound: float) -> None:
        with torch.no_grad():
            largest = wanted.double().abs().max().clamp_min(1e-30)
            error = float((got.double() - wanted.double()).abs().max() / largest)
        self._record(what, error)
        assert error <= bound, f"{what} differ by {error:.1e}"
