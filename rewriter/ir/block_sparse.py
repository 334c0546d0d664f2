"""`BlockSparse`: exact attention over the keys a predicate allows, block by block.

    o_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = exp(score_ij)  over j allowed for (b, h, i)

Blocks that the predicate hides are never touched, blocks it allows whole are not masked. Dense
causal and full attention are the predicates `j <= i` and true. A row that sees nothing gives 0 and
a log-sum-exp of -inf. Catalogue: sparse.md section 1 (K1, K2, K6a).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy
from sympy.logic.boolalg import Boolean

from rewriter.ir.mask import I, J

Weight = Literal["softmax", "sigmoid"]

EVERYTHING: Boolean = sympy.true
CAUSAL: Boolean = sympy.Le(J, I)


def causal_window(window: int, sinks: int = 0) -> Boolean:
    """j <= i and (i - j < window or j < sinks)."""
    near = sympy.Lt(I - J, window)
    return sympy.And(CAUSAL, sympy.Or(near, sympy.Lt(J, sinks)) if sinks else near)


@dataclass(frozen=True)
class BlockSparse:
    """What the kernel computes. Inputs of a call, optional ones last:

    - q, k, v: (B, H, M, Dk), (B, Hkv, N, Dk), (B, Hkv, N, Dv).
    - sinks: (H,) float32, the logit of a key with value 0 that every row sees.
    - slopes: (H,) float32, adds -slope * (i - j) to a score (ALiBi).
    - bias: (1|B, 1|H, M, N), finite, added to the score.
    - temperature: (H, M) float32, multiplies the dot products of a row.
    - key_lengths: optional (B,) int32; keys at j >= length are hidden.
    - cu_seqlens: optional (S + 1,) int32; query and key must lie in the same packed sequence, and
      B is 1. Positions in the predicate stay those of the packed row.
    - blocks: (B, Hkv, ceil(M / block), L) int32 key block numbers, ascending, -1 at the end. Only
      these blocks are visited, under the same predicate.

    Returned: (B, H, M, Dv) and the log-sum-exp (B, H, M) float32 (of the scores; for 'sigmoid' 0).

    score = temperature * scale * q.k, then softcap * tanh(score / softcap), then slopes and bias.
    'sigmoid' weights are sigmoid(score) and are not divided by their sum.

    Attributes:
        key_dim, value_dim: Dk and Dv.
        scale: of the dot product.
        mask: sympy predicate over (h, i, j), positions absolute.
        softcap: or None.
        weight: softmax or sigmoid.
        sinks, slopes, bias, temperature: whether the call has that input.
        offset: position of query row 0, so i = offset + row.
        block: size of a run-time block, in keys and in queries; 0 without run-time lists.
    """

    key_dim: int
    value_dim: int
    scale: float
    mask: Boolean = CAUSAL
    softcap: float | None = None
    weight: Weight = "softmax"
    sinks: bool = False
    slopes: bool = False
    bias: bool = False
    temperature: bool = False
    offset: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        if self.weight == "sigmoid" and self.sinks:
            raise ValueError("sigmoid weights have no normaliser, so a sink changes nothing")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive, not {self.softcap}")
