"""Few tokens: one by one, or as a chunk. Measured once for a spec and remembered.

A chunk of few tokens is the dense form: all pairs at once, and the state once. Token by token the
state is read and written each time. Which is faster up to where depends on the widths, the decay,
the dtype and the processor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewriter.backends.inputs import RecurrenceInputs
from rewriter.backends.measured import remembered
from rewriter.ir.recurrence import Recurrence
from rewriter.timing import interleaved

FEW = 8  # tokens up to which it is always one by one: no chunk kernel has to be compiled
LENGTHS = (16, 24, 32, 48)  # that are measured; longer sequences are always chunks
_HEADS = 4
_RUNS = 7
_MARGIN = 0.95  # share of a chunk's time that single steps have to stay under
Form = Callable[[RecurrenceInputs], object]


def limit(spec: Recurrence, dtype: torch.dtype, source: str, step: Form, chunk: Form) -> int:
    """Tokens up to which single steps are faster: FEW or one of LENGTHS.

    Args:
        source: text of the generated code of both forms.
        step, chunk: run a call in that form.
    """

    def measure() -> list[float]:
        times: list[float] = []
        for n in LENGTHS:
            x = _call(spec, dtype, n)
            taken = interleaved(
                {"step": lambda x=x: step(x), "chunk": lambda x=x: chunk(x)},  # type: ignore[misc]
                seconds=0.0,
                rounds=(_RUNS, _RUNS),
            )
            times += [taken["step"].median, taken["chunk"].median]
        return times

    times = remembered("recurrence", source, f"{spec} {dtype}", measure)
    best = FEW
    for n, steps, chunks in zip(LENGTHS, times[::2], times[1::2], strict=True):
        if steps >= _MARGIN * chunks:
            break
        best = n
    return best


def _call(spec: Recurrence, dtype: torch.dtype, n: int) -> RecurrenceInputs:
    """A call of n tokens; the values cost the same whatever they are."""
    draw = torch.Generator().manual_seed(0)

    def some(width: int) -> torch.Tensor:
        return 0.1 * torch.rand(1, _HEADS, n, width, generator=draw)

    gates = {"head": torch.ones(_HEADS), "token": some(1)[..., 0], "channel": some(spec.key_dim)}
    untied = spec.correction == "untied"
    return RecurrenceInputs(
        some(spec.key_dim).to(dtype),
        some(spec.key_dim).to(dtype),
        some(spec.value_dim).to(dtype),
        decay=-gates[spec.decay] if spec.decay != "none" else None,
        beta=some(1)[..., 0] if spec.correction == "delta" else None,
        erase=some(spec.key_dim) if untied else None,
        add=some(spec.key_dim) if untied else None,
        bonus=torch.ones(_HEADS, spec.key_dim) if spec.bonus else None,
    )
