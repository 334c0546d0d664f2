"""The mask that the terms of a core make without padding, evaluated at many lengths and fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rewriter.ir.mask import Atom, Mask
from rewriter.passes.match import mask as masks
from rewriter.passes.match.content import is_bounded
from rewriter.passes.match.probe import Probe, ProbeError
from rewriter.passes.match.probes import Prober
from rewriter.passes.match.slices import (
    Slice,
    integer_constants,
    products,
    slice_of,
    table_sizes,
)
from rewriter.passes.match.terms import Term, read
from rewriter.passes.normalise.ops import op, value

DENSE = 300
"""Sizes up to here are probed at full length, larger ones at sampled positions."""

_LONGEST = 5000
"""Full evaluation where sampling is not possible: 25 million pairs."""

_SHORTEST = 11
"""No length below is probed, so that no kept tensor of such a size can be one over positions."""

_SAME = frozenset({"contiguous", "clone", "alias", "detach", "to", "_to_copy"})
"""Copies and casts: they hide what their input hides."""


@dataclass(frozen=True)
class Structure:
    """Evaluates all terms of one core together."""

    terms: Sequence[Term]
    prober: Prober
    atoms: tuple[Atom, ...]

    @cached_property
    def parts(self) -> tuple[Slice, ...]:
        """What may hide: a term without addends and branches bounded whatever the length."""
        out: list[Slice] = []
        view = self.prober.view
        terms = [t.part.target for t in self.terms if t.fill is None]
        stack = [n for n in terms if not is_bounded(n, view)]
        out += [t.part for t in self.terms if t.fill is not None]
        while stack:
            node = stack.pop()
            addends = [n for n in node.all_input_nodes if value(n) is not None]
            if op(node) == "add" and len(addends) == 2:
                stack.extend(n for n in addends if not is_bounded(n, view))
            elif op(node) in _SAME and len(addends) == 1:
                stack.append(addends[0])
            elif op(node) == "where" and len(addends) > 1:
                condition, *branches = addends
                stack.append(condition)
                stack.extend(n for n in branches if not is_bounded(n, view))
            else:
                out.append(slice_of(node, view))
        return tuple(out)

    @cached_property
    def constants(self) -> list[int]:
        view = self.prober.view
        return sorted({c for part in self.parts for c in integer_constants(part, view)})

    def small(self) -> list[int]:
        return [c for c in self.constants if 2 * c + 3 <= DENSE]

    def without_padding(self) -> Mask:
        constants, small = self.constants, self.small()
        tables = {n for part in self.parts for n in table_sizes(part, self.prober.view)}
        seen: list[masks.Evaluated] = []
        for length in masks.lengths_to_probe(small, DENSE):
            shorter = self._tables_below(length) if seen and self.prober.dynamic else ()
            try:
                found = self._dense(length)
            except ProbeError:
                if not shorter:
                    raise
                # No call can be that long either: the kept tensor ends before.
                found = self._dense_or(shorter[-1], seen[-1])
            if isinstance(found, str):
                return Mask(opaque=found)
            seen.append(found)
            if not self.prober.dynamic:
                break
        if not self.prober.dynamic:
            shown = seen[0].allowed.shape[-1]
            if not bool(seen[0].allowed.all()) and any(c >= shown for c in constants):
                return Mask(opaque="the sequence length was fixed by the capture")
            return masks.fit(seen, constants) or _UNFIT
        for size in sorted(tables):
            if all(e.allowed.shape[-1] < size for e in seen):
                found = self._at_table_size(size)
                if isinstance(found, str):
                    return Mask(opaque=found)
                seen.append(found)
        for c in constants:
            if c in small:
                continue
            found = self._at_large_size(c, seen)
            if isinstance(found, str):
                return Mask(opaque=found)
            seen.append(found)
        for c in products(constants):
            if c > DENSE and (further := self._at_period(c)) is not None:
                seen.append(further)
            elif c <= DENSE:
                seen.append(self._dense_or(c + 2, seen[-1]))
        return masks.fit(seen, constants) or _UNFIT

    def _tables_below(self, length: int) -> list[int]:
        """Sizes of kept tensors that a call of this length would need more of."""
        kept = (
            self.prober.view.captured.parameter(n.name) for t in self.terms for n in t.part.inputs
        )
        sizes = {n for tensor in kept if tensor is not None for n in tensor.shape}
        return sorted(n for n in sizes if _SHORTEST < n < length)

    def _at_table_size(self, size: int) -> masks.Evaluated | str:
        """Everything that a kept tensor of this length holds."""
        if size > _LONGEST:
            return f"a kept tensor of {size} entries is too large to evaluate"
        for length in (size, size - 5):  # keys that count on their own are 5 more
            try:
                return self._dense(length)
            except ProbeError:
                continue
        return f"a kept tensor of {size} entries cannot be evaluated at that length"

    def _at_large_size(self, size: int, before: list[masks.Evaluated]) -> masks.Evaluated | str:
        """Evaluate at sampled positions; where the graph does not allow that, at full length."""
        for found in self._sampled(size):
            if isinstance(found, masks.Evaluated) and masks.fit([*before, found], [size]):
                return found
        if size + 2 > _LONGEST:
            return f"a size of {size} in the graph is too large to evaluate"
        try:
            return self._dense(size + 2)
        except ProbeError:
            return before[-1]  # the graph itself cannot run at this length

    def _dense_or(self, length: int, otherwise: masks.Evaluated) -> masks.Evaluated:
        try:
            found = self._dense(length)
        except ProbeError:  # the graph itself cannot run at this length
            return otherwise
        return otherwise if isinstance(found, str) else found

    def _at_period(self, size: int) -> masks.Evaluated | None:
        """Evaluate around a product of constants, where the graph can be sampled there."""
        found = next(self._sampled(size), None)
        return None if isinstance(found, str) else found

    def _sampled(self, size: int) -> Iterator[masks.Evaluated | str]:
        """Evaluations at positions around a size, in each way that the graph allows."""
        positions = masks.positions_to_sample([size])
        for whole in (True, False):
            try:
                yield self.evaluated(
                    [self.prober.probe(t, positions.numel(), positions, whole) for t in self.terms]
                )
            except ProbeError:
                continue

    def _dense(self, length: int) -> masks.Evaluated | str:
        return self.evaluated([self.prober.probe(t, length) for t in self.terms])

    def evaluated(self, probes: Sequence[Probe]) -> masks.Evaluated | str:
        """Visibility without padding over all terms and the causal flag, or why there is none."""
        queries, keys = self.prober.counts(probes[0])
        positions = probes[0].positions
        rows = torch.arange(queries) if positions is None else positions
        columns = torch.arange(keys) if positions is None else positions
        out = Mask(self.atoms).dense(rows, columns).clone()
        for term, probe in zip(self.terms, probes, strict=True):
            allowed = read(term, probe, self.prober.view).allowed
            if bool((allowed != allowed[:1, :1]).any()):
                return "the mask differs between heads or rows of the batch"
            if allowed.shape[-2] not in (1, queries) or allowed.shape[-1] not in (1, keys):
                raise ProbeError("the mask has another size than the scores")
            out &= allowed[0, 0]
        return masks.Evaluated(out, rows, columns)


_UNFIT = Mask(opaque="it fits no known combination of masks")
