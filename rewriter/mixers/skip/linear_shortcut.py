"""linear_shortcut: attention as one linear map of each token alone (catalogue linear_jump).

o_t = W x_t + b, with x_t what the projections read. Some layers move so little between tokens that
a map fitted by least squares does most of what they do. `fit` solves for W and b in float64 with a
small ridge; before it the map is 0. Nothing is carried between tokens but their number, and no mask
matters, since no token sees another. Attention that does move things is lost: look at the gap.
"""

from __future__ import annotations

import sympy
import torch
from pydantic import Field

from rewriter.ir.site import AttentionSite
from rewriter.ir.state import BATCH, HEADS, HIDDEN, TOKENS, VALUE_DIM, State, StateSpec, StateTensor
from rewriter.mixers.base import Mixer, MixerInfo, MixerOptions
from rewriter.mixers.shared.gates import TokenGate, per_head, per_token
from rewriter.mixers.tokens import Tokens

COUNT = StateSpec((StateTensor("seen", (BATCH,), "int64"),))


class LinearShortcutOptions(MixerOptions):
    """`ridge`: added to the diagonal, relative to its mean, when W is fitted."""

    ridge: float = Field(default=1e-3, ge=0)


class LinearShortcut(Mixer):
    info = MixerInfo(
        name="linear_shortcut",
        family="skip",
        tier="distilled",
        summary="attention replaced by a fitted linear map of each token; no state",
        maths="o_t = W x_t + b, W = argmin sum |W x_t + b - teacher_t|^2",
        source="linear_jump (Jump to Conclusions), at the attention core",
        directions=frozenset({"causal", "bidirectional"}),
    )
    Options = LinearShortcutOptions
    needs_hidden = True
    averages = False
    reads_keys = False

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        super().__init__(site, options, layer)
        out = site.heads.query * site.heads.value_dim
        self.map = TokenGate(site.hidden_dim, out, 0.0, fitted=True)

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        return COUNT

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        return 2 * BATCH * TOKENS * HIDDEN * HEADS * VALUE_DIM

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        out = per_head(self.map(x.stream), self.site.heads.query).to(x.v.dtype)
        return x.shown(out), counted(x)

    def fit(self, x: Tokens, target: torch.Tensor) -> None:
        """Least squares over the valid tokens of x."""
        assert isinstance(self.options, LinearShortcutOptions)
        rows, wanted = x.stream.double(), per_token(target).double()
        if x.valid is not None:
            rows, wanted = rows[x.valid], wanted[x.valid]
        rows, wanted = rows.reshape(-1, rows.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        rows_mean, wanted_mean = rows.mean(0), wanted.mean(0)
        rows, wanted = rows - rows_mean, wanted - wanted_mean
        gram = rows.T @ rows
        ridge = self.options.ridge * gram.diagonal().mean().clamp_min(1e-12)
        gram.diagonal().add_(ridge)
        weight = torch.linalg.solve(gram, rows.T @ wanted).T
        with torch.no_grad():
            self.map.weight.copy_(weight)
            self.map.bias.copy_(wanted_mean - weight @ rows_mean)


def counted(x: Tokens) -> State | None:
    """The state after the tokens of a mixer that only counts them."""
    return None if x.state is None else {"seen": x.state["seen"] + x.count}
