"""The interface of a sequence mixer: what a site is rewritten to.

A mixer is the `core` of a re-emitted attention module. The emitted code calls it as

    out, probabilities = self.core(
        q, k, v, terms, cache=cache, need_weights=False, hidden=hidden
    )

with q (B, H, n, Dk), k (B, Hkv, n, Dk), v (B, Hkv, n, Dv) for the n new tokens, `terms` the
run-time mask and bias tensors of the site (each a tensor or None), `cache` the transformers
cache object or None, and `hidden` (B, n, Dm) what the projections read, or None where it was not
identified. `Mixer.forward` turns these into the `Tokens` that `mix` gets, which is all that a
mechanism implements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import sympy
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from rewriter import generation
from rewriter.errors import UnsupportedError
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import TOKENS, State, StateSpec
from rewriter.mixers import terms as site_terms
from rewriter.mixers.tokens import Tokens

Tier = Literal["exact", "approximate", "distilled"]
Terms = Sequence[torch.Tensor | None]


class MixerOptions(BaseModel):
    """Options of a mixer: immutable, validated, unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class MixerInfo:
    """What `rewriter mixers` prints.

    Attributes:
        name: the name used in policies and plans.
        family: folder of the catalogue.
        tier: exact, approximate (no training needed) or distilled (must learn).
        summary: one line.
        maths: the formula, plain text.
        source: paper or catalogue id.
        directions: which sites it serves.
        cross: serves queries of one sequence over keys of another.
    """

    name: str
    family: str
    tier: Tier
    summary: str
    maths: str
    source: str
    directions: frozenset[Literal["causal", "bidirectional"]]
    cross: bool = False


class Mixer(nn.Module):
    """Base of all mixers. New parameters of a mixer are its own, so their keys read `core.*`.

    Class attributes:
        info: description.
        Options: validated options.
        branches: names of the parts that can be switched off for ablation (contract 9).
        provides_weights: `forward` can return attention weights (only exact mixers can).
        needs_hidden: `mix` reads `Tokens.hidden`; sites that do not know it are refused.
        averages: an output is a weighted mean of values, so one token alone gives its own value.
        reads_keys: outputs depend on keys and values at all.
        silent: the output is 0 whatever it is given, so that the projections around the core need
            not run.
        rates: learning rates of own parameters relative to the stage's, by name, where not 1; any
            module inside a mixer may have them too.
    """

    info: ClassVar[MixerInfo]
    Options: ClassVar[type[MixerOptions]]
    branches: ClassVar[tuple[str, ...]] = ()
    provides_weights: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    averages: ClassVar[bool] = True
    reads_keys: ClassVar[bool] = True
    silent: ClassVar[bool] = False
    rates: Mapping[str, float] = MappingProxyType({})

    def __init__(self, site: AttentionSite, options: MixerOptions, layer: int | None = None):
        """Args: the site, validated options, and the layer's index in the cache, if it has one."""
        super().__init__()
        self.site = site
        self.options = options
        self.layer = layer
        self.disabled: frozenset[str] = frozenset()

    @classmethod
    def refuse(cls, site: AttentionSite, options: MixerOptions) -> str | None:
        """Why this mixer cannot serve the site, as one sentence, or None if it can."""
        if site.mask.opaque is not None:
            return f"the mask is opaque ({site.mask.opaque})"
        if site.mask.given:
            return f"{cls.info.name} has no form for a mask that each call brings (documents)"
        if site.kind not in cls.info.directions:
            return f"{cls.info.name} has no {site.kind} form"
        if site.cross and not cls.info.cross:
            return f"{cls.info.name} has no form for cross attention"
        if site.sinks:
            return f"{cls.info.name} has no form for a learned sink in the softmax"
        if site.temperature is not None:
            return f"{cls.info.name} has no form for a learned temperature of the scores"
        if cls.info.tier != "distilled" and site.normaliser != "softmax":
            return f"{cls.info.name} computes a softmax, and this block a {site.normaliser}"
        if cls.needs_hidden and not site.hidden_dim:
            return (
                f"{cls.info.name} reads what the projections read, and query, key and value of "
                "this block do not come from one tensor (cross attention, or added positions)"
            )
        return None

    @classmethod
    def state_spec(cls, site: AttentionSite, options: MixerOptions) -> StateSpec:
        """What it carries between tokens (causal sites)."""
        raise NotImplementedError

    @classmethod
    def flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """Multiply-adds times two of the core for B rows of N tokens, over the state symbols."""
        raise NotImplementedError

    @classmethod
    def step_flops(cls, site: AttentionSite, options: MixerOptions) -> sympy.Expr:
        """The same of one new token in each of B rows, the last of N."""
        whole = cls.flops(site, options)
        return sympy.expand(whole - whole.subs(TOKENS, TOKENS - 1))

    @classmethod
    def limit_options(cls, options: MixerOptions, tokens: int) -> MixerOptions | None:
        """Options under which it is full softmax attention up to `tokens` tokens, or None."""
        return None

    def test_length(self) -> int:
        """A length at which every part of the mechanism is at work (for the run-time contracts)."""
        return 48

    def mix(self, x: Tokens) -> tuple[torch.Tensor, State | None]:
        """Mix n new tokens after those in `x.state`.

        Returns:
            (B, H, n, Dv) in the dtype of v, and the new state (None if none was given).
        """
        raise NotImplementedError

    def attention_rows(self, x: Tokens, queries: slice) -> torch.Tensor:
        """Its own normalised attention weights of some queries, for losses on them.

        Args:
            x: tokens from the start of a sequence, with x.state None.
            queries: which of them, with a start and a stop.

        Returns:
            (B, H, queries, n) float32 that can be differentiated; rows sum to 1, and those of
            padding are 0.

        Raises:
            UnsupportedError: it has no weights to state.
        """
        raise UnsupportedError(
            f"'{self.site.fqn}': {self.info.name} does not state its attention weights, so it "
            "cannot learn from the teacher's; leave out 'attention' of the stage 'layers'"
        )

    @property
    def takes_data(self) -> bool:
        """Whether `fit` has anything to set; a forward for it is run only then."""
        return type(self).fit is not Mixer.fit

    def fit(self, x: Tokens, target: torch.Tensor) -> None:
        """Move the start nearer to the original: what it gives for tokens x is `target`.

        Called at most once, before any training, with x.state None and target (B, H, n, Dv). A
        mixer that has nothing to set from data ignores it.
        """

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: Terms = (),
        cache: Any = None,
        need_weights: bool = False,
        hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Called by the emitted module.

        Returns:
            (B, H, n, Dv), and the attention weights where a mixer has them and they are wanted.

        Raises:
            UnsupportedError: the cache or a mask cannot be served.
        """
        batch, new = q.shape[0], q.shape[-2]
        if self.needs_hidden and hidden is None:
            raise UnsupportedError(
                f"'{self.site.fqn}': {self.info.name} needs the input of the projections, which "
                "this call does not hand to the core; keep this layer's original attention"
            )
        if cache is None or self.site.kind == "bidirectional":
            return self.mix(self.tokens(q, k, v, terms, hidden))[0], None
        refusal = self.stateless()
        if refusal is not None or self.layer is None:
            known = "its place in the cache is not known"
            raise UnsupportedError(
                f"'{self.site.fqn}' was called with a cache, but {refusal or known}; call the "
                "model with use_cache=False"
            )
        layer = generation.layer_of(cache, self.layer, self._spec)
        split = site_terms.split(self.site, terms, layer.seen, new).of_batch(batch)
        state = layer.load(self.site, batch, v.dtype, v.device)
        out, after = self.mix(Tokens(q, k, v, hidden, split.valid, split.bias, state))
        if after is not None:
            layer.store(after, new)
        return out, None

    def tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: Terms = (),
        hidden: torch.Tensor | None = None,
    ) -> Tokens:
        """The arguments of a call without a cache, as `mix` gets them."""
        split = site_terms.split(self.site, terms, 0, q.shape[-2]).of_batch(q.shape[0])
        return Tokens(q, k, v, hidden, split.valid, split.bias)

    def stateless(self) -> str | None:
        """Why no state can be kept between the calls of a decoder, or None."""
        if self.site.kind == "causal" and self.site.runs > 1:
            return (
                f"the module runs {self.site.runs} times for each token and its one mixer has no "
                "state for each of them"
            )
        return None

    @cached_property
    def _spec(self) -> StateSpec:
        return self.state_spec(self.site, self.options)

    @contextmanager
    def without(self, branch: str) -> Iterator[None]:
        """Switch one branch off inside the context (branch ablation, contract 9)."""
        if branch not in self.branches:
            raise ValueError(f"{self.info.name} has no branch '{branch}'")
        before = self.disabled
        self.disabled = before | {branch}
        try:
            yield
        finally:
            self.disabled = before
