"""Memory is moved into large pages without anybody noticing but the clock."""

from __future__ import annotations

import sys

import pytest
import torch

from rewriter.backends.cpu import pages


def test_pages_are_those_that_tensors_fill_at_least_half() -> None:
    whole = torch.zeros(5 * pages.PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % pages.PAGE
    parts = [whole[start : start + pages.PAGE // 4], whole[start + pages.PAGE // 2 :][:100]]
    assert pages.pages_of(parts) == []
    parts.append(whole[start + pages.PAGE // 4 : start + pages.PAGE * 2 + 10])
    first = whole.data_ptr() + start
    assert pages.pages_of(parts) == [first, first + pages.PAGE]
    assert pages.pages_of([whole[::2], torch.zeros(0), torch.zeros(9, device="meta")]) == []


def test_values_and_addresses_stay() -> None:
    x = torch.arange(3 * pages.PAGE // 4, dtype=torch.float32).reshape(-1, 64)
    before, place = x.clone(), x.data_ptr()
    assert pages.use_large_pages([x, x]) in range(4)
    assert torch.equal(x, before) and x.data_ptr() == place
    x.add_(1)
    assert torch.equal(x, before + 1)


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    pages._madvise.cache_clear()
    assert pages.use_large_pages([torch.zeros(2**22)]) == 0
    monkeypatch.undo()
    pages._madvise.cache_clear()
