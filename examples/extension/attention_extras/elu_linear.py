"""A mixer: linear attention with the feature map elu(x) + 1.

Katharopoulos et al. 2020, "Transformers are RNNs": one matrix per head is carried between tokens,
whatever the length. Training, prefill, decoding, padding and kernels all follow from the spec.
"""

from __future__ import annotations

import math

import sympy
import torch
import torch.nn.functional as F

from rewriter.ir.recurrence import Recurrence
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, TOKENS, State, StateSpec
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.shared.refusals import sees_everything
from rewriter.mixers.tokens import Tokens, run


class EluLinear(Mixer):
    info = MixerInfo(
        name="elu_linear",
        family="linear",
        tier="distilled",
        summary="linear attention with the map elu(x) + 1; constant state, no parameters",
        maths="o_i = phi(q_i) sum_j phi(k_j)^T v_j / phi(q_i) sum_j phi(k_j)^T, phi = elu + 1",
        source="Katharopoulos et al. 2020, Transformers are RNNs",
        directions=frozenset({"causal", "bidirectional"}),
    )
    Options = MixerOptions

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        self.spec = self.kernel_spec(site)
        self.root = math.sqrt(abs(site.scale))

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        return super().refuse(site, options) or sees_everything(cls.info.name, site)

    @classmethod
    def kernel_spec(cls, site: AttentionSite) -> Recurrence:
        return Recurrence(
            key_dim=site.heads.key_dim,
            value_dim=site.heads.value_dim,
            normaliser="ones",
            causal=site.kind == "causal",
        )

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        return cls.kernel_spec(site).state_spec()

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        return 4 * BATCH * HEADS * TOKENS * site.heads.key_dim * (site.heads.value_dim + 1)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        return run(self.spec, x, self._map(x.q), self._map(x.k), x.v)

    def _map(self, x: torch.Tensor) -> torch.Tensor:
        """Positive features in float32, of inputs that share the scale of the site."""
        return F.elu(x.float() * self.root) + 1.0
