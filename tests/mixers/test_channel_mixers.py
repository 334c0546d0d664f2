"""Structured projections against their definitions: optimal errors, entry formula, limits."""

from __future__ import annotations

import pytest
import torch

from rewriter.mixers.channel import registry
from rewriter.mixers.channel.base import DAMPING, Dense, Projection
from rewriter.mixers.channel.lowrank_mlp import LowRankMlp
from rewriter.mixers.channel.monarch_mlp import Monarch, MonarchMlp

BOTH = (LowRankMlp, MonarchMlp)


def problem(outputs=24, inputs=16, seed=0):
    """A weight, uneven activations, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.linspace(0.02, 3, inputs)
    x = torch.randn(4096, inputs, generator=generator) @ mix
    return weight, x, x.mT @ x / len(x)


def relative(core, weight, x):
    with torch.no_grad():
        return float((core(x) - x @ weight.mT).norm() / (x @ weight.mT).norm())


def test_names_are_registered():
    assert registry.names() == ("lowrank_mlp", "monarch_mlp")
    assert registry.get("lowrank_mlp") is LowRankMlp


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_low_rank_reaches_the_bound_of_eckart_and_young(rank):
    weight, _, moment = problem()
    core = LowRankMlp.structure(24, 16, {"rank": rank})
    core.fit(Dense(weight, moment))
    level = moment.diagonal().mean().double()
    damped = moment.double() + DAMPING * level * torch.eye(16)
    factor = torch.linalg.cholesky(damped)
    values = torch.linalg.svdvals(weight.double() @ factor).square()
    error = ((core.dense().detach().double() - weight.double()) @ factor).norm()
    assert float(error) == pytest.approx(float(values[rank:].sum().sqrt()), rel=1e-4)


def test_weighting_by_activations_beats_the_plain_factorisation():
    weight, x, moment = problem()
    errors = []
    for weighting in ("full", "diagonal", "none"):
        options = LowRankMlp.Options(ratio=0.6, weighting=weighting)
        dense = LowRankMlp.prepare(options, Dense(weight, moment))
        core = LowRankMlp.structure(24, 16, LowRankMlp.sizes(options, dense))
        core.fit(dense)
        errors.append(relative(core, weight, x))
    assert errors == sorted(errors)


def test_energy_chooses_the_smallest_rank_that_keeps_it():
    weight, _, moment = problem()
    options = LowRankMlp.Options(energy=0.9)
    dense = LowRankMlp.prepare(options, Dense(weight, moment))
    rank = LowRankMlp.sizes(options, dense)["rank"]
    level = moment.diagonal().mean().double()
    factor = torch.linalg.cholesky(moment.double() + DAMPING * level * torch.eye(16))
    values = torch.linalg.svdvals(weight.double() @ factor).square()
    kept = values.cumsum(0) / values.sum()
    assert kept[rank - 1] >= 0.9
    assert rank == 1 or kept[rank - 2] < 0.9


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(24, 16, 5), (6, 40, 3), (64, 9, 9)])
def test_low_rank_is_its_product(outputs, inputs, rank, agree):
    core = LowRankMlp.structure(outputs, inputs, {"rank": rank})
    generator = torch.Generator().manual_seed(rank)
    for parameter in core.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, 5, inputs, generator=generator, requires_grad=True)
    matrix = core.left.double() @ core.right.double()
    agree.both("lowrank_mlp", core(x), x.double() @ matrix.mT, (x, core.left, core.right))


@pytest.mark.parametrize(
    ("inner", "outer", "rank", "seed"), [(2, 5, 1, 0), (3, 2, 2, 1), (4, 5, 3, 2), (4, 2, 3, 3)]
)
def test_monarch_is_its_entry_formula(inner, outer, rank, seed, agree):
    generator = torch.Generator().manual_seed(seed)
    p, s = 3, 4
    core = Monarch(outer * s, inner * p, inner, outer, rank)
    for parameter in core.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    left, right = core.left.double(), core.right.double()
    expected = torch.zeros(outer * s, inner * p, dtype=torch.float64)
    for group in range(outer):
        for block in range(inner):
            for b in range(rank):
                column = left[group, :, block * rank + b]
                row = right[block, b * outer + group]
                part = expected[group::outer, block * p : (block + 1) * p]
                part += column[:, None] * row[None, :]
    agree.outputs("monarch_mlp", core.dense(), expected)
    x = torch.randn(2, 5, inner * p, generator=generator, requires_grad=True)
    agree.both("monarch_mlp", core(x), x.double() @ expected.mT, (x, core.left, core.right))


def test_monarch_projection_loses_the_tails_of_the_slices():
    weight, _, _ = problem(outputs=24, inputs=16)
    core = Monarch(24, 16, 4, 6, 2)
    core.fit(Dense(weight))
    slices = weight.double().reshape(4, 6, 4, 4).permute(1, 2, 0, 3)
    lost = torch.linalg.svdvals(slices)[..., 2:].square().sum().sqrt()
    error = (core.dense().detach().double() - weight.double()).norm()
    assert float(error) == pytest.approx(float(lost), rel=1e-5)


@pytest.mark.parametrize("mixer", BOTH)
def test_full_size_is_the_matrix_and_gradients_flow(mixer):
    weight, x, moment = problem(30, 18)
    core = mixer.structure(30, 18, mixer.full(30, 18))
    core.fit(Dense(weight, moment))
    torch.testing.assert_close(core.dense().detach(), weight, atol=1e-4, rtol=1e-4)
    core(x[:3]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in core.parameters())


@pytest.mark.parametrize("mixer", BOTH)
def test_ratio_bounds_the_parameters(mixer):
    weight, _, _ = problem(96, 64)
    sizes = mixer.sizes(mixer.Options(ratio=0.5), Dense(weight))
    core = mixer.structure(96, 64, sizes)
    assert sum(p.numel() for p in core.parameters()) <= 0.5 * weight.numel()


@pytest.mark.parametrize("stored", [(24, 16), (24, 16, 1, 1)])
def test_a_projection_stands_where_a_linear_or_a_convolution_stood(stored):
    weight, _, _ = problem()
    core = LowRankMlp.structure(24, 16, LowRankMlp.full(24, 16))
    core.fit(Dense(weight))
    bias = torch.nn.Parameter(torch.randn(24))
    channel = -1 if len(stored) == 2 else -3
    new = Projection(core, bias, channel, torch.Size(stored), False)
    torch.testing.assert_close(new.weight.detach(), weight.reshape(stored), atol=1e-4, rtol=1e-4)
    if channel == -1:
        x = torch.randn(2, 5, 16)
        wanted = torch.nn.functional.linear(x, weight, bias)
    else:
        x = torch.randn(2, 16, 3, 4)
        wanted = torch.nn.functional.conv2d(x, weight.reshape(stored), bias)
    torch.testing.assert_close(new(x), wanted, atol=1e-4, rtol=1e-4)
