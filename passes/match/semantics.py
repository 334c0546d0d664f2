"""What the mask and bias tensors of a core mean, found by evaluating them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from rewriter.ir.mask import Atom, Causal, KeyPadding, Mask
from rewriter.ir.site import AddTerm, PositionKind, SinkTerm, TermRole
from rewriter.passes.match import mask as masks
from rewriter.passes.match.content import is_content
from rewriter.passes.match.draft import Draft, Labelled
from rewriter.passes.match.heads import Operands
from rewriter.passes.match.probe import Probe, ProbeError
from rewriter.passes.match.probes import GENERIC, LOOSE_PATTERNS, Prober, padding_patterns
from rewriter.passes.match.slices import integer_constants
from rewriter.passes.match.terms import Term, read, term_of
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import value
from rewriter.passes.torch_private import symbolic_expression

_DENSE = 300
"""Sizes up to here are probed at full length, larger ones at sampled positions."""

_LONGEST = 5000
"""Full evaluation where sampling is not possible: 25 million pairs."""


@dataclass(frozen=True)
class Meaning:
    """Roles of the terms, and the mask they and the causal flag make together."""

    roles: tuple[TermRole, ...]
    mask: Mask
    position: PositionKind | None = None


class Semantics:
    """Evaluates terms; layers that share a mask share the answer."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._known: dict[tuple[object, ...], Meaning] = {}

    def of(self, draft: Draft, named: Operands) -> Meaning:
        atoms: tuple[Atom, ...] = (Causal(),) if draft.causal_flag else ()
        if not named.terms:
            return Meaning((), Mask(atoms))
        key = (draft.causal_flag, draft.steps, *(t.node for t in named.terms))
        if key not in self._known:
            self._known[key] = self._meaning(draft, named, atoms)
        return self._known[key]

    def _meaning(self, draft: Draft, named: Operands, atoms: tuple[Atom, ...]) -> Meaning:
        sides = ((draft.query, draft.query_axis), (draft.key, draft.key_axis))
        queries, keys = (_count(item, axis, draft) for item, axis in sides)
        prober = Prober(self._view, (queries, keys))
        symbols = frozenset(queries.free_symbols | keys.free_symbols)
        roles: list[TermRole] = ["mask" for _ in named.terms]
        indices: list[int] = []
        terms: list[Term] = []
        content = False
        for index in range(len(named.terms)):
            if SinkTerm(index) in draft.steps:
                roles[index] = "sink"
                continue
            if AddTerm(index) in draft.steps and is_content(named.terms[index].node, self._view):
                roles[index], content = "bias", True
                continue
            indices.append(index)
            term = term_of(index, draft, named, symbols, self._view)
            if isinstance(term, str):
                return Meaning(tuple(roles), Mask(opaque=term))
            terms.append(term)
        position: PositionKind | None = "content_bias" if content else None
        if not terms:
            return Meaning(tuple(roles), Mask(atoms), position)
        try:
            found = _Evaluation(terms, prober, atoms).meaning()
        except (ProbeError, RuntimeError) as error:  # torch raises RuntimeError on sizes
            opaque = Mask(opaque=f"the mask cannot be evaluated: {error}")
            return Meaning(tuple(roles), opaque, position)
        for index, role in zip(indices, found.roles, strict=True):
            roles[index] = role
        return Meaning(tuple(roles), found.mask, found.position or position)


def _count(item: Labelled, axis: tuple[int, ...], draft: Draft) -> sympy.Expr:
    """Symbolic number of tokens along an axis."""
    val = value(item.node)
    assert val is not None
    leaves = draft.axes.leaves(axis)
    for dim, size in zip(draft.axes.resolve(item.labels), val.shape, strict=True):
        if dim == leaves:
            return symbolic_expression(size)
    return sympy.Integer(draft.axes.total(leaves))


@dataclass(frozen=True)
class _Evaluation:
    """Evaluates all terms of one core together."""

    terms: Sequence[Term]
    prober: Prober
    atoms: tuple[Atom, ...]

    def meaning(self) -> Meaning:
        view = self.prober.view
        readings = [read(t, self.prober.probe(t, GENERIC), view) for t in self.terms]
        position = next((r.position for r in readings if r.position is not None), None)
        roles = [r.role for r in readings]
        mask = self._without_padding()
        if mask.opaque is None:
            mask = self._with_padding(mask)
        for i, term in enumerate(self.terms):
            if self._hides_padding(term):
                roles[i] = "mask_and_bias" if "bias" in roles[i] else "mask"
            if term.fill is None and term.learned(view):  # a zero today may be trained tomorrow
                roles[i] = "bias" if roles[i] in ("none", "bias") else "mask_and_bias"
        return Meaning(tuple(roles), mask, position)

    def _without_padding(self) -> Mask:
        constants = sorted({c for t in self.terms for c in integer_constants(t.part)})
        small = [c for c in constants if 2 * c + 3 <= _DENSE]
        seen: list[masks.Evaluated] = []
        for length in masks.lengths_to_probe(small, _DENSE):
            found = self._dense(length)
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
        for c in constants:
            if c in small:
                continue
            found = self._at_large_size(c, seen)
            if isinstance(found, str):
                return Mask(opaque=found)
            seen.append(found)
        return masks.fit(seen, constants) or _UNFIT

    def _at_large_size(self, size: int, before: list[masks.Evaluated]) -> masks.Evaluated | str:
        """Evaluate at sampled positions; where the graph does not allow that, at full length."""
        positions = masks.positions_to_sample([size])
        for whole in (True, False):
            try:
                found = self._evaluated(
                    [self.prober.probe(t, positions.numel(), positions, whole) for t in self.terms]
                )
            except ProbeError:
                continue
            if isinstance(found, masks.Evaluated) and masks.fit([*before, found], [size]):
                return found
        if size + 2 > _LONGEST:
            return f"a size of {size} in the graph is too large to evaluate"
        try:
            return self._dense(size + 2)
        except ProbeError:
            return before[-1]  # the graph itself cannot run at this length

    def _dense(self, length: int) -> masks.Evaluated | str:
        return self._evaluated([self.prober.probe(t, length) for t in self.terms])

    def _evaluated(self, probes: Sequence[Probe]) -> masks.Evaluated | str:
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

    # -- padding and content ---------------------------------------------------------------

    def _with_padding(self, mask: Mask) -> Mask:
        if self._depends_on_tokens():
            return Mask(opaque="the mask depends on token values")
        hidden = self._padding(mask)
        if isinstance(hidden, str):
            return Mask(opaque=hidden)
        return Mask((*mask.atoms, KeyPadding())) if hidden else mask

    def _depends_on_tokens(self) -> bool:
        for term in self.terms:
            if any(i.kind == "tokens" for i in term.inputs):
                probes = (self.prober.probe(term, GENERIC, seed=s) for s in (1, 2))
                one, two = (read(term, p, self.prober.view).allowed for p in probes)
                if not torch.equal(one, two):
                    return True
        return False

    def _padding(self, mask: Mask) -> bool | str:
        """True if padding inputs hide exactly the padded keys, False if they hide nothing."""
        if not any(i.kind == "padding" for t in self.terms for i in t.inputs):
            return False
        verdicts: set[bool] = set()
        queries, keys = self.prober.counts(self.prober.probe(self.terms[0], GENERIC))
        if not self.prober.plain_padding(self.terms, keys):
            return self._loose_padding(mask)
        for valid in padding_patterns(keys, max(self.prober.rows(t) for t in self.terms)):
            probes = [self.prober.probe(t, GENERIC, padding=valid) for t in self.terms]
            base = mask.dense(torch.arange(queries), torch.arange(keys))
            shape = (valid.shape[0], 1, queries, keys)
            seen = Mask(self.atoms).dense(torch.arange(queries), torch.arange(keys)).expand(shape)
            for term, probe in zip(self.terms, probes, strict=True):
                allowed = read(term, probe, self.prober.view).allowed
                if bool((allowed != allowed[:, :1]).any()):
                    return "padding is treated differently by different heads"
                seen = seen & allowed[:, :1]
            if seen.shape != shape:
                return "padding was given for other keys than the mask hides"
            wanted = base & valid[:, None, None, :]
            # Rows without a key are free to hold anything, and padded queries to see nothing.
            alive = wanted.any(-1, keepdim=True)
            if queries == keys:
                alive = alive & (seen.any(-1, keepdim=True) | valid[:, None, :, None])
            if torch.equal(seen & alive, wanted & alive):
                verdicts.add(True)
            elif torch.equal(seen, base.expand(shape)):
                verdicts.add(False)
            else:
                return "padding does more than hide padded keys"
        return True in verdicts if len(verdicts) == 1 else "padding hides keys only on one side"

    def _loose_padding(self, mask: Mask) -> bool | str:
        """As `_padding`, for inputs that do not name keys: samples of a sound, pixels of an image.

        Whatever they hold, the mask must be the one without padding, some keys taken away.
        """
        taken = False
        for pattern in range(LOOSE_PATTERNS):
            probes = [self.prober.probe(t, GENERIC, padding=pattern) for t in self.terms]
            queries, keys = self.prober.counts(probes[0])
            base = mask.dense(torch.arange(queries), torch.arange(keys))[None, None]
            seen = Mask(self.atoms).dense(torch.arange(queries), torch.arange(keys))[None, None]
            for term, probe in zip(self.terms, probes, strict=True):
                allowed = read(term, probe, self.prober.view).allowed
                if bool((allowed != allowed[:, :1]).any()):
                    return "padding is treated differently by different heads"
                seen = seen & allowed[:, :1]
            kept = seen.any(-2, keepdim=True)
            wanted = base & kept
            alive = wanted.any(-1, keepdim=True)
            if not torch.equal(seen & alive, wanted & alive):
                return "padding does more than hide padded keys"
            taken = taken or not bool(kept.all())
        return taken

    def _hides_padding(self, term: Term) -> bool:
        if not any(i.kind == "padding" for i in term.inputs):
            return False
        view, neutral = self.prober.view, self.prober.probe(term, GENERIC)
        keys = self.prober.counts(neutral)[1]
        padding: torch.Tensor | int = 0
        if self.prober.plain_padding([term], keys):
            padding = padding_patterns(keys, self.prober.rows(term))[0]
        plain = read(term, neutral, view).allowed
        padded = read(term, self.prober.probe(term, GENERIC, padding=padding), view).allowed
        return bool((plain != padded).any())


_UNFIT = Mask(opaque="it fits no known combination of masks")
