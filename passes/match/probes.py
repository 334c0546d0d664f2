"""Which values a mask's inputs get in a probe: neutral, padded, or two different token sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy
import torch
from torch import fx

from rewriter.passes.match.inputs import MaskInput, example_of
from rewriter.passes.match.probe import Probe, number
from rewriter.passes.match.terms import Term, read
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import value
from rewriter.passes.torch_private import symbolic_expression

GENERIC = 11
"""A length that no model has as a window."""


@dataclass(frozen=True)
class Prober:
    """Makes probes.

    Attributes:
        tokens: symbolic numbers of queries and of keys.
        neutral: one of `NEUTRAL`, what inputs of token values hold where nothing else is said.
    """

    view: View
    tokens: tuple[sympy.Expr, sympy.Expr]
    neutral: int = 1

    @property
    def dynamic(self) -> bool:
        """The number of tokens was left free by the capture."""
        return bool(self.tokens[0].free_symbols)

    def sizes(self, length: int) -> dict[sympy.Symbol, int]:
        """Symbol values that give about `length` queries; keys that count on their own get more."""
        queries, keys = self.tokens
        known = {**_giving(keys, length + 5), **_giving(queries, length)}
        return {**_alike(known, self.examples), **known}

    @cached_property
    def examples(self) -> dict[sympy.Symbol, int]:
        """What each size symbol was in the captured call."""
        out: dict[sympy.Symbol, int] = {}
        for node in self.view.graph.find_nodes(op="placeholder"):
            val = value(node)
            if val is None or node.name not in self.view.captured.inputs:
                continue
            for size, number_ in zip(val.shape, example_of(node, self.view).shape, strict=True):
                if (symbol := symbolic_expression(size)).is_Symbol:
                    out[symbol] = int(number_)
        return out

    def plain_padding(self, terms: Sequence[Term], keys: int) -> bool:
        """Whether every padding input says for each key whether it is padded."""
        sizes = self.sizes(GENERIC)
        inputs = (i for t in terms for i in t.inputs if i.kind == "padding")
        shapes = [_shape(i.node, sizes) for i in inputs]
        return all(len(shape) == 2 and shape[-1] == keys for shape in shapes)

    def rows(self, term: Term) -> int:
        """Batch size that the padding inputs of a term have in a probe."""
        sizes = self.sizes(GENERIC)
        shapes = [_shape(i.node, sizes) for i in term.inputs if i.kind == "padding"]
        return max((shape[0] for shape in shapes if len(shape) > 1), default=2)

    def counts(self, probe: Probe) -> tuple[int, int]:
        """(queries, keys) of a probe."""
        first, second = (
            int(e.subs({s: probe.sizes.get(s, 2) for s in e.free_symbols})) for e in self.tokens
        )
        return first, second

    def probe(
        self,
        term: Term,
        length: int,
        positions: torch.Tensor | None = None,
        whole: bool = True,
        padding: torch.Tensor | int | None = None,
        drawn: int | None = None,
    ) -> Probe:
        """Inputs that hide nothing, or `padding` for padding inputs.

        `drawn` is the number of one of the `DRAWN` patterns, for inputs of tokens and counts.

        `padding` is (B, N) bool, True is valid, or the number of one of `loose_padding`'s patterns.

        With sampled `positions`, inputs reach up to the largest position (`whole`: masks that
        gather by position) or hold one entry per sample.
        """
        sizes = self.sizes(length)
        inputs: dict[str, torch.Tensor] = {}
        for item in term.inputs:
            shape = _shape(item.node, sizes)
            if positions is not None and whole:
                shape[-1] = int(positions.max()) + 1
            if item.kind == "padding":
                if isinstance(padding, int):
                    valid = loose_padding(shape, padding)
                else:
                    valid = torch.ones(shape) if padding is None else padding.expand(shape).float()
                out = valid if self._ones_are_valid(term, item) else 1 - valid
            elif item.kind == "positions":
                sampled = positions is not None and not whole
                out = positions if sampled and positions is not None else torch.arange(shape[-1])
                out = out.expand(shape).contiguous()
            elif drawn is not None:
                out = values_drawn(item.kind == "counts", shape, drawn, length)
            elif item.kind == "counts":
                out = torch.zeros(shape)
            elif self.neutral == COUNTING:
                out = torch.arange(shape[-1]).expand(shape).contiguous()
            else:
                out = torch.full(shape, self.neutral)
            inputs[item.node.name] = out.to(_dtype(item.node))
        return Probe(sizes, inputs, positions)

    def _ones_are_valid(self, term: Term, item: MaskInput) -> bool:
        """The polarity of a padding input: which constant leaves more keys visible."""
        sizes = self.sizes(GENERIC)
        visible = []
        for fill in (0, 1):
            inputs = {}
            for other in term.inputs:
                shape = _shape(other.node, sizes)
                out = torch.ones(shape) if other.kind == "padding" else torch.arange(shape[-1])
                out = torch.full(shape, fill) if other is item else out.expand(shape)
                inputs[other.node.name] = out.to(_dtype(other.node)).contiguous()
            reading = read(term, Probe(sizes, inputs), self.view)
            visible.append(float(reading.allowed.double().mean()))
        return visible[1] >= visible[0]


COUNTING = -1
NEUTRAL = (1, 5, COUNTING)
"""Token values that a mask most likely takes for one document without padding: a constant, which
may happen to be the padding token's number, or positions 0, 1, 2, ..."""

DRAWN = 8


def values_drawn(counts: bool, shape: Sequence[int], pattern: int, length: int) -> torch.Tensor:
    """Integers for an input: numbers of tokens, or one number per token (..., N).

    Patterns of token values: documents numbered 1, 2, ... side by side, the same with zeros at the
    end or at the start, positions that start again with each document, and numbers at random.
    """
    generator = torch.Generator().manual_seed(pattern)

    def random(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    if counts:
        return random(0, length + 1, *shape).sort(-1).values if shape else random(1, length)
    *lead, n = shape
    starts = random(0, 4, *lead, n) == 0
    starts[..., 0] = True
    document = starts.long().cumsum(-1)
    kind = pattern % 5
    if kind == 1:
        document[..., (2 * n) // 3 :] = 0
    elif kind == 2:
        document[..., : max(n // 4, 1)] = 0
    elif kind == 3:
        steps = torch.arange(n).expand(document.shape)
        return steps - torch.where(starts, steps, 0).cummax(-1).values
    elif kind == 4:
        return random(0, 3, *shape)
    return document


def padding_patterns(length: int, rows: int = 2) -> tuple[torch.Tensor, ...]:
    """(rows, length) bool: padding on the right, on the left, and on both sides."""
    right = torch.ones(2, length, dtype=torch.bool)
    left = right.clone()
    right[0, (2 * length) // 3 :] = False
    left[0, : max(length // 4, 1)] = False
    both = right & left
    both[1, length - 2 :] = False
    order = torch.arange(rows) % 2
    return right[order], left[order], both[order]


LOOSE_PATTERNS = 5


def loose_padding(shape: Sequence[int], pattern: int) -> torch.Tensor:
    """A padding input of any shape, 1 is valid: cut on the right, on the left, or at random."""
    if pattern >= 2:
        generator = torch.Generator().manual_seed(pattern)
        return (torch.rand(tuple(shape), generator=generator) > 0.3).float()
    out = torch.ones(tuple(shape))
    width = shape[-1]
    if pattern == 0:
        out[0, ..., (2 * width) // 3 :] = 0
    else:
        out[0, ..., : max(width // 4, 1)] = 0
    return out


def _alike(
    known: Mapping[sympy.Symbol, int], examples: Mapping[sympy.Symbol, int]
) -> dict[sympy.Symbol, int]:
    """Values for symbols that were as large as a known one: a sound and its mask, say."""
    values = {examples[s]: v for s, v in known.items() if s in examples}
    return {s: values[n] for s, n in examples.items() if n in values}


_MOST = 1 << 24


def _giving(tokens: sympy.Expr, length: int) -> dict[sympy.Symbol, int]:
    """Values of the symbols of a growing expression at which it first reaches `length`.

    Most models count tokens by a symbol of its own; behind convolutions it is a formula of the
    number of samples.
    """
    symbols = tokens.free_symbols
    if len(symbols) != 1 or tokens in symbols:
        return dict.fromkeys(symbols, length)
    (symbol,) = symbols

    def short(number_: int) -> bool:
        try:
            return int(tokens.subs(symbol, number_)) < length
        except ZeroDivisionError:  # a formula of blocks, and not one block yet
            return True

    low, high = 1, 2
    while high < _MOST and short(high):
        low, high = high, 2 * high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if short(middle) else (low, middle)
    return {symbol: high}


def _shape(node: fx.Node, sizes: Mapping[sympy.Symbol, int]) -> list[int]:
    val = value(node)
    assert val is not None
    return [number(s, sizes) for s in val.shape]


def _dtype(node: fx.Node) -> torch.dtype:
    val = value(node)
    assert val is not None
    return val.dtype
