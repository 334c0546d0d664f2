"""s4d: a diagonal state space, the same filter for every text (catalogue s4d).

    h_t = e^(dt A) h_{t-1} + (e^(dt A) - 1)/A v_t,   o_t = act(2 Re(C h_t) + D v_t) silu(z_t)

A = -e^r + i w in C^M with one of each conjugate pair, a step dt per channel. It is a convolution of
each value channel with K_l = 2 Re sum C (e^(dt A) - 1)/A e^(l dt A): an FFT over a text, a
recurrence over one token. Both directions: K over the past and own token, a second C over what
comes later. Channels of a query group share A and dt, so the state is one per key/value head; the
gate stands for the published gated output map, since the output projection is the teacher's.

Queries and keys are not read: it weighs tokens by distance alone, and cannot look anything up.

The start: A = -1/2 + i pi m, dt log-uniform in 0.001 to 0.1. 'neutral': C = 0, D = 1, no
activation, gate 1, and `fit` solves C and D by least squares from the teacher's outputs;
'published': C normal, D = 1 and GELU, to train from scratch. Has to be distilled.
"""

from __future__ import annotations

import math
from typing import Literal

import sympy
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rewriter.ir.long_conv import LongConv
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, HIDDEN, KV_HEADS, TOKENS, VALUE_DIM, State, StateSpec
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.shared.both_ways import one_late, turned
from rewriter.mixers.shared.gates import OutputGate
from rewriter.mixers.shared.refusals import sees_everything
from rewriter.mixers.tokens import Tokens, run


class S4dOptions(MixerOptions):
    """`modes`: complex modes a channel, half of the state's real size; `start`: near the teacher,
    or as the authors initialise; `ridge`: of the fit, relative to the size of each mode."""

    modes: int = Field(default=32, ge=1)
    start: Literal["neutral", "published"] = "neutral"
    ridge: float = Field(default=1e-2, gt=0)


class S4d(Mixer):
    info = MixerInfo(
        name="s4d",
        family="ssm",
        tier="distilled",
        summary="a learned filter over distance for every value channel; constant state",
        maths="o = (K * v + D v) silu(z), K_l = 2 Re sum_m C_m (e^(dt A_m) - 1)/A_m e^(l dt A_m)",
        source="s4d (On the Parameterization and Initialization of Diagonal State Space Models)",
        directions=frozenset({"causal", "bidirectional"}),
    )
    Options = S4dOptions
    needs_hidden = True
    averages = False
    # 1e-3 at the rate of stage 1, as published: poles move what large C cancel in each other.
    rates = dict.fromkeys(("log_rate", "frequency", "log_step", "read"), 1 / 30)

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        assert isinstance(options, S4dOptions)
        heads, modes = site.heads, options.modes
        self.spec = LongConv(modes)
        self.published = options.start == "published"
        kv = (heads.key_value, heads.value_dim)
        self.log_rate = nn.Parameter(torch.full((*kv, modes), math.log(0.5)))
        # Differences from the start: large phases would lose their digits in half precision.
        self.frequency = nn.Parameter(torch.zeros(*kv, modes))
        self.log_step = nn.Parameter(torch.zeros(kv))
        directions = 1 if site.kind == "causal" else 2
        shape = (directions, heads.query, heads.value_dim, modes, 2)
        read = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * math.sqrt(0.5)
        self.read = nn.Parameter(read if self.published else torch.zeros(shape))
        self.skip = nn.Parameter(torch.ones(heads.query, heads.value_dim))
        self.gate = OutputGate(site, fitted=True)

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        return super().refuse(site, options) or sees_everything(cls.info.name, site)

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        assert isinstance(options, S4dOptions)
        return LongConv(options.modes).state_spec()

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """Of the recurrence: modes advance for the state heads and are read for all heads."""
        assert isinstance(options, S4dOptions)
        modes = 4 * options.modes * VALUE_DIM * (2 * KV_HEADS + HEADS)
        return BATCH * TOKENS * (modes + 2 * HIDDEN * HEADS * VALUE_DIM)

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        read, state = self._filtered(x, self.read)
        out = read + x.shown(self.skip.float()[:, None] * x.own_values())
        out = F.gelu(out) if self.published else out
        return (out * self.gate(x.stream)).to(x.v.dtype), state

    def _system(self) -> tuple[Tensor, Tensor]:
        """dt (Hkv, Dv, 1) float32 and A (Hkv, Dv, M) complex64."""
        drift = self.frequency.float()
        width, modes = drift.shape[1:]
        start = torch.linspace(math.log(1e-3), math.log(1e-1), width, device=drift.device)
        step = (start + self.log_step.float()).exp()[..., None]
        turns = math.pi * torch.arange(modes, device=drift.device)
        return step, torch.complex(-self.log_rate.float().exp(), turns + drift)

    def _filtered(self, x: Tokens, read: Tensor) -> tuple[Tensor, State | None]:
        """(B, H', n, Dv) float32 of weights C (directions, H', Dv, M, 2), H' a multiple of Hkv."""
        step, pole = self._system()
        written = (torch.exp(step * pole) - 1) / pole
        group = read.shape[1] // written.shape[0]
        weights = torch.view_as_complex(read.float()) * written.repeat_interleave(group, 0)
        given = (step * pole.real, step * pole.imag)
        ahead, *back = torch.view_as_real(weights)
        out, state = run(self.spec, x, x.v.float(), *given, ahead)
        for later in back:
            y = turned(x)
            behind, _ = run(self.spec, y, y.v.float(), *given, later)
            out = out + one_late(behind, y).flip(2)
        return out, state

    def fit(self, x: Tokens, target: torch.Tensor) -> None:
        """C and D by least squares, one system a channel and key/value head."""
        assert isinstance(self.options, S4dOptions)
        if self.published:
            return
        group, shape = self.site.heads.group, self.read.shape
        gram, right = torch.zeros(()).double(), torch.zeros(()).double()
        for b in range(x.batch):
            y, wanted = x.rows(slice(b, b + 1)), target[b]
            if y.valid is not None:
                wanted = wanted * y.valid[0, :, None]
            rows = self._responses(y).double()
            wanted = torch.unflatten(wanted, 0, (-1, group)).permute(0, 3, 2, 1).double()
            gram, right = gram + rows.mT @ rows, right + rows.mT @ wanted
        size = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).sqrt()[..., None]
        gram = gram / (size * size.mT)
        gram.diagonal(dim1=-2, dim2=-1).add_(self.options.ridge)
        solved = torch.linalg.solve(gram, right / size) / size
        solved = solved.permute(0, 3, 1, 2).flatten(0, 1)  # (H, Dv, unknowns)
        with torch.no_grad():
            self.skip.copy_(solved[..., -1])
            read = torch.unflatten(solved[..., :-1], -1, (shape[0], *shape[3:]))
            self.read.copy_(read.movedim(2, 0))

    def _responses(self, x: Tokens) -> Tensor:
        """(Hkv, Dv, n, unknowns) for one row: what C = 1 or i in one mode gives, and v itself."""
        directions, _, width, modes, _ = self.read.shape
        unit = torch.eye(2 * modes).view(2 * modes, 1, modes, 2).expand(-1, width, -1, -1)
        unit = unit.repeat(self.site.heads.key_value, 1, 1, 1)
        parts = []
        for d in range(directions):
            read = unit.new_zeros(directions, *unit.shape)
            read[d] = unit
            out = torch.unflatten(self._filtered(x, read)[0][0], 0, (-1, 2 * modes))
            parts.append(out.permute(0, 3, 2, 1))  # (Hkv, Dv, n, 2M)
        own = x.v[0].float() if x.valid is None else x.v[0].float() * x.valid[0, :, None]
        return torch.cat((*parts, own.transpose(1, 2)[..., None]), -1)
