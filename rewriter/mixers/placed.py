"""Where the mixers of a rewritten module are: at `core`, or at `core.N` for block N of several."""

from __future__ import annotations

from torch import nn

from rewriter.ir.site import AttentionSite
from rewriter.mixers.base import Mixer

CORE = "core"


class Cores(nn.ModuleDict):
    """The mixers of a module that computes several attention blocks, by number of the block."""


def place(owner: nn.Module, site: AttentionSite, core: nn.Module) -> None:
    """Make `core` the mixer of a site in its owner."""
    if site.slots == 1:
        owner.core = core
        return
    cores = owner._modules.get(CORE)
    if not isinstance(cores, Cores):
        cores = Cores()
        owner.core = cores
    cores[str(site.slot)] = core


def core_at(owner: nn.Module, site: AttentionSite) -> nn.Module:
    """What stands at the place of a site's mixer."""
    core = owner.core if site.slots == 1 else owner.get_submodule(site.core)
    assert isinstance(core, nn.Module)
    return core


def mixers_of(owner: nn.Module) -> dict[str, Mixer]:
    """The mixers of one module by their path in it; empty if it was not rewritten."""
    core = owner._modules.get(CORE)
    if isinstance(core, Cores):
        inside = {f"{CORE}.{number}": mixer for number, mixer in core.items()}
        return {path: mixer for path, mixer in inside.items() if isinstance(mixer, Mixer)}
    return {CORE: core} if isinstance(core, Mixer) else {}
