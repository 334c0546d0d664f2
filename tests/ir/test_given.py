"""Documents and groups are read off a mask tensor, and nothing else is taken for them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.ir.given import boundaries, labels_of
from rewriter.ir.mask import Atom, Causal, CausalOrGroup, Documents, KeyPadding, Mask, Window

STEPS = torch.arange(9)
I_, J_ = STEPS[:, None], STEPS[None, :]
numbers = st.lists(st.integers(0, 3), min_size=9, max_size=9)


def every(mask: torch.Tensor) -> torch.Tensor:
    return torch.ones(mask.shape[:1] + mask.shape[-1:], dtype=torch.bool)


@settings(max_examples=80, deadline=None)
@given(numbers, st.sampled_from([(), (Causal(),), (Causal(), Window(4))]))
def test_documents_in_any_order(ids: list[int], atoms: tuple[Atom, ...]) -> None:
    same = torch.tensor(ids)[:, None] == torch.tensor(ids)[None, :]
    allow = (Mask(atoms).dense(STEPS, STEPS) & same)[None]
    labels = labels_of(Mask((*atoms, Documents())), allow, every(allow))
    assert labels is not None
    again = labels[0][:, None] == labels[0][None, :]
    assert torch.equal(Mask(atoms).dense(STEPS, STEPS) & again, allow[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8), st.integers(0, 8))
def test_one_wrong_pair_is_noticed(i: int, j: int) -> None:
    allow = ((J_ <= I_) & (I_ // 3 == J_ // 3))[None].clone()
    allow[0, i, j] ^= True
    found = labels_of(Mask((Causal(), Documents())), allow, every(allow))
    if found is not None:  # a pair less may split a document: still documents
        same = found[0][:, None] == found[0][None, :]
        assert torch.equal(same & (J_ <= I_), allow[0])


def test_padding_belongs_to_nobody() -> None:
    real = torch.tensor([[True] * 6 + [False] * 3])
    allow = ((J_ <= I_) & (I_ // 3 == J_ // 3))[None] & real[:, None, :]
    labels = labels_of(Mask((Causal(), Documents(), KeyPadding())), allow, real)
    assert labels is not None
    assert labels[0].tolist() == [0, 0, 0, 3, 3, 3, 6, 7, 8]
    edges = boundaries(labels[0])
    assert edges is not None
    assert edges.tolist() == [0, 3, 6, 7, 8, 9]


def test_a_prefix_is_one_group() -> None:
    allow = ((J_ <= I_) | (J_ < 4))[None]
    labels = labels_of(Mask((CausalOrGroup(),)), allow, every(allow))
    assert labels is not None
    assert labels[0].tolist() == [3, 3, 3, 3, 4, 5, 6, 7, 8]


def test_mixed_documents_have_no_boundaries() -> None:
    assert boundaries(torch.tensor([0, 1, 0, 3])) is None
