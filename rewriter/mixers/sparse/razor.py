"""razor: retrieval heads keep all keys, the others a window and one mean key (catalogue razor).

As `duo`, but what a windowed head no longer sees is not forgotten: all of it together is one more
key, the mean of its keys and values, whose score gains the logarithm of their number. That equals
full softmax with each of them replaced by the mean, so a head that looks at the far past evenly
loses nothing. Which heads retrieve is measured, by `rewriter.planner.retrieval`.

Unlike the paper, which computes a prompt in full and then drops, every token sees the same whether
it came in a prompt or alone. A shift by the running mean is all that is carried of the far past.
"""

from __future__ import annotations

from pydantic import Field

from rewriter.ir.kernels import WindowAttention
from rewriter.ir.site import AttentionSite
from rewriter.mixers.base import MixerInfo, MixerOptions
from rewriter.mixers.sparse.duo import Duo, DuoOptions


class RazorOptions(DuoOptions):
    """`full`: key/value heads that keep every key; `window` and `sinks`: of the other heads."""

    full: tuple[int, ...] = ()
    window: int = Field(default=256, ge=1)
    sinks: int = Field(default=4, ge=0)


class Razor(Duo):
    info = MixerInfo(
        name="razor",
        family="sparse",
        tier="approximate",
        summary="full softmax in retrieval heads; window, sinks and the mean of the rest in others",
        maths="head in full: softmax over j <= i; else window, sinks and (mean k, mean v, + ln n)",
        source="razor (RazorAttention)",
        directions=frozenset({"causal"}),
    )
    Options = RazorOptions

    @classmethod
    def kernel_spec(cls, site: AttentionSite, options: MixerOptions) -> WindowAttention:
        assert isinstance(options, DuoOptions)
        return WindowAttention(options.window, options.sinks, True, site.scale, mean=True)
