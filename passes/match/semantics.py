"""What the mask and bias tensors of a core mean, found by evaluating them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import sympy
import torch

from rewriter.ir.given import has_labels, labels_of
from rewriter.ir.mask import (
    Atom,
    BlockCausal,
    Causal,
    CausalOrGroup,
    CausalOrPrefix,
    Chunk,
    ChunkAfterPadding,
    Documents,
    KeyPadding,
    Mask,
    WindowOrSinks,
)
from rewriter.ir.site import (
    AddTerm,
    PositionKind,
    ScoreStep,
    SinkTerm,
    TemperatureTerm,
    TermRole,
)
from rewriter.passes.match import mask as masks
from rewriter.passes.match.content import is_content
from rewriter.passes.match.draft import Draft, Labelled
from rewriter.passes.match.heads import Operands
from rewriter.passes.match.probe import Probe, ProbeError
from rewriter.passes.match.probes import (
    DRAWN,
    GENERIC,
    LOOSE_PATTERNS,
    NEUTRAL,
    Prober,
    padding_patterns,
)
from rewriter.passes.match.structure import DENSE, Structure
from rewriter.passes.match.terms import Reading, Term, read, term_of
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import value
from rewriter.passes.torch_private import symbolic_expression

_LONGEST_PADDED, _PAST = 10_000, 40
"""With padding there is no sampling; so far past a chunk's first border a shift would show."""


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
            other = _ROLES.get(type(next(s for s in draft.steps if _index(s) == index)))
            if other is not None:
                roles[index] = other
                continue
            added = any(isinstance(s, AddTerm) and s.index == index for s in draft.steps)
            if added and is_content(named.terms[index].node, self._view):
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
            found = _meaning_of(terms, prober, atoms)
        except (ProbeError, RuntimeError) as error:  # torch raises RuntimeError on sizes
            opaque = Mask(opaque=f"the mask cannot be evaluated: {error}")
            return Meaning(tuple(roles), opaque, position)
        for index, role in zip(indices, found.roles, strict=True):
            roles[index] = role
        return Meaning(tuple(roles), found.mask, found.position or position)


_ROLES: Mapping[type[ScoreStep], TermRole] = {SinkTerm: "sink", TemperatureTerm: "temperature"}


def _index(step: ScoreStep) -> int | None:
    """Number of the term that a step uses."""
    return getattr(step, "index", None)


def _count(item: Labelled, axis: tuple[int, ...], draft: Draft) -> sympy.Expr:
    """Symbolic number of tokens along an axis."""
    val = value(item.node)
    assert val is not None
    leaves = draft.axes.leaves(axis)
    for dim, size in zip(draft.axes.resolve(item.labels), val.shape, strict=True):
        if dim == leaves:
            return symbolic_expression(size)
    return sympy.Integer(draft.axes.total(leaves))


def _meaning_of(terms: Sequence[Term], prober: Prober, atoms: tuple[Atom, ...]) -> Meaning:
    """What the terms mean; masks of token values are tried from several neutral values."""
    found = _Evaluation(terms, prober, atoms).meaning()
    if found.mask.opaque is None:
        return found
    named = [t.with_tokens() for t in terms]
    valued = any(i.kind in ("tokens", "counts") for t in named for i in t.inputs)
    for neutral in NEUTRAL if valued else ():
        other = _Evaluation(named, replace(prober, neutral=neutral), atoms).meaning()
        if other.mask.opaque is None:
            return other
    return found


@dataclass(frozen=True)
class _Evaluation(Structure):
    """Evaluates all terms of one core together, with padding and with what their inputs hold."""

    def meaning(self) -> Meaning:
        view = self.prober.view
        readings = [read(t, self.prober.probe(t, GENERIC), view) for t in self.terms]
        kinds = (r.position(self._allowed(readings)) for r in readings)
        position = next((kind for kind in kinds if kind is not None), None)
        if position is not None and any(map(self._adds_values, self.terms)):
            position = "content_bias"
        roles = [r.role for r in readings]
        mask = self.without_padding()
        if mask.opaque is None:
            mask = self._with_padding(mask)
        for i, term in enumerate(self.terms):
            if self._hides_values(term):
                roles[i] = "mask_and_bias" if "bias" in roles[i] else "mask"
            if term.fill is None and term.learned(view):  # a zero today may be trained tomorrow
                roles[i] = "bias" if roles[i] in ("none", "bias") else "mask_and_bias"
        return Meaning(tuple(roles), mask, position)

    def _with_padding(self, mask: Mask) -> Mask:
        hidden = self._padding(mask)
        if isinstance(hidden, str):
            anchored = tuple(
                ChunkAfterPadding(a.size) if isinstance(a, Chunk) else a for a in mask.atoms
            )
            if anchored == mask.atoms or self._padding(Mask(anchored)) is not True:
                return Mask(opaque=hidden)
            mask, hidden = Mask(anchored), True
        if any(i.kind in ("tokens", "counts") for t in self.terms for i in t.inputs):
            return self._with_values(mask, hidden)
        return Mask((*mask.atoms, KeyPadding())) if hidden else mask

    def _with_values(self, mask: Mask, hidden: bool) -> Mask:
        """Documents, groups or padding that inputs of integers make, if it is one of these."""
        shown = []
        for length, drawn in product(self._padded_lengths(mask), range(DRAWN)):
            queries, keys = self.prober.counts(self.prober.probe(self.terms[0], length))
            valid = torch.ones(1, keys, dtype=torch.bool)
            shown.append((self._seen(length, drawn, None), valid))
            if hidden and self.prober.plain_padding(self.terms, keys):
                rows = max(self.prober.rows(t) for t in self.terms)
                valid = padding_patterns(keys, rows)[drawn % 3]
                shown.append((self._seen(length, drawn, valid), valid))
        if any(seen is None for seen, _ in shown):
            return Mask(opaque="token values are treated differently by different heads")
        pairs = [(seen, valid) for seen, valid in shown if seen is not None]
        if queries != keys:
            bases = (Mask.dense(mask, *map(torch.arange, s.shape[1:])) for s, _ in pairs)
            if hidden or any(bool((s != b).any()) for (s, _), b in zip(pairs, bases, strict=True)):
                return Mask(opaque="the mask depends on token values")
            return mask
        grouped = Mask((CausalOrGroup(),)) if mask.atoms in ((), (Causal(),)) else None
        for candidate in (mask, Mask((*mask.atoms, Documents())), grouped):
            if candidate is None:
                continue
            fits = [_fits(candidate, seen, valid) for seen, valid in pairs]
            if None not in fits:
                padded = hidden or not all(fits)
                return Mask((*candidate.atoms, KeyPadding())) if padded else candidate
        return Mask(opaque="the mask depends on token values")

    def _seen(self, length: int, drawn: int, valid: torch.Tensor | None) -> torch.Tensor | None:
        """(B, Nq, Nk) of all terms for one pattern of token values; None if heads differ."""
        probes = [self.prober.probe(t, length, padding=valid, drawn=drawn) for t in self.terms]
        queries, keys = self.prober.counts(probes[0])
        seen = Mask(self.atoms).dense(torch.arange(queries), torch.arange(keys))[None]
        for term, probe in zip(self.terms, probes, strict=True):
            allowed = read(term, probe, self.prober.view).allowed
            if bool((allowed != allowed[:, :1]).any()):
                return None
            seen = seen & allowed[:, 0]
        return seen

    def _padding(self, mask: Mask) -> bool | str:
        """True if padding inputs hide exactly the padded keys, False if they hide nothing."""
        if not any(i.kind == "padding" for t in self.terms for i in t.inputs):
            return False
        _, keys = self.prober.counts(self.prober.probe(self.terms[0], GENERIC))
        if not self.prober.plain_padding(self.terms, keys):
            return self._loose_padding(mask)
        verdicts: set[bool] = set()
        for length in self._padded_lengths(mask):
            found = self._padding_at(length, mask)
            if isinstance(found, str):
                return found
            verdicts |= found
        return True in verdicts if len(verdicts) < 2 else "padding hides keys only on one side"

    def _padded_lengths(self, mask: Mask) -> Sequence[int]:
        """Lengths at which atoms that count from the first position would show a shift, and one
        at which every small size of the graph shows."""
        longest = max(masks.lengths_to_probe(self.small(), DENSE))
        if self.prober.dynamic and longest > GENERIC:
            try:
                self.evaluated([self.prober.probe(t, longest) for t in self.terms])
            except ProbeError:
                longest = GENERIC
        sizes = {a.size for a in mask.atoms if isinstance(a, Chunk | ChunkAfterPadding)}
        sizes |= {a.size for a in mask.atoms if isinstance(a, BlockCausal | CausalOrPrefix)}
        sizes |= {a.sinks for a in mask.atoms if isinstance(a, WindowOrSinks)}
        more = {s + min(s // 2, _PAST) + 2 for s in sizes if s + 2 > GENERIC}
        return sorted({GENERIC, longest, *more} if self.prober.dynamic else {GENERIC})

    def _padding_at(self, length: int, mask: Mask) -> set[bool] | str:
        verdicts: set[bool] = set()
        if length > _LONGEST_PADDED:
            return f"a size of {length} in the graph is too large to evaluate with padding"
        queries, keys = self.prober.counts(self.prober.probe(self.terms[0], length))
        rows, columns = torch.arange(queries), torch.arange(keys)
        padded = Mask((*mask.atoms, KeyPadding()))
        for valid in padding_patterns(keys, max(self.prober.rows(t) for t in self.terms)):
            probes = [self.prober.probe(t, length, padding=valid) for t in self.terms]
            shape = (valid.shape[0], 1, queries, keys)
            seen = Mask(self.atoms).dense(rows, columns).expand(shape)
            for term, probe in zip(self.terms, probes, strict=True):
                allowed = read(term, probe, self.prober.view).allowed
                if bool((allowed != allowed[:, :1]).any()):
                    return "padding is treated differently by different heads"
                seen = seen & allowed[:, :1]
            if seen.shape != shape:
                return "padding was given for other keys than the mask hides"
            wanted = padded.dense(rows, columns, valid)
            # Rows without a key are free to hold anything, and padded queries to see nothing.
            alive = wanted.any(-1, keepdim=True)
            if queries == keys:
                alive = alive & (seen.any(-1, keepdim=True) | valid[:, None, :, None])
            hides = torch.equal(seen & alive, wanted & alive)
            idle = torch.equal(seen, mask.dense(rows, columns).expand(shape))
            if not hides and not idle:
                return "padding does more than hide padded keys"
            if hides != idle:  # both: no valid token could see a padded one anyway
                verdicts.add(hides)
        return verdicts

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

    def _allowed(self, readings: Sequence[Reading]) -> torch.Tensor:
        """(B, H, Nq, Nk) of all terms and the causal flag, at the generic length."""
        queries, keys = self.prober.counts(self.prober.probe(self.terms[0], GENERIC))
        seen = Mask(self.atoms).dense(torch.arange(queries), torch.arange(keys))[None, None]
        for reading in readings:
            seen = seen & reading.allowed
        return seen

    def _adds_values(self, term: Term) -> bool:
        """Whether what a term adds depends on the values of tokens."""
        if not any(i.kind == "tokens" for i in term.inputs):
            return False
        view = self.prober.view
        plain = read(term, self.prober.probe(term, GENERIC), view).bias
        others = (read(term, self.prober.probe(term, GENERIC, drawn=d), view) for d in range(2))
        return plain is not None and any(
            o.bias is not None and bool((o.bias != plain).any()) for o in others
        )

    def _hides_values(self, term: Term) -> bool:
        """Whether what a term hides depends on its inputs."""
        view, neutral = self.prober.view, self.prober.probe(term, GENERIC)
        plain = read(term, neutral, view).allowed
        probes: list[Probe] = []
        if any(i.kind == "padding" for i in term.inputs):
            keys = self.prober.counts(neutral)[1]
            padding: torch.Tensor | int = 0
            if self.prober.plain_padding([term], keys):
                padding = padding_patterns(keys, self.prober.rows(term))[0]
            probes.append(self.prober.probe(term, GENERIC, padding=padding))
        if any(i.kind in ("tokens", "counts") for i in term.inputs):
            probes += [self.prober.probe(term, GENERIC, drawn=d) for d in range(DRAWN)]
        return any(bool((read(term, p, view).allowed != plain).any()) for p in probes)


def _fits(candidate: Mask, seen: torch.Tensor, valid: torch.Tensor) -> bool | None:
    """Whether all valid keys are seen under a candidate; None if the mask is another."""
    real = seen.any(-2)
    if bool((real & ~valid).any()):
        return None
    if has_labels(candidate):
        if labels_of(candidate, seen, real) is None:
            return None
    else:
        steps = torch.arange(seen.shape[-1])
        shown = Mask((*candidate.atoms, KeyPadding())).dense(steps, steps, real)[:, 0]
        if bool(((shown != seen) & real[:, :, None]).any()):
            return None
    return bool((real == valid).all())
