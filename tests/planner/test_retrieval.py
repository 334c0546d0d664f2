"""Head scores: known heads written down, and a model's own attention weights as the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_models import small_llama
from torch import nn

from rewriter.api import inspect
from rewriter.errors import UsageError
from rewriter.ir.mask import Causal, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Source
from rewriter.passes.examples import examples_for
from rewriter.planner.retrieval import HeadScores, _scores, head_scores


def test_an_echo_head_and_an_induction_head() -> None:
    period, repeats = 6, 3
    text = torch.cat((torch.tensor([6]), torch.arange(6).repeat(repeats)))
    own = 30.0 * F.one_hot(text, 8).float()
    before = F.pad(own[:-1], (0, 0, 1, 0))
    site = AttentionSite(
        fqn="a",
        index=0,
        heads=HeadGroups(4, 2, 8, 8),
        score=(Scale(1.0),),
        terms=(),
        mask=Mask((Causal(),)),
        spelling="sdpa",
        source=Source("a"),
    )
    # Head 0 echoes, head 1 looks nowhere; of the other group head 2 does induction, head 3 nothing.
    q = torch.stack((own, torch.zeros_like(own), own, torch.zeros_like(own)))
    k = torch.stack((own, before))
    echo, induction = _scores(q, k, site, period)
    # With m earlier copies an echo head gives them m / (m + 1), its own token the rest.
    assert float(echo[0]) == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-6)
    assert float(induction[1]) == pytest.approx(1.0, abs=1e-6)
    assert float(induction[0]) < 0.2 and float(echo[1]) < 0.2


def test_the_best_shares_are_chosen_over_all_layers() -> None:
    echo = {0: torch.tensor([0.9, 0.1]), 1: torch.tensor([0.2, 0.3])}
    induction = {0: torch.tensor([0.1, 0.2]), 1: torch.tensor([0.7, 0.6])}
    scores = HeadScores(echo, induction)
    assert scores.chosen(0.25, 0.5) == {0: (0,), 1: (0, 1)}
    assert scores.chosen(0.25, 0.25) == {0: (0,), 1: (0,)}
    assert scores.chosen(0.0, 0.0) == {0: (), 1: ()}


class TwoBlocks(nn.Module):
    """One module with two causal blocks, called with tokens, twice in a forward or once."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.words, self.runs = nn.Embedding(23, 16), runs
        self.both = Both()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.words(input_ids)
        for _ in range(self.runs):
            x = self.both(x)
        return x


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 48), nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for project in (self.first, self.second):
            q, k, v = project(x).unflatten(-1, (3, 2, 8)).movedim(2, 0).transpose(2, 3)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out.transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("runs", [1, 2])
def test_each_block_of_a_module_has_its_own_scores(runs: int) -> None:
    torch.manual_seed(0)
    model = TwoBlocks(runs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    ids = torch.randint(0, 23, (2, 9))
    given = examples_for(model, {"input_ids": ids})
    examples = dataclasses.replace(given, tokens="input_ids", vocabulary=23)
    sites = inspect(model, {"input_ids": ids}).sites
    assert [(s.fqn, s.slot, s.run) for s in sites] == [
        ("both", slot, run) for run in range(runs) for slot in range(2)
    ]
    scores = head_scores(model, sites, period=9, repeats=3, examples=examples)
    assert set(scores.echo) == set(scores.chosen()) == {s.index for s in sites}
    assert not torch.equal(scores.echo[0], scores.echo[1])
    if runs == 2:  # the runs share a mixer
        assert torch.equal(scores.echo[0], scores.echo[2])
        once = TwoBlocks(1).eval()
        once.load_state_dict(model.state_dict())
        sites = inspect(once, {"input_ids": ids}).sites
        first = head_scores(once, sites, period=9, repeats=3, examples=examples)
        assert bool((scores.induction[1] >= first.induction[1]).all())


@pytest.mark.nightly  # tracing
def test_scores_are_those_of_the_models_own_weights() -> None:
    model = small_llama(vocab_size=41, attn_implementation="eager", initializer_range=0.3)
    sites = inspect(model).sites
    scores = head_scores(model, sites, period=9, repeats=3)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 41, (1, 9), generator=generator)
    first = torch.randint(0, 41, (1, 1), generator=generator)
    with torch.no_grad():
        ids = torch.cat((first, text.repeat(1, 3)), 1)
        weights = model(ids, output_attentions=True).attentions
    for site, layer in zip(sites, weights, strict=True):
        for found, shift in ((scores.echo, 0), (scores.induction, 1)):
            rows = []
            for i in range(10, 28):
                copies = [j for j in range(1, i + 1) if j < i + shift and (i + shift - j) % 9 == 0]
                rows.append(layer[0, :, i, copies].sum(-1))
            wanted = torch.stack(rows).mean(0).unflatten(0, (2, 2)).amax(1)
            torch.testing.assert_close(found[site.index].float(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="causal attention"):
        head_scores(model, [])
