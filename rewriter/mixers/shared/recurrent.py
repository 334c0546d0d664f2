"""What the gated recurrences have in common: one `Recurrence`, then a norm and a gate per head.

Their outputs are no means of values: reads are signed and not divided by their sum, so a norm with
a gain per channel stands where softmax has its normaliser. `fit` sets the gain from data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import sympy
import torch
from pydantic import Field
from torch import Tensor

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, HIDDEN, KEY_DIM, KV_HEADS, TOKENS, VALUE_DIM, StateSpec
from rewriter.mixers.base import Mixer, MixerOptions
from rewriter.mixers.shared.gates import OutputGate, per_head, per_token
from rewriter.mixers.shared.norm import HeadNorm, Norm
from rewriter.mixers.shared.refusals import sees_everything
from rewriter.mixers.shared.shift import ShortConv, carried
from rewriter.mixers.tokens import Tokens

QKV = (HEADS + KV_HEADS) * KEY_DIM + KV_HEADS * VALUE_DIM  # channels of q, k and v together


def joined(x: Tokens) -> Tensor:
    """q, k and v side by side, (B, n, (H + Hkv) Dk + Hkv Dv)."""
    return torch.cat([per_token(t) for t in (x.q, x.k, x.v)], -1)


def parted(x: Tokens, rows: Tensor) -> Tokens:
    """The tokens with q, k and v taken from such rows, in the dtype of v."""
    widths = [t.shape[1] * t.shape[3] for t in (x.q, x.k, x.v)]
    parts = torch.split(rows.to(x.v.dtype), widths, -1)
    q, k, v = (per_head(p, t.shape[1]) for p, t in zip(parts, (x.q, x.k, x.v), strict=True))
    return replace(x, q=q, k=k, v=v)


def channels(site: AttentionSite) -> int:
    """Columns of `joined`."""
    heads = site.heads
    return (heads.query + heads.key_value) * heads.key_dim + heads.key_value * heads.value_dim


class ConvOptions(MixerOptions):
    """`conv`: taps of the short convolution over q, k and v, 1 for none; `activation`: after it."""

    conv: int = Field(default=4, ge=1)
    activation: Literal["identity", "silu"] = "identity"


class GatedRecurrence(Mixer):
    """A causal mixer whose core is `kernel_spec` and whose output is gate * norm(read)."""

    needs_hidden = True
    averages = False
    norm_kind: ClassVar[Norm] = "rms"

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        self.spec = self.kernel_spec(site, options)
        self.norm = HeadNorm(site, self.norm_kind)
        self.gate = OutputGate(site)
        if isinstance(options, ConvOptions) and options.conv > 1:
            self.conv = ShortConv(channels(site), options.conv, options.activation)

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> Recurrence:
        raise NotImplementedError

    @classmethod
    def gate_columns(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """Outputs of the linear maps of the stream, for the cost."""
        return HEADS * VALUE_DIM

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        return super().refuse(site, options) or sees_everything(cls.info.name, site)

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        state = cls.kernel_spec(site, options).state_spec()
        if isinstance(options, ConvOptions) and options.conv > 1:
            return StateSpec((*state.tensors, carried("conv", options.conv - 1, QKV)))
        return state

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """Reads of all heads, writes (and corrections) of the state heads, and the gates."""
        spec = cls.kernel_spec(site, options)
        writes = 1 if spec.correction == "none" else 3
        state = 2 * (HEADS + writes * KV_HEADS) * KEY_DIM * VALUE_DIM
        return BATCH * TOKENS * (state + 2 * HIDDEN * cls.gate_columns(site, options))

    def convolved(self, x: Tokens) -> tuple[Tokens, dict[str, Tensor]]:
        """The tokens with q, k and v convolved, and the new state of the convolution."""
        if not hasattr(self, "conv"):
            return x, {}
        before = None if x.state is None else x.state["conv"]
        out, carry = self.conv(joined(x), x.valid, before)
        return parted(x, out), {"conv": carry}

    def finish(self, out: Tensor, x: Tokens) -> Tensor:
        """Norm and gate of what the recurrence reads, (B, H, n, Dv)."""
        gated: Tensor = self.norm(out) * self.gate(x.stream)
        return gated.to(x.v.dtype)

    def fit(self, x: Tokens, target: Tensor) -> None:
        """Set the gain of every head."""
        with torch.no_grad():
            self.norm.fit(self.mix(x)[0], target)
