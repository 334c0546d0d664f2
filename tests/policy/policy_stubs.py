"""Stand-in mixers, so that policies are tested without the real ones."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from pydantic import Field

from rewriter.ir.mask import Causal, Mask
from rewriter.ir.site import AddTerm, AttentionSite, HeadGroups, Scale, Source
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions


class NoOptions(MixerOptions):
    pass


class WindowOptions(MixerOptions):
    window: int = Field(default=256, ge=1)
    sinks: int = Field(default=4, ge=0)


class HeadOptions(WindowOptions):
    full: tuple[int, ...] = (0,)


class HybridOptions(WindowOptions):
    initial_log_ratio: float = -6.0


def _mixer(name: str, tier: str, options: type[MixerOptions], *kinds: str) -> type[Mixer]:
    class Fake(Mixer):
        info: ClassVar[MixerInfo] = MixerInfo(
            name,
            "test",
            tier,
            "",
            "",
            "",
            frozenset(kinds),  # type: ignore[arg-type]
        )
        Options: ClassVar[type[MixerOptions]] = options

    return Fake


def stub_registry() -> ModuleType:
    both = ("causal", "bidirectional")
    mixers = {
        "keep": _mixer("keep", "exact", NoOptions, *both),
        "fused": _mixer("fused", "exact", NoOptions, *both),
        "sink_window": _mixer("sink_window", "approximate", WindowOptions, *both),
        "duo": _mixer("duo", "approximate", HeadOptions, "causal"),
        "mamba2": _mixer("mamba2", "distilled", NoOptions, "causal"),
        "hedgehog": _mixer("hedgehog", "distilled", NoOptions, *both),
        "hedgehog_window": _mixer("hedgehog_window", "distilled", HybridOptions, "causal"),
    }
    module = ModuleType("rewriter.mixers.registry")
    module.available = lambda: tuple(mixers)  # type: ignore[attr-defined]
    module.get = mixers.__getitem__  # type: ignore[attr-defined]
    return module


def make_site(index: int, causal: bool = True, **changes: object) -> AttentionSite:
    values: dict[str, object] = {
        "fqn": f"model.layers.{index}.self_attn",
        "index": index,
        "heads": HeadGroups(4, 2, 16, 16),
        "score": (Scale(0.25), AddTerm(0)),
        "terms": ("mask",),
        "mask": Mask((Causal(),)) if causal else Mask(),
        "spelling": "sdpa",
        "source": Source("scaled_dot_product_attention", f"model.layers.{index}.self_attn"),
        "position": "rotary",
        "rotary_dim": 16,
        "hidden_dim": 64,
    }
    return AttentionSite(**{**values, **changes})  # type: ignore[arg-type]
