"""What each site loses by each candidate, cheapest measurement first.

    gap      distance of the candidate's output from the original's, on the original's own inputs
    swap     the site alone gets the candidate, all others stay: KL and copy loss
    restore  all sites get the candidate, the site alone stays: what that saves

Swaps and restores disagree: a layer that is harmless alone can matter once others are gone. Copy
loss stands beside KL, since text hardly notices that a model cannot look back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import UsageError
from rewriter.evaluate.quality import copy_rows
from rewriter.evaluate.scoring import evaluating, logits_of, token_losses
from rewriter.ir.site import AttentionSite
from rewriter.passes.examples import Examples
from rewriter.planner.attention_statistics import (
    HeadStatistics,
    block_similarities,
    head_statistics,
    windows_of,
)
from rewriter.planner.objective import Probes
from rewriter.planner.space import Candidate, SearchSpace, open_space

Note = Callable[[str], None]


@dataclass(frozen=True)
class Effect:
    """Against the original, in nats a token.

    Attributes:
        kl: KL(original || changed) on the text between passage and repeat.
        copy: loss on the repeat above that of the original.
    """

    kl: float
    copy: float


@dataclass(frozen=True)
class SiteSensitivity:
    """All that was measured at one site; maps are by the label of the candidate.

    Attributes:
        similarity: cosine of the residual stream before and after this attention, or None.
        heads: statistics of each query head; empty where the scores have a bias.
        gap: relative distance of the core's output; `head_gap` the same for each query head.
        swap, restore: see the module.
        head_swap: the candidate's window in one key/value head alone, where it was asked for.
    """

    index: int
    fqn: str
    similarity: float | None
    heads: tuple[HeadStatistics, ...]
    gap: dict[str, float] = field(default_factory=dict)
    head_gap: dict[str, tuple[float, ...]] = field(default_factory=dict)
    swap: dict[str, Effect] = field(default_factory=dict)
    restore: dict[str, Effect] = field(default_factory=dict)
    head_swap: tuple[Effect, ...] = ()


@dataclass(frozen=True)
class Sensitivities:
    """Of all sites, and of every candidate in all sites at once."""

    sites: tuple[SiteSensitivity, ...]
    everywhere: dict[str, Effect]
    copy_loss: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sensitivities(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    candidates: Sequence[Candidate],
    stream: Tensor,
    *,
    rows: int = 2,
    probes: Probes | None = None,
    swaps: bool = True,
    heads: bool = False,
    examples: Examples | None = None,
    note: Note = lambda text: None,
) -> Sensitivities:
    """Measure every site against every candidate.

    Args:
        candidates: what sites may become; the original attention is added.
        stream: (tokens,) int64 calibration text.
        rows: probes; each one costs a forward per swap and per restore.
        swaps: measure whole models; else only statistics and gaps, for one forward each.
        heads: also windows in single key/value heads.

    Raises:
        UsageError: no candidate, or `heads` without a window among the candidates.
        NoSiteError: the candidates refuse every site.
    """
    if not candidates:
        raise UsageError("name at least one candidate to measure the sites against")
    window, sinks = windows_of([c.options for c in candidates])
    single = _single_heads(sites, window, max(sinks, 1)) if heads else []
    space = open_space(model, sites, [Candidate("keep"), *candidates, *single], examples)
    probe = probes or Probes()
    gap = sum(probe.gap) // 2
    texts = copy_rows(stream, rows, probe.passage, gap, seed=0)
    with evaluating(space.model):
        statistics, gaps = _observed(space, texts[:1], probe.passage, window, sinks, single)
        similar = block_similarities(space.model, space, texts[:1])
        scale = _Scale(space, texts, probe, gap)
        found = _Effects(space, scale, candidates, single, note) if swaps else None
        whole = [
            SiteSensitivity(
                index=site.index,
                fqn=site.fqn,
                similarity=similar[n],
                heads=tuple(statistics[n]),
                gap={label: g[0] for label, g in gaps[n].items()},
                head_gap={label: g[1] for label, g in gaps[n].items()},
                swap={} if found is None else found.swap[n],
                restore={} if found is None else found.restore[n],
                head_swap=() if found is None or not heads else found.heads(n),
            )
            for n, site in enumerate(space.sites)
        ]
    everywhere = {} if found is None else found.everywhere
    return Sensitivities(tuple(whole), everywhere, scale.copy)


def label_of(candidate: Candidate) -> str:
    """'sink_window window=64 sinks=4'."""
    return " ".join([candidate.mixer, *(f"{k}={v}" for k, v in candidate.options.items())])


def _single_heads(sites: Sequence[AttentionSite], window: int, sinks: int) -> list[Candidate]:
    """`duo` with all key/value heads full but one, for each of them."""
    count = max(s.heads.key_value for s in sites)
    return [
        Candidate(
            "duo",
            {"full": [o for o in range(count) if o != head], "window": window, "sinks": sinks},
        )
        for head in range(count)
    ]


def _observed(
    space: SearchSpace,
    row: Tensor,
    passage: int,
    window: int,
    sinks: int,
    single: Sequence[Candidate],
) -> tuple[list[list[HeadStatistics]], list[dict[str, tuple[float, tuple[float, ...]]]]]:
    """Statistics and gaps of every site in one forward of the original."""
    statistics: list[list[HeadStatistics]] = [[] for _ in space.sites]
    gaps: list[dict[str, tuple[float, tuple[float, ...]]]] = [{} for _ in space.sites]

    def see(n: int, cores: Any, q: Any, k: Any, v: Any, terms: Any, hidden: Any) -> None:
        site = space.sites[n]
        if site.kind == "causal" and not site.has_bias and not site.cross:
            statistics[n] = head_statistics(site, q, k, passage, window, sinks)
        kept = _kept(space, n)
        true = cores.cores[kept](q, k, v, terms, hidden=hidden)[0].float()
        size = true.square().sum((0, 2, 3))
        for number, candidate in enumerate(space.candidates[n]):
            if number != kept and candidate not in single:
                other = cores.cores[number](q, k, v, terms, hidden=hidden)[0].float()
                apart = (other - true).square().sum((0, 2, 3))
                each = (apart / size.clamp_min(1e-30)).sqrt()
                overall = float((apart.sum() / size.sum().clamp_min(1e-30)).sqrt())
                gaps[n][label_of(candidate)] = (overall, tuple(map(float, each)))

    space.use([_kept(space, n) for n in range(len(space.sites))])
    with space.observed(see):
        logits_of(space.model, row)
    return statistics, gaps


def _kept(space: SearchSpace, n: int) -> int:
    return next(i for i, c in enumerate(space.candidates[n]) if c.mixer == "keep")


class _Scale:
    """Measures assignments against the original on the probes."""

    def __init__(self, space: SearchSpace, rows: Tensor, probe: Probes, gap: int):
        self.space, self.rows = space, rows
        self.text = slice(probe.passage + min(probe.skip, gap - 1) - 1, probe.passage + gap - 1)
        self.repeat = slice(probe.passage + gap + probe.skip - 1, None)
        space.use([_kept(space, n) for n in range(len(space.sites))])
        self.true: list[Tensor] = []
        losses = []
        for row in torch.split(rows, 1):
            logits = logits_of(space.model, row)
            self.true.append(logits[0, self.text].float().log_softmax(-1))
            losses.append(float(token_losses(logits, row)[0, self.repeat].mean()))
        self.copy = sum(losses) / len(losses)

    def __call__(self, picks: Sequence[int]) -> Effect:
        self.space.use(picks)
        kl, copy = 0.0, 0.0
        for row, true in zip(torch.split(self.rows, 1), self.true, strict=True):
            logits = logits_of(self.space.model, row)
            log = logits[0, self.text].float().log_softmax(-1)
            kl += float((true.exp() * (true - log)).sum(-1).mean())
            copy += float(token_losses(logits, row)[0, self.repeat].mean())
        count = len(self.true)
        return Effect(kl / count, copy / count - self.copy)


class _Effects:
    """Swaps and restores of all sites."""

    def __init__(
        self,
        space: SearchSpace,
        scale: _Scale,
        candidates: Sequence[Candidate],
        single: Sequence[Candidate],
        note: Note,
    ):
        self.space, self.scale, self.single = space, scale, single
        self.kept = [_kept(space, n) for n in range(len(space.sites))]
        labels = [label_of(c) for c in candidates]
        self.everywhere: dict[str, Effect] = {}
        self.swap: list[dict[str, Effect]] = [{} for _ in space.sites]
        self.restore: list[dict[str, Effect]] = [{} for _ in space.sites]
        for label in labels:
            changed = [self._place(n, label) for n in range(len(space.sites))]
            self.everywhere[label] = scale(changed)
            for n in range(len(space.sites)):
                if changed[n] == self.kept[n]:
                    continue  # the candidate refuses this site
                note(f"{label}: site {n + 1} of {len(space.sites)}")
                self.swap[n][label] = scale(self._with(self.kept, n, changed[n]))
                self.restore[n][label] = scale(self._with(changed, n, self.kept[n]))

    def heads(self, n: int) -> tuple[Effect, ...]:
        """Of the single heads of a site."""
        return tuple(
            self.scale(self._with(self.kept, n, i))
            for i, c in enumerate(self.space.candidates[n])
            if c in self.single
        )

    def _place(self, n: int, label: str) -> int:
        row = self.space.candidates[n]
        return next((i for i, c in enumerate(row) if label_of(c) == label), self.kept[n])

    @staticmethod
    def _with(picks: Sequence[int], n: int, pick: int) -> list[int]:
        out = list(picks)
        out[n] = pick
        return out
