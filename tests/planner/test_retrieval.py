"""Head scores: known heads written down, and a model's own attention weights as the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rewriter.api import inspect
from rewriter.errors import UsageError
from rewriter.ir.mask import Causal, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Source
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
    echo = {"a": torch.tensor([0.9, 0.1]), "b": torch.tensor([0.2, 0.3])}
    induction = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([0.7, 0.6])}
    scores = HeadScores(echo, induction)
    assert scores.chosen(0.25, 0.5) == {"a": (0,), "b": (0, 1)}
    assert scores.chosen(0.25, 0.25) == {"a": (0,), "b": (0,)}
    assert scores.chosen(0.0, 0.0) == {"a": (), "b": ()}


@pytest.mark.nightly  # tracing
def test_scores_are_those_of_the_models_own_weights() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
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
            torch.testing.assert_close(found[site.fqn].float(), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="causal attention"):
        head_scores(model, [])
