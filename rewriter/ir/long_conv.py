"""`LongConv`: a convolution as long as the text, whose kernel is a sum of damped oscillations.

Per batch row and channel, with complex modes h in C^M, poles z_m = exp(decay_m + i angle_m) of
size at most 1 and weights r_m:

    h_t = z h_{t-1} + v_t,   o_t = 2 Re sum_m r_m h_{t,m}

which is the causal convolution of v with K_l = 2 Re sum_m r_m z_m^l: by FFT over many tokens, by
the recurrence over one. Channels of query head h read the modes of head h // (H / Hkv).
Catalogue: linear.md section 2 (CONV-F, SCAN-E).
"""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.ir.state import BATCH, KV_HEADS, VALUE_DIM, StateSpec, StateTensor


@dataclass(frozen=True)
class LongConv:
    """What the kernel computes. Inputs of a call:

    - v: (B, Hkv, N, Dv).
    - decay, angle: (Hkv, Dv, M) logarithm of the size of each pole, <= 0, and its argument.
    - read: (H, Dv, M, 2), real and imaginary part of r.
    - valid: optional (B, N) bool; a padded token neither writes nor decays, its output is 0.
    - state: optional tensors of `state_spec()`, the state before the first token.

    Returned: (B, H, N, Dv) in the dtype of v, and the state behind the tokens if one was given.

    Attributes:
        modes: M, one of each conjugate pair.
    """

    modes: int

    def state_spec(self) -> StateSpec:
        """`modes` (B, Hkv, Dv, M, 2) float32: real and imaginary part of h."""
        shape = (BATCH, KV_HEADS, VALUE_DIM, self.modes, 2)
        return StateSpec((StateTensor("modes", shape, "float32"),))
