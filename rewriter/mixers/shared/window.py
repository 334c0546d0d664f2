"""Mixers that keep the last tokens and the first ones exact."""

from __future__ import annotations

from dataclasses import replace

from rewriter.ir.kernels import JointWindowLinear, WindowAttention, state_of
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import StateSpec
from rewriter.mixers.base import Mixer, MixerOptions


class Windowed(Mixer):
    """A mixer with the options `window` and `sinks` on one kernel; its branches are parts of it."""

    spec: WindowAttention | JointWindowLinear

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        self.spec = self.kernel_spec(site, options)

    @classmethod
    def kernel_spec(
        cls, site: AttentionSite, options: MixerOptions
    ) -> WindowAttention | JointWindowLinear:
        raise NotImplementedError

    @classmethod
    def limit_options(cls, options: MixerOptions, tokens: int) -> MixerOptions | None:
        return options.model_copy(update={"window": tokens})

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        return state_of(cls.kernel_spec(site, options))

    def test_length(self) -> int:
        """Beyond the window, so that something is out of sight."""
        return self.spec.window + self.spec.sinks + 16

    def active(self) -> WindowAttention | JointWindowLinear:
        """The kernel without the branches that are switched off."""
        return replace(self.spec, hidden=self.disabled) if self.disabled else self.spec
