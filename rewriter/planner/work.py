"""Arithmetic and traffic of the parts of a model, symbolic in sympy.

Symbols: B rows, N tokens; in decoding N counts the context with the new token. `PEAK` is operations
a second, `BANDWIDTH` bytes a second, `LAUNCH` seconds an operation of the framework. A part takes
the longer of its arithmetic and its traffic, and its launches (roofline; catalogue other.md E.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sympy

from rewriter.errors import UsageError
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, KV_HEADS, TOKENS, VALUE_DIM, bindings
from rewriter.mixers import registry
from rewriter.mixers.base import Mixer, MixerOptions

PEAK, BANDWIDTH = sympy.symbols("phi beta", positive=True)
LAUNCH = sympy.Symbol("alpha", nonnegative=True)
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Work:
    """One part of a forward pass.

    Attributes:
        name: for people.
        flops: multiply-adds times two.
        bytes: read and written, each operand once.
        calls: operations of the framework.
    """

    name: str
    flops: sympy.Expr
    bytes: sympy.Expr
    calls: int = 1

    @property
    def intensity(self) -> sympy.Expr:
        """Operations a byte."""
        return sympy.simplify(self.flops / self.bytes)

    def seconds(self) -> sympy.Expr:
        """Roofline time over PEAK, BANDWIDTH and LAUNCH."""
        return sympy.Max(self.flops / PEAK, self.bytes / BANDWIDTH) + self.calls * LAUNCH

    def at(self, values: Mapping[Any, Any]) -> Work:
        """With symbols replaced."""
        return Work(self.name, self.flops.subs(values), self.bytes.subs(values), self.calls)


def total(parts: Iterable[Work], name: str = "total") -> Work:
    """The sum of several parts; its roofline time is not that of the parts, use `latency`."""
    items = list(parts)
    zero = sympy.Integer(0)
    return Work(
        name,
        sum((p.flops for p in items), zero),
        sum((p.bytes for p in items), zero),
        sum(p.calls for p in items),
    )


def latency(parts: Iterable[Work]) -> sympy.Expr:
    """Sum of the roofline times of the parts."""
    return sum((p.seconds() for p in parts), sympy.Integer(0))


def matrix_work(
    name: str, inputs: Any, outputs: Any, rows: Any, width: int = 4, count: int = 1
) -> Work:
    """`count` products of (rows, inputs) with a weight (inputs, outputs) of `width` bytes each."""
    flops = sympy.sympify(2 * count * rows * inputs * outputs)
    moved = count * width * (inputs * outputs + rows * (inputs + outputs))
    return Work(name, flops, sympy.sympify(moved), count)


def core_work(
    mixer: str,
    options: MixerOptions | Mapping[str, Any],
    site: AttentionSite,
    phase: Phase,
    width: int = 4,
    symbolic: bool = False,
) -> Work:
    """The core of one site, over B and N.

    Args:
        mixer: name of a registered mixer.
        options: its options, validated or plain.
        phase: all of N tokens at once, or one new token behind N - 1 others.
        width: bytes of a value of the model.
        symbolic: keep the head counts and widths of the site as symbols too.

    Raises:
        UsageError: the mixer states no cost.
    """
    kind, chosen = _validated(mixer, options)
    try:
        flops = (kind.flops if phase == "prefill" else kind.step_flops)(site, chosen)
        state = kind.state_spec(site, chosen) if site.kind == "causal" else None
    except NotImplementedError:
        raise UsageError(
            f"the mixer '{mixer}' states no cost, so no time can be predicted for it"
        ) from None
    ends = HEADS * (KEY_DIM + VALUE_DIM) + KV_HEADS * (KEY_DIM + VALUE_DIM)
    if phase == "prefill":
        moved = width * BATCH * TOKENS * ends
    else:
        moved = width * BATCH * ends
        for tensor in state.tensors if state is not None else ():
            size = sympy.prod([sympy.sympify(s) for s in tensor.shape])
            # accumulators are read and written, keys and values only read
            moved += size * (8 if tensor.dtype == "float32" else width)
    known = {} if symbolic else _sizes(site)
    return Work(mixer, sympy.sympify(flops).subs(known), sympy.sympify(moved).subs(known))


def state_bytes(
    mixer: str, options: MixerOptions | Mapping[str, Any], site: AttentionSite, width: int = 4
) -> sympy.Expr:
    """Bytes of the cache or state of one site after N tokens of B rows."""
    kind, chosen = _validated(mixer, options)
    return kind.state_spec(site, chosen).bytes(width).subs(_sizes(site))


def _sizes(site: AttentionSite) -> dict[Any, Any]:
    known: dict[Any, Any] = dict(bindings(site, 1, 1))
    del known[BATCH], known[TOKENS]
    return known


def _validated(
    mixer: str, options: MixerOptions | Mapping[str, Any]
) -> tuple[type[Mixer], MixerOptions]:
    kind = registry.get(mixer)
    return kind, options if isinstance(options, MixerOptions) else kind.Options(**options)
