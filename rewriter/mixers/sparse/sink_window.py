"""sink_window: sliding window plus attention sinks, training-free (StreamingLLM).

Causal: query i sees keys j <= i with i - j < window, and the first `sinks` tokens. Bidirectional:
|i - j| < window, and the first `sinks` tokens. Positions stay the original ones, so the result is
the teacher's own softmax with the far middle left out; window >= length is the teacher exactly.
Without the sinks a pretrained model loses most of its quality, since many heads park their mass
there.
"""

from __future__ import annotations

import sympy
import torch
from pydantic import Field

from rewriter.ir.kernels import WindowAttention
from rewriter.ir.mask import Causal, KeyPadding, SymmetricWindow, Window
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, KEY_DIM, TOKENS, VALUE_DIM, State
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.shared.pairs import causal_pairs
from rewriter.mixers.shared.window import Windowed
from rewriter.mixers.tokens import Tokens, run

_UNDERSTOOD = (Causal, KeyPadding, Window, SymmetricWindow)


class SinkWindowOptions(MixerOptions):
    """`window`: tokens in the window, the query's own included; `sinks`: first tokens kept."""

    window: int = Field(default=256, ge=1)
    sinks: int = Field(default=4, ge=0)


class SinkWindow(Windowed):
    info = MixerInfo(
        name="sink_window",
        family="sparse",
        tier="approximate",
        summary="softmax over a sliding window and the first tokens; bounded cache",
        maths="o_i = softmax over {j : i - j < window or j < sinks} of (q_i k_j scale) v_j",
        source="sink_swa (StreamingLLM)",
        directions=frozenset({"causal", "bidirectional"}),
    )
    Options = SinkWindowOptions
    branches = ("sinks", "window")

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        reason = super().refuse(site, options)
        if reason is not None:
            return reason
        for atom in site.mask.atoms:
            if not isinstance(atom, _UNDERSTOOD):
                return f"sink_window does not combine with a {atom.name} mask"
        if site.has_bias and site.softcap is not None:
            return "sink_window has no form for a bias together with a softcap"
        return None

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> WindowAttention:
        """The mixer's window inside the one that the site has already."""
        assert isinstance(options, SinkWindowOptions)
        radius = site.mask.radius
        return WindowAttention(
            window=options.window,
            sinks=options.sinks,
            causal=site.kind == "causal",
            scale=site.scale,
            softcap=site.softcap,
            limit=site.mask.window if radius is None else radius + 1,
        )

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        assert isinstance(options, SinkWindowOptions)
        if site.kind == "causal":
            pairs = causal_pairs(options.window + options.sinks)
        else:
            pairs = TOKENS * sympy.Min(TOKENS, 2 * options.window + options.sinks)
        return 2 * BATCH * HEADS * pairs * (KEY_DIM + VALUE_DIM)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        return run(self.active(), x, bias=x.bias)
