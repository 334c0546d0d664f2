"""The whole story of refusals, as `rewriter inspect --why` prints it, against committed text.

`near_misses.txt` holds one section for each case. Node numbers, shape letters and paths are taken
out of both, since they change with versions of torch. After a change that is meant, run this file
as a program to write the text anew, and read what changed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from rewriter.cli.show_sites import miss_story
from rewriter.ir.advice import advice, mask_advice
from rewriter.ir.site import NearMiss
from rewriter.passes.capture import capture
from rewriter.passes.match import match

GOLDEN = Path(__file__).with_name("near_misses.txt")
X = torch.randn(2, 12, 64)
Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """q, k, v of (B, H, N, D) go into `mix`; its result is the output."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(64, 192), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.mix(q, k, v)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.gate(x), -1)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.score(x).transpose(1, 2), -1) @ x


class TopK(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, _ = self.gate(x).topk(2, -1)
        return torch.softmax(best, -1)


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(lambda q, k, v: torch.softmax(q @ k.mT / 4, -1) @ v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) if float(x.sum()) > 0 else x


def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.mT / 4, -2) @ v


def softmax_over_heads(q, k, v):
    return torch.softmax(q @ k.mT / 4, 1) @ v


def mask_after_softmax(q, k, v):
    n = q.shape[-2]
    return (torch.softmax(q @ k.mT / 4, -1) * torch.ones(n, n).tril()) @ v


def values_from_probabilities(q, k, v):
    p = torch.softmax(q @ k.mT / 4, -1)
    return p @ (p @ v)


def double_softmax(q, k, v):
    return torch.softmax(torch.softmax(q @ k.mT / 4, -1), -1) @ v


def several_normalisers(q, k, v):
    s = q @ k.mT / 4
    return (torch.softmax(s, -1) * torch.softmax(s, -2)) @ v


def two_products(q, k, v):
    return torch.softmax(q @ k.mT / 4 + k @ v.mT, -1) @ v


def learned_temperature(q, k, v):
    return torch.softmax((q @ k.mT) * q.mean(-1, keepdim=True), -1) @ v


def softcap_after_mask(q, k, v):
    n = q.shape[-2]
    hidden = torch.ones(n, n).triu(1).bool()
    return torch.softmax(torch.tanh((q @ k.mT).masked_fill(hidden, -100.0)) * 30, -1) @ v


def threshold_gate(q, k, v):
    s = q @ k.mT / 4
    return torch.softmax(s.masked_fill(s < s.mean(-1, keepdim=True), -1e9), -1) @ v


def no_values(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1)


def unknown_operator(q, k, v):
    return torch.softmax(torch.erf(q @ k.mT / 4), -1) @ v


def delayed_correlation(q, k, v):
    """Autoformer's: the lags of largest correlation weigh rolled values."""
    spectrum = torch.fft.rfft(q, dim=2) * torch.conj(torch.fft.rfft(k, dim=2))
    correlation = torch.fft.irfft(spectrum, n=q.shape[2], dim=2).mean((1, 3))
    best, lag = correlation.topk(2, -1)
    weights = torch.softmax(best, -1)
    index = (torch.arange(q.shape[2])[None, :, None] + lag[:, None]) % q.shape[2]
    rolled = torch.stack([v[b][:, index[b]] for b in range(2)])
    return (rolled * weights[:, None, None, :, None]).sum(3)


MISSES: dict[str, nn.Module] = {
    **{
        mix.__name__: Block(mix)
        for mix in (
            softmax_over_queries,
            softmax_over_heads,
            mask_after_softmax,
            values_from_probabilities,
            double_softmax,
            several_normalisers,
            two_products,
            learned_temperature,
            softcap_after_mask,
            threshold_gate,
            no_values,
            unknown_operator,
            delayed_correlation,
        )
    },
    "router": Router(),
    "pooling": Pooling(),
    "top_k_gate": TopK(),
    "decides_by_values": ReadsValues(),
}


def leak(q, k, v):
    """Causal, but every query sees key 5 too."""
    n = q.shape[-2]
    seen = torch.ones(n, n).tril().bool() | (torch.arange(n) == 5)[None]
    return torch.softmax((q @ k.mT / 4).masked_fill(~seen, -torch.inf), -1) @ v


def by_heads(q, k, v):
    """The heads see different windows."""
    n = q.shape[-2]
    far = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs()
    hidden = far[None] > torch.tensor([1, 2, 3, 4])[:, None, None]
    return torch.softmax((q @ k.mT / 4).masked_fill(hidden, -torch.inf), -1) @ v


OPAQUE: dict[str, nn.Module] = {mix.__name__: Block(mix) for mix in (leak, by_heads)}


def misses_of(module: nn.Module) -> tuple[NearMiss, ...]:
    captured = capture(module.eval(), (X,))
    if isinstance(captured, NearMiss):
        return (captured,)
    found = match(captured)
    assert not found.matches
    return found.misses


def told(miss: NearMiss) -> str:
    # What torch itself says about a failed trace is not ours to fix.
    reason = re.sub(r"(cannot be traced: \w+):.*", r"\1", miss.reason)
    miss = replace(miss, reason=reason)
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(*miss_story(miss), sep="\n")
    text = re.sub(r"\S*?([\w.]+\.py):\d+", r"\1:LINE", out.getvalue())
    text = re.sub(r"\b([a-z]\w*?)(_\d+)+\b", r"\1", text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def stories() -> Iterator[tuple[str, str]]:
    for name, module in MISSES.items():
        yield name, "\n".join(told(miss) for miss in misses_of(module))
    for name, module in OPAQUE.items():
        captured = capture(module.eval(), (X,))
        assert not isinstance(captured, NearMiss)
        (found,) = match(captured).matches
        opaque = found.site.mask.opaque
        assert opaque is not None
        yield name, f"mask is opaque: {opaque}\n{mask_advice(opaque)}"


def golden() -> dict[str, str]:
    sections = re.split(r"^=== (\w+)\n", GOLDEN.read_text(), flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(sections[::2], sections[1::2], strict=True)}


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return dict(stories())


@pytest.mark.parametrize("name", [*MISSES, *OPAQUE])
def test_the_story_of_a_refusal_reads_as_committed(name: str, now: dict[str, str]) -> None:
    assert now[name] == golden()[name]


def test_every_case_has_a_story_and_advice_of_its_own() -> None:
    assert list(golden()) == [*MISSES, *OPAQUE]
    general = advice("")
    for module in MISSES.values():
        for miss in misses_of(module):
            assert miss.advice != general, miss.reason
            assert miss.step and (miss.graph or miss.step == "capture")


def test_every_reason_in_the_matcher_has_advice_of_its_own() -> None:
    """Read from the source: a new refusal has to say what a person can do about it."""
    general = advice("")
    folder = Path(__file__).parents[2] / "passes" / "match"
    silent = []
    for file in sorted(folder.glob("*.py")):
        for reason in re.findall(r'Refusal\(\s*f?"([^"]+)"', file.read_text()):
            named = reason != "no softmax" and not reason.startswith("{what}")
            if named and advice(reason) == general:
                silent.append(f"{file.name}: {reason}")
    assert not silent


if __name__ == "__main__":
    GOLDEN.write_text("\n\n".join(f"=== {name}\n{text}" for name, text in stories()) + "\n")
