"""Run-time mask and bias tensors: padding, bias, and the guard against other masks."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from mixer_sites import BOTH_WAYS, CAUSAL, bool_mask, float_mask, make_site

from rewriter.errors import UnsupportedError
from rewriter.ir.mask import Causal, KeyPadding, Mask, Window
from rewriter.ir.site import AddTerm, FillTerm, Scale
from rewriter.mixers import terms as module
from rewriter.mixers.terms import split

EAGER = make_site(spelling="eager")
SDPA = make_site()


def padded(n: int = 8) -> torch.Tensor:
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0, :3] = False
    return valid


def test_no_terms_means_no_padding() -> None:
    assert split(SDPA, (None,), 0, 5).valid is None
    assert split(make_site(terms=(), score=(Scale(1.0),)), (), 0, 5).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_from_float_and_bool_masks(dtype: torch.dtype) -> None:
    valid = padded()
    keep = bool_mask(valid)
    for site, term in [
        (SDPA, keep),
        (EAGER, float_mask(keep, dtype)),
        (EAGER, float_mask(keep, dtype).masked_fill(~keep, -math.inf)),
        (EAGER, float_mask(keep, dtype).masked_fill(~keep, -10000.0)),
        (make_site(score=(Scale(1.0), FillTerm(0, -1e9, keep=False))), ~keep),
    ]:
        found = split(site, (term,), 0, 8)
        assert found.valid is not None
        assert torch.equal(found.valid, valid)
        assert found.bias is None


def test_all_valid_is_none() -> None:
    assert split(SDPA, (bool_mask(torch.ones(2, 6, dtype=torch.bool)),), 0, 6).valid is None


def test_one_mask_row_serves_the_batch() -> None:
    found = split(SDPA, (bool_mask(padded()[:1]),), 0, 8).of_batch(3)
    assert found.valid is not None
    assert found.valid.shape == (3, 8)


def test_padding_only_mask_of_an_encoder() -> None:
    valid = padded()
    site = make_site(BOTH_WAYS)
    for term in (valid[:, None, None, :], valid[:, None, None, :].expand(2, 1, 8, 8)):
        found = split(site, (term,), 0, 8)
        assert torch.equal(found.valid, valid)


@pytest.mark.parametrize("new", [1, 3])
def test_only_the_columns_of_new_tokens(new: int) -> None:
    valid = padded(10)
    valid[1, -1] = False
    keep = bool_mask(valid, 10 - new)
    expected = valid[:, 10 - new :]
    found = split(SDPA, (keep,), 10 - new, new)
    assert torch.equal(found.valid, expected)
    # A static cache shows columns that are not there yet.
    longer = torch.nn.functional.pad(keep, (0, 6))
    assert torch.equal(split(SDPA, (longer,), 10 - new, new).valid, expected)


def test_sliding_caches_show_the_last_columns() -> None:
    site = make_site(Mask((Causal(), Window(4), KeyPadding())))
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, -2:] = False
    keep = bool_mask(valid, 8, Causal(), Window(4))[..., -5:]
    assert torch.equal(split(site, (keep,), 8, 2).valid, valid[:, -2:])


def test_bias_and_mask_in_one_tensor() -> None:
    site = make_site(spelling="eager", terms=("mask_and_bias",))
    keep = bool_mask(padded())
    bias = torch.randn(1, 4, 8, 8)
    found = split(site, (bias + float_mask(keep),), 0, 8)
    assert torch.equal(found.valid, padded())
    assert torch.equal(found.bias, torch.where(keep, bias, 0.0))


def test_bias_beside_a_mask_and_its_columns() -> None:
    score = (Scale(1.0), AddTerm(0), AddTerm(1))
    site = make_site(spelling="eager", score=score, terms=("bias", "mask"))
    bias, keep = torch.randn(1, 4, 1, 12), bool_mask(padded(), 7)
    found = split(site, (bias, float_mask(keep)), 7, 1)
    assert torch.equal(found.bias, bias[..., :8])
    assert split(site, (bias[..., -4:], None), 7, 1).bias.shape[-1] == 8


@pytest.mark.parametrize("new", [8, 1])
def test_other_masks_are_refused(new: int) -> None:
    valid = torch.ones(1, 8, dtype=torch.bool)
    windowed = make_site(Mask((Causal(), Window(3), KeyPadding())))
    with pytest.raises(UnsupportedError, match="differs from causal & window"):
        split(windowed, (bool_mask(valid, 8 - new),), 8 - new, new)


def test_packed_documents_are_refused() -> None:
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    keep = bool_mask(torch.ones(1, 8, dtype=torch.bool)) & (document[:, None] == document)
    for site, term in [(SDPA, keep), (EAGER, float_mask(keep))]:
        with pytest.raises(UnsupportedError, match="packed documents"):
            split(site, (term,), 0, 8)


def test_a_mask_for_fewer_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="covers the new tokens"):
        split(SDPA, (bool_mask(padded(5)),), 0, 8)


def test_causal_flag_beside_a_padding_mask() -> None:
    valid = padded()
    site = make_site(CAUSAL, causal_flag=True)
    assert torch.equal(split(site, (valid[:, None, None, :],), 0, 8).valid, valid)


def test_layers_share_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module._check
    monkeypatch.setattr(module, "_check", lambda *a: calls.append(a) or real(*a))
    keep = bool_mask(padded())
    for _ in range(4):
        split(SDPA, (keep[..., :8],), 0, 8)  # each layer makes its own view
    assert len(calls) == 1
    keep[0, 0, 5, 1] = True  # writing to the mask makes it a new one
    with pytest.raises(UnsupportedError):
        split(SDPA, (keep,), 0, 8)
    split(SDPA, (bool_mask(padded()),), 0, 8)
    assert len(calls) == 3


def test_nothing_outlives_the_mask() -> None:
    keep = bool_mask(padded())
    split(SDPA, (keep,), 0, 8)
    assert torch.equal(pickle.loads(pickle.dumps(keep)), keep)
    assert torch.equal(split(SDPA, (copy.deepcopy(keep),), 0, 8).valid, padded())
    gone = weakref.ref(keep)
    del keep
    gc.collect()
    assert gone() is None


def test_inference_tensors_are_checked_each_time() -> None:
    with torch.inference_mode():
        keep = bool_mask(padded())
        assert torch.equal(split(SDPA, (keep,), 0, 8).valid, padded())
        keep[0, 0, 5, 1] = True
        with pytest.raises(UnsupportedError):
            split(SDPA, (keep,), 0, 8)
