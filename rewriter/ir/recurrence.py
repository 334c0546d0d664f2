"""`Recurrence`: one spec for linear attention, gated and delta recurrences, and SSM blocks.

Per batch row and state head, with S in R^{Dk x Dv}, g <= 0 the log decay and s the scale:

    S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + w_t k_t v_t^T
    o_t = s q_t^T S_t                                   read 'inclusive'
    o_t = s q_t^T (S_{t-1} + Diag(u) k_t v_t^T)         read 'exclusive' (u only with a bonus)

`a_t` reads the state before it decays. Query head h reads the state of head h // (H / Hkv).
Catalogue: linear.md section 1 (the rows LIN-S, LIN-V, DELTA and GLOBAL) and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rewriter.ir.state import BATCH, KV_HEADS, StateSpec, StateTensor

Decay = Literal["none", "head", "token", "channel"]
Correction = Literal["none", "delta", "untied"]
Read = Literal["inclusive", "exclusive"]
Normaliser = Literal["none", "ones", "max"]


@dataclass(frozen=True)
class Recurrence:
    """What the recurrence computes. Inputs of a kernel call:

    - q, k, v: (B, H, N, Dk), (B, Hkv, N, Dk), (B, Hkv, N, Dv).
    - decay: log decay g <= 0, -inf allowed: (Hkv,) 'head', (B, Hkv, N) 'token' or
      (B, Hkv, N, Dk) 'channel'.
    - beta: (B, Hkv, N), correction 'delta': a = exp(g) k, b = -beta k, w = beta.
    - erase, add: (B, Hkv, N, Dk) each, correction 'untied': a and b as they stand; w = 1.
    - bonus: (Hkv, Dk), the vector u.
    - gate: (B, Hkv, N) log input gate i, w = exp(i); normaliser 'max'.
    - cu_seqlens: optional (S + 1,) int32, starts of packed sequences and the end; B is 1.
    - valid: optional (B, N) bool; a padded token neither writes nor decays, its output is 0.
    - state: optional tensors of `state_spec()`, the state before the first token.

    With `state=None` the sequence starts here and no state is returned.

    Attributes:
        key_dim, value_dim: Dk and Dv; compile-time constants of a kernel.
        decay: none, a constant per head, a scalar per token, or a vector per key channel.
        correction: none, the delta rule (tied to k and beta) or untied low-rank (RWKV-7, DPLR).
        read: whether token t reads its own write.
        bonus: the current token is read through u instead ('exclusive' only).
        normaliser: none; 'ones': divide by the sum of the weights, 0 where it is not positive;
            'max': mLSTM, divide by max(|n|, exp(-m)), everything scaled by exp(-m) with
            m_t = max(g_t + m_{t-1}, i_t); decay 'token' or 'none' only.
        causal: else every token reads all tokens: the sum without decay (GLOBAL), weights
            exp(-|b_i - b_j|) with decay 'head' or 'token', b the running sum of g.
        scale: s, applied to q.
    """

    key_dim: int
    value_dim: int
    decay: Decay = "none"
    correction: Correction = "none"
    read: Read = "inclusive"
    bonus: bool = False
    normaliser: Normaliser = "none"
    causal: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        if self.bonus and self.read != "exclusive":
            return "a bonus replaces the current token's read: use read='exclusive'"
        if self.normaliser == "max" and (
            self.decay not in ("none", "token") or self.correction != "none" or self.bonus
        ):
            return "normaliser 'max' combines with decay 'none' or 'token' and nothing else"
        if self.normaliser != "none" and self.correction != "none":
            return "a corrected state has no positive weights to normalise by"
        if not self.causal and (
            self.correction != "none" or self.decay == "channel" or self.read != "inclusive"
        ):
            return "bidirectional form exists without correction, for decay none, head or token"
        return None

    @property
    def state_width(self) -> int:
        """Columns of the state: Dv, and one more for a normaliser."""
        return self.value_dim + (self.normaliser != "none")

    def state_spec(self) -> StateSpec:
        """`S` (B, Hkv, Dk, state_width) float32, normaliser last; 'max': `m` (B, Hkv)."""
        shape = (BATCH, KV_HEADS, self.key_dim, self.state_width)
        tensors = [StateTensor("S", shape, "float32")]
        if self.normaliser == "max":
            tensors.append(StateTensor("m", (BATCH, KV_HEADS), "float32", float("-inf")))
        return StateSpec(tuple(tensors))
