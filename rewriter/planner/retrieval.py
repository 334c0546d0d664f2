"""Which heads retrieve: attention on a random text that is repeated, for `razor` and `duo`.

The text has no meaning, so a head that looks from a token at an earlier copy of it ('echo'), or at
what followed that copy ('induction'), looks things up. Catalogue: sparse.md, razor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import UsageError
from rewriter.evaluate.scoring import evaluating
from rewriter.ir.site import AttentionSite
from rewriter.mixers.placed import core_at
from rewriter.passes.examples import Examples, examples_for
from rewriter.passes.realise import Target, realise, share_parameters

ECHO, INDUCTION = 0.01, 0.14  # shares of heads that RazorAttention protects
_ROWS = 256  # queries whose scores are held at once


@dataclass(frozen=True)
class HeadScores:
    """Scores of the key/value heads of every site, the largest of the query heads of each.

    Attributes:
        echo: by the site's index, (Hkv,) mean attention to all earlier copies of a token. The runs
            of a module that runs several times share their mixer, and the largest score of any.
        induction: the same to the tokens behind these copies.
    """

    echo: Mapping[int, Tensor]
    induction: Mapping[int, Tensor]

    def chosen(
        self, echo: float = ECHO, induction: float = INDUCTION
    ) -> dict[int, tuple[int, ...]]:
        """By the site's index, the heads among the best share of either score over all sites.

        A share above 0 chooses at least one head.
        """
        best = _best(self.echo, echo) | _best(self.induction, induction)
        return {site: tuple(sorted(head for at, head in best if at == site)) for site in self.echo}


def head_scores(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    *,
    period: int = 500,
    repeats: int = 4,
    seed: int = 0,
    examples: Examples | None = None,
) -> HeadScores:
    """Measure causal self-attention sites on `repeats` copies of `period` random tokens.

    RazorAttention uses 2,500 tokens four times; a shorter text costs less and ranks much alike.

    Raises:
        UsageError: the model takes no tokens, or there is no causal site.
    """
    causal = [s for s in sites if s.kind == "causal" and not s.cross]
    examples = examples_for(model) if examples is None else examples
    if not causal or not examples.vocabulary:
        raise UsageError("head scores need a model of tokens with causal attention")
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, examples.vocabulary, (1, period), generator=generator)
    first = torch.randint(0, examples.vocabulary, (1, 1), generator=generator)
    ids = torch.cat((first, text.repeat(1, repeats)), 1)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    runs: dict[tuple[str, str], list[AttentionSite]] = {}
    for site in causal:
        runs.setdefault((site.fqn, site.core), []).append(site)

    def watch(sites: Sequence[AttentionSite]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            q, k = args[:2]
            scores = _scores(q[0], k[0], sites[0], period)
            for at in (site.index for site in sites):
                echo, induction = seen.get(at, scores)
                seen[at] = echo.maximum(scores[0]), induction.maximum(scores[1])

        return hook

    watched = realise(share_parameters(model), [Target(s, "keep", {}) for s in causal], examples)
    with ExitStack() as stack, evaluating(watched):
        for (fqn, _), sites in runs.items():
            core = core_at(watched.get_submodule(fqn), sites[0])
            stack.callback(core.register_forward_hook(watch(sites)).remove)
        watched(**examples.with_tokens(ids))
    return HeadScores(
        {at: echo for at, (echo, _) in seen.items()},
        {at: induction for at, (_, induction) in seen.items()},
    )


def _scores(q: Tensor, k: Tensor, site: AttentionSite, period: int) -> tuple[Tensor, Tensor]:
    """Echo and induction score of each key/value head; q (H, n, Dk), k (Hkv, n, Dk)."""
    n, group = q.shape[1], site.heads.group
    keys = k.repeat_interleave(group, 0).float()
    totals = torch.zeros(2, q.shape[0], dtype=torch.float64)
    at = torch.arange(n)
    for start in range(period + 1, n, _ROWS):
        rows = at[start : start + _ROWS]
        scores = q[:, rows].float() @ keys.mT * site.scale
        if site.softcap is not None:
            scores = site.softcap * torch.tanh(scores / site.softcap)
        weights = scores.masked_fill(at > rows[:, None], -math.inf).softmax(-1)
        for shift in (0, 1):
            # Earlier copies of token i lie whole periods before it; what followed one, a step on.
            back = rows[:, None] + shift - at
            there = (back > shift) & (back % period == 0) & (at > 0)
            totals[shift] += (weights * there).sum((-1, -2)).double()
    means = torch.unflatten(totals / (n - period - 1), 1, (-1, group)).amax(-1)
    return means[0], means[1]


def _best(scores: Mapping[int, Tensor], share: float) -> set[tuple[int, int]]:
    """(site, head) of the best share of all heads."""
    rated = [(float(x), at, head) for at, of in scores.items() for head, x in enumerate(of)]
    rated.sort(reverse=True)
    return {(at, head) for _, at, head in rated[: math.ceil(share * len(rated))]}
