"""Kernel specs: what a mixer computes, stated without saying how. Backends turn them into code.

The core contract of every kernel here: it is one function with many schedules. It consumes `n` new
tokens and an optional state and returns the outputs for these tokens and the state after them, so
that a full forward, a chunked prefill and a token step are the same call with different `n`
(design contract 3). Without a state the sequence starts here and no state is returned.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowAttention:
    """Softmax over a window and sink tokens.

    Causal: query i sees valid keys j <= i with i - j < window, or among the first `sinks` valid
    keys of its row. Bidirectional: |i - j| < window, or among the first `sinks` valid keys.
    `limit`, when given, is an outer window that also hides sinks (i - j < limit): the window the
    original model already had.
    """

    window: int
    sinks: int
    causal: bool
    scale: float
    softcap: float | None = None
    limit: int | None = None


@dataclass(frozen=True)
class LinearAttention:
    """sum_j f(q_i).f(k_j) v_j / sum_j f(q_i).f(k_j) over features that are already mapped.

    Causal (j <= i, recurrent state) or over all valid keys. State and normaliser are float32.
    Catalogue: LIN-S without decay, GLOBAL, ones-column normaliser.
    """

    causal: bool


@dataclass(frozen=True)
class JointWindowLinear:
    """Sinks and window in softmax, every older key in the linear branch, one joint normaliser.

    With m_i the largest near logit, S/z the state of keys j <= i - window that are not sinks:
    o_i = (sum_near exp(s_ij - m_i) v_j + r_h f(q_i) S) / (sum_near exp(s_ij - m_i) + r_h f(q_i) z),
    r_h > 0 a ratio per head (catalogue: lolcats_hybrid, JOINT unscaled, with sinks added).
    """

    window: int
    sinks: int
    scale: float
    softcap: float | None = None


KernelSpec = WindowAttention | LinearAttention | JointWindowLinear
