"""What a deployment can hold and how long it takes: the four terms of the long-context model.

Prefill, sessions held at once, decoding and switching between sessions are all driven by the bytes
of the cache: catalogue other.md E.1 (after "Challenges in Deploying Long-Context Transformers").
All values are sympy expressions over `work`'s symbols and these:

    MEMORY bytes of the device, LINK bytes a second to host memory, OUTPUT new tokens a session.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from rewriter.ir.state import BATCH, TOKENS
from rewriter.planner.work import BANDWIDTH, PEAK, Work, total

MEMORY, LINK, OUTPUT = sympy.symbols("M kappa n_out", positive=True)
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, HIDDEN, VOCABULARY = sympy.symbols(
    "L D H K d F V", integer=True, positive=True
)


@dataclass(frozen=True)
class Serving:
    """A model in service.

    Attributes:
        prefill: parts of one session's prefill over B (taken as 1) and N.
        weights: bytes.
        cache: bytes of one session after N tokens.
    """

    prefill: tuple[Work, ...]
    weights: sympy.Expr
    cache: sympy.Expr

    @property
    def prefill_seconds(self) -> sympy.Expr:
        """Bound by arithmetic."""
        return total(self.prefill).flops.subs(BATCH, 1) / PEAK

    @property
    def concurrency(self) -> sympy.Expr:
        """Sessions whose caches fit beside the weights."""
        return sympy.floor((MEMORY - self.weights) / self.cache)

    def decode_seconds(self, sessions: Any = 1) -> sympy.Expr:
        """Of OUTPUT tokens for `sessions` together, bound by reading weights and caches."""
        return OUTPUT * (self.weights + sessions * self.cache) / BANDWIDTH

    @property
    def switch_seconds(self) -> sympy.Expr:
        """One session's cache out to the host and another's in."""
        return 2 * self.cache / LINK

    def sessions_per_second(self, pause: Any = 0) -> sympy.Expr:
        """Rate of sessions that prefill, decode, are switched and pause for `pause` seconds."""
        held = self.concurrency
        return held / (
            self.prefill_seconds + self.decode_seconds(held) + self.switch_seconds + pause
        )


def decoder(
    mixing: sympy.Expr | None = None, cache: sympy.Expr | None = None, width: Any = 2
) -> Serving:
    """A decoder with gated MLPs over the symbols L, D, H, K, d, F and V.

    Args:
        mixing: operations of one core over B, N and these symbols; full causal attention if None.
        cache: bytes of one layer's cache after N tokens of one row; that of full attention if None.
        width: bytes of a value.
    """
    D, H, K, d = WIDTH, HEADS, KV_HEADS, HEAD_WIDTH
    layer = D * (H + 2 * K) * d + H * d * D + 3 * D * HIDDEN
    core = 2 * BATCH * TOKENS**2 * H * d if mixing is None else mixing
    kept = 2 * TOKENS * K * d * width if cache is None else cache
    parts = (
        Work("linear", 2 * BATCH * TOKENS * LAYERS * layer, width * LAYERS * layer),
        Work("mixing", LAYERS * core, sympy.Integer(0)),
        Work("head", 2 * BATCH * D * VOCABULARY, width * D * VOCABULARY),
    )
    return Serving(parts, width * (LAYERS * layer + D * VOCABULARY), LAYERS * kept)


def numbers(expressions: Iterable[sympy.Expr], values: Mapping[Any, Any]) -> list[float]:
    """Each expression at the given values of the symbols."""
    return [float(e.subs(values)) for e in expressions]
