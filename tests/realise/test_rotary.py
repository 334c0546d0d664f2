"""Which sums of a graph are rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter.passes.realise.rotary import rotations


def halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def from_the_end(x: Tensor) -> Tensor:
    return torch.cat((-x[..., -4:], x[..., :4]), dim=3)


def chunks(x: Tensor) -> Tensor:
    one, two = x.narrow(-1, 0, 4), x.narrow(-1, 4, 4)
    return torch.cat((-two, one), -1)


Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
SAME: dict[str, Formula] = {
    "plain": lambda x, c, s: x * c + halves(x) * s,
    "other order": lambda x, c, s: s * halves(x) + c * x,
    "negative start": lambda x, c, s: x * c + from_the_end(x) * s,
    "narrow": lambda x, c, s: x * c + chunks(x) * s,
    "part of the channels": lambda x, c, s: (y := x[..., :4]) * c[..., :4] + halves(y) * s[..., :4],
}
OTHER: dict[str, Formula] = {
    "the other half negated": lambda x, c, s: x * c + torch.cat((x[..., 4:], -x[..., :4]), -1) * s,
    "halves in order": lambda x, c, s: x * c + torch.cat((-x[..., :4], x[..., 4:]), -1) * s,
    "uneven": lambda x, c, s: x * c + torch.cat((-x[..., 3:], x[..., :3]), -1) * s,
    "every other": lambda x, c, s: x * c + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * s,
    "another tensor": lambda x, c, s: (x + 1) * c + halves(x) * s,
    "weighted": lambda x, c, s: torch.add(x * c, halves(x) * s, alpha=2),
    "difference": lambda x, c, s: x * c - halves(x) * s,
    "wider tables": lambda x, c, s: x * c.double() + halves(x) * s.double(),
    "along the tokens": lambda x, c, s: x * c + torch.cat((-x[:, :, 4:], x[:, :, :4]), 2) * s,
}


def found(formula: Formula) -> int:
    class Model(nn.Module):
        def forward(self, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
            return formula(x, c, s)

    x, table = torch.randn(2, 3, 8, 8), torch.randn(1, 1, 8, 8)
    graph = torch.export.export(Model(), (x, table, table.clone())).graph
    return len(rotations(graph.nodes))


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_one_embedding(name: str) -> None:
    assert found(SAME[name]) == 1


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_embedding(name: str) -> None:
    assert found(OTHER[name]) == 0
