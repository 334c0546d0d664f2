"""The interface of a channel mixer: a structured form for each projection of an MLP block.

The projections of a block hold nearly all of its parameters and arithmetic, and their function is
linear, so a channel mixer replaces each by a smaller linear map and leaves the pointwise function
between them as it is. The map takes the projection's place in its own module: `up_proj.weight`
becomes `up_proj.core.*`, the bias keeps its name.

A mechanism implements `sizes` (how large a structure it wants) and `structure` (an empty one of
given sizes, which fits itself to a dense weight). Sizes go into the plan, so that a checkpoint can
be rebuilt without the weights it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from rewriter.ir.mlp import MlpSite
from rewriter.mixers.base import MixerOptions, Tier

Sizes = dict[str, int]
DAMPING = 1e-4  # of a second moment, relative to its mean diagonal


class ChannelOptions(MixerOptions):
    """Options every channel mixer has.

    Attributes:
        ratio: parameters kept, as a share of the dense matrix.
        projections: which ones are replaced; a fused gate and up projection counts as 'up'.
        sizes: structure sizes by projection, written by the rewrite into its plan; sizes given
            by hand win over what the mixer would choose.
    """

    ratio: float = Field(default=0.5, gt=0.0, le=2.0)
    projections: tuple[str, ...] = ("gate", "up", "down")
    sizes: dict[str, Sizes] = Field(default_factory=dict)


@dataclass(frozen=True)
class ChannelInfo:
    """What `rewriter mixers` prints; fields as of `MixerInfo`."""

    name: str
    tier: Tier
    summary: str
    maths: str
    source: str
    family: str = "channel"


@dataclass(frozen=True)
class Dense:
    """A projection as it is, and what it reads.

    Attributes:
        weight: (output, input), any floating dtype.
        moment: (input, input) fp32 mean of x x^T over the calibration calls, or None.
    """

    weight: torch.Tensor
    moment: torch.Tensor | None = None

    def damped(self) -> torch.Tensor:
        """(input, input) fp64 second moment, away from zero; the unit matrix where none is known.

        Channels that calibration never saw must not count as free.
        """
        unit = torch.eye(self.weight.shape[1], dtype=torch.float64, device=self.weight.device)
        if self.moment is None:
            return unit
        moment = self.moment.double().to(unit.device)
        return moment + DAMPING * moment.diagonal().mean().clamp_min(1e-30) * unit


class Structure(nn.Module):
    """A linear map with fewer parameters than a matrix: (..., input) to (..., output), no bias.

    It computes in the dtype of its input; in training its parameters are float32. Fitted weights
    train at 1e-3 at the rate of stage 1: entries are small, and Adam moves each by the rate.
    """

    rates: ClassVar[Mapping[str, float]] = {"left": 1 / 30, "right": 1 / 30}

    def dense(self) -> torch.Tensor:
        """The (output, input) matrix it stands for."""
        raise NotImplementedError

    def fit(self, dense: Dense) -> None:
        """Set the parameters to the best approximation of a prepared projection."""
        raise NotImplementedError


class ChannelMixer:
    """Base of all channel mixers; has no state, so its methods are class methods."""

    info: ClassVar[ChannelInfo]
    Options: ClassVar[type[ChannelOptions]]

    @classmethod
    def refuse(cls, site: MlpSite, options: ChannelOptions) -> str | None:
        """Why this mixer cannot serve the site, as one sentence, or None if it can."""
        if site.experts:
            return f"{cls.info.name} has no form for the stacked weights of experts"
        loose = next((m for m in site.maps if m.weight != f"{m.module}.weight"), None)
        if loose is not None:
            return f"the parameter '{loose.weight}' is no projection module of its own"
        unknown = set(options.projections) - {"gate", "up", "down"}
        return f"there is no projection '{min(unknown)}'" if unknown else None

    @classmethod
    def prepare(cls, options: ChannelOptions, dense: Dense) -> Dense:
        """The projection with the second moment that the options want it judged by."""
        return dense

    @classmethod
    def sizes(cls, options: ChannelOptions, dense: Dense) -> Sizes:
        """Sizes of the structure for one prepared projection."""
        raise NotImplementedError

    @classmethod
    def structure(cls, outputs: int, inputs: int, sizes: Mapping[str, int]) -> Structure:
        """An empty structure; raises ValueError for sizes that do not fit."""
        raise NotImplementedError

    @classmethod
    def full(cls, outputs: int, inputs: int) -> Sizes:
        """Sizes at which every matrix is represented exactly (a limit case to check)."""
        raise NotImplementedError


class Projection(nn.Module):
    """A projection that runs on a structure, in the place of the module it replaces.

    Attributes:
        core: the structure.
        channel: dimension of the input that holds the channels.
        stored: shape of the weight it replaces; `transposed` if that held (input, output).
    """

    def __init__(
        self,
        core: Structure,
        bias: nn.Parameter | None,
        channel: int,
        stored: torch.Size,
        transposed: bool,
    ):
        super().__init__()
        self.core = core
        self.register_parameter("bias", bias)
        self.channel, self.stored, self.transposed = channel, stored, transposed

    @property
    def weight(self) -> torch.Tensor:
        """The matrix it stands for, in the shape of the replaced weight; made anew each time."""
        dense = self.core.dense()
        return (dense.mT if self.transposed else dense).reshape(self.stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the replaced module: channels in dimension `channel`, all others left alone."""
        y: torch.Tensor = self.core(x.movedim(self.channel, -1))
        if isinstance(self.bias, torch.Tensor):
            y = y + self.bias
        return y.movedim(-1, self.channel)
