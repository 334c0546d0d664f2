"""From the run-time mask and bias tensors of a site to `valid` and `bias`.

What a mask means was proved at match time; at run time the tensor adds only which tokens are
padding. That it still means the same is checked on every call with new tensors, since dropping a
mask silently would be a bug. A new key is padding iff no query may see it. The verdict is kept on
the mask tensor itself, so layers that share a mask share the check and it goes away with the mask.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rewriter.errors import UnsupportedError
from rewriter.ir.given import has_labels, labels_of
from rewriter.ir.site import AddTerm, AttentionSite, FillTerm, Scale

_NOTE = "_attention_rewriter_split"
NO_MASK = ("none", "sink", "temperature")
_CACHED = 2**17  # mask entries that are looked at together
_OVERFLOWS = -1e30  # a product of such a number with a small one is -inf
_NEVER = -1000.0  # a pure mask hides below this: exp(-1000) is 0 in every dtype


@dataclass(frozen=True)
class SplitTerms:
    """`valid`: (B, n) bool or None if every new token is valid; `bias`: (1|B, 1|H, 1|n, seen + n).

    Column j of `bias` belongs to the key at position j; hidden entries are 0. `labels`, of masks
    with documents or groups, is what `ir.given.labels_of` reads off the mask, (1|B, n).
    """

    valid: torch.Tensor | None
    bias: torch.Tensor | None
    labels: torch.Tensor | None = None

    def of_batch(self, batch: int) -> SplitTerms:
        """`valid` for all rows, also where one mask row serves the whole batch."""
        rows = (t if t is None else t.expand(batch, -1) for t in (self.valid, self.labels))
        valid, labels = rows
        return SplitTerms(valid, self.bias, labels)


@dataclass(frozen=True)
class _Part:
    """One term: which keys it hides and what it adds, at least one of them not None."""

    allow: torch.Tensor | None
    bias: torch.Tensor | None


def split(
    site: AttentionSite, terms: Sequence[torch.Tensor | None], seen: int, new: int
) -> SplitTerms:
    """Split the run-time terms of a site.

    Args:
        site: roles and score steps say what each term is.
        terms: in the order of `site.terms`; each broadcasts to (B, H, new, Nk), None means the
            caller gave no such tensor, so nothing is padded or added.
        seen: tokens before the new ones.
        new: number of new tokens.

    Raises:
        UnsupportedError: a mask hides or shows other keys than the one the model was traced with.
    """
    given = [(i, t) for i, t in enumerate(terms) if t is not None and site.terms[i] not in NO_MASK]
    if not given:
        return SplitTerms(None, None)
    tensors = tuple(t for _, t in given)
    bias = _bias(site, given, seen + new)
    hiding = [(i, _four(t)) for i, t in given if _hides(site, i, t)]
    if not hiding:
        return SplitTerms(None, bias)
    if not _readable(tensors):
        return SplitTerms(_valid(site, hiding, seen, new, check=False)[0], bias)
    key = (site.mask, site.score, site.terms, site.causal_flag, seen, new)
    note = _recall(tensors, key)
    if note is None:
        note = _Note(*_valid(site, hiding, seen, new, check=True))
        _remember(tensors, key, note)
    return SplitTerms(note.valid, bias, note.labels)


def whole(
    site: AttentionSite, terms: Sequence[torch.Tensor | None], keys: int
) -> torch.Tensor | None:
    """Everything that the terms add to the scores, (1|B, 1|H, 1|Nq, Nk); None if some fill them.

    What is hidden stays as the model wrote it; only values that would overflow are -inf.
    """
    parts: list[torch.Tensor] = []
    for index, term in enumerate(terms):
        if term is None or site.terms[index] in NO_MASK:
            continue
        added = _added(site, index)
        if added is None or term.dtype == torch.bool:
            return None
        factor = added.factor * _later(site, added)
        parts.append(_four(term) if factor == 1.0 else _four(term) * factor)
    total = _align(functools.reduce(torch.add, parts), keys)
    if float(total.detach().amin()) < _OVERFLOWS:
        total = total.masked_fill(total < _OVERFLOWS, -torch.inf)
    return total


def keys_seen(
    site: AttentionSite, terms: Sequence[torch.Tensor | None], keys: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of cross attention: the keys that are no padding, (1|B, Nk) bool or None if all are; bias.

    Raises:
        UnsupportedError: some queries may see other keys than others.
    """
    given = [(i, t) for i, t in enumerate(terms) if t is not None and site.terms[i] not in NO_MASK]
    bias = _bias(site, given, keys) if given else None
    hiding = [(i, _four(t)) for i, t in given if _hides(site, i, t)]
    if not hiding:
        return None, bias
    shown = _shown(site, hiding, slice(None))
    valid = shown[:, 0, 0]
    if bool((shown != valid[:, None, None, :]).any()):
        raise UnsupportedError(f"'{site.fqn}': the mask passed now differs between its queries")
    return None if bool(valid.all()) else valid, bias


def all_visible(
    site: AttentionSite, terms: Sequence[torch.Tensor | None], first: int, keys: int
) -> bool:
    """Whether the mask tensors of one new token hide none of the keys [first, keys) of any row."""
    for index, term in enumerate(terms):
        if term is None or site.terms[index] in NO_MASK:
            continue
        allow = _part(site, index, _four(term)).allow
        if allow is not None and not bool(allow[..., first:keys].all()):
            return False
    return True


def _readable(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether the values can be read: not while a graph is traced or compiled."""
    return not torch.compiler.is_compiling() and not any(
        isinstance(t, FakeTensor) or t.is_meta for t in tensors
    )


Given = list[tuple[int, torch.Tensor]]  # terms by their index, four-dimensional


def _bias(site: AttentionSite, given: Given, length: int) -> torch.Tensor | None:
    if not site.has_bias:
        return None
    parts = [_part(site, index, _four(term)).bias for index, term in given]
    biases = [_align(bias, length) for bias in parts if bias is not None]
    return functools.reduce(torch.add, biases) if biases else None


def _hides(site: AttentionSite, index: int, term: torch.Tensor) -> bool:
    """Whether a term may hide keys."""
    filled = any(isinstance(s, FillTerm) and s.index == index for s in site.score)
    return filled or term.dtype == torch.bool or site.terms[index] != "bias"


def _shown(site: AttentionSite, hiding: Given, rows: slice) -> torch.Tensor:
    """(1|B, 1|H, 1|n, Nk) bool: the keys that no term hides, for some of the queries."""
    parts = []
    for index, term in hiding:
        part = _part(site, index, term if term.shape[-2] == 1 else term[:, :, rows])
        assert part.allow is not None
        parts.append(part.allow)
    return functools.reduce(torch.logical_and, parts)


def _valid(
    site: AttentionSite, hiding: Given, seen: int, new: int, *, check: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which new tokens are real, (1|B, new), or None if all are; and their labels if they have."""
    shapes = (term.shape for _, term in hiding)
    columns = torch.broadcast_shapes(*shapes)[-1]  # type: ignore[no-untyped-call]
    if columns < new:
        raise UnsupportedError(
            f"'{site.fqn}': the mask has {columns} key columns for {new} new tokens after "
            f"{seen}; pass a mask that covers the new tokens"
        )
    pieces = _pieces(hiding, new, columns) if check else [slice(None)]
    real = functools.reduce(
        torch.logical_or, (_shown(site, hiding, rows).any(-2).any(1) for rows in pieces)
    )  # (1|B, Nk)
    start = seen if columns >= seen + new else columns - new
    valid = real[:, start : start + new]
    if not check:
        return valid, None
    labels = None
    if has_labels(site.mask):
        labels = _labels(site, _shown(site, hiding, slice(None)), valid, seen)
    else:
        for rows in pieces:
            _check(site, _shown(site, hiding, rows), real, valid, seen, new, rows)
    return None if bool(valid.all()) else valid, labels


def _labels(
    site: AttentionSite, allow: torch.Tensor, valid: torch.Tensor, seen: int
) -> torch.Tensor:
    """Documents or groups of a call without earlier tokens, (1|B, n)."""
    labels = None
    if not seen and allow.shape[1] == 1 and allow.shape[-1] == allow.shape[-2]:
        shown = allow[:, 0]
        if site.causal_flag:  # it hides keys beside the tensor, which need not hide them again
            shown = shown.tril()
        labels = labels_of(site.mask, shown, valid)
    if labels is None:
        raise UnsupportedError(
            f"'{site.fqn}': the mask passed now is not {site.mask.describe()} over the tokens of "
            "this call"
        )
    return labels


def _pieces(hiding: Given, new: int, columns: int) -> list[slice]:
    """The new queries in pieces whose masks stay in a processor's cache: N x N would not."""
    rows = max(int(term.shape[0] * term.shape[1]) for _, term in hiding)
    size = max(16, _CACHED // max(1, rows * columns))
    return [slice(at, min(at + size, new)) for at in range(0, new, size)] or [slice(0, 0)]


def _part(site: AttentionSite, index: int, term: torch.Tensor) -> _Part:
    """What one term hides and adds, by its step in the score and its role."""
    role = site.terms[index]
    fill = next((s for s in site.score if isinstance(s, FillTerm) and s.index == index), None)
    if fill is not None:
        chosen = term.bool()
        return _Part(chosen if fill.keep else ~chosen, None)
    added = _added(site, index)
    if added is None:
        raise UnsupportedError(f"'{site.fqn}': nothing is known about its mask tensor {index}")
    if term.dtype == torch.bool:
        return _Part(term, None)
    if added.factor != 1.0:
        term = term * added.factor
    if role == "mask":
        return _Part(term > _NEVER, None)
    factor = _later(site, added)
    bias = term if factor == 1.0 else term * factor
    if role == "bias":
        return _Part(None, bias)
    allow = term > torch.finfo(term.dtype).min / 2
    return _Part(allow, torch.where(allow, bias, 0.0))


def _added(site: AttentionSite, index: int) -> AddTerm | None:
    """The step that adds a term."""
    return next((s for s in site.score if isinstance(s, AddTerm) and s.index == index), None)


def _later(site: AttentionSite, added: AddTerm) -> float:
    """What the scores are multiplied by once a term was added."""
    steps = site.score[site.score.index(added) + 1 :]
    return math.prod(s.factor for s in steps if isinstance(s, Scale) and s.on == "scores")


def _four(term: torch.Tensor) -> torch.Tensor:
    """(…, Nq, Nk) with leading axes of size 1 up to four."""
    return term[(None,) * (4 - term.dim())] if term.dim() < 4 else term


def _align(bias: torch.Tensor, length: int) -> torch.Tensor:
    """Columns 0 … length - 1: a static cache shows more, a sliding cache only the last."""
    columns = bias.shape[-1]
    if columns >= length:
        return bias[..., :length]
    return torch.nn.functional.pad(bias, (length - columns, 0))


def _check(
    site: AttentionSite,
    allow: torch.Tensor,
    real: torch.Tensor,
    valid: torch.Tensor,
    seen: int,
    new: int,
    rows: slice,
) -> None:
    """Compare the tensor with the predicate on the valid queries among `rows`."""
    columns = allow.shape[-1]
    queries = torch.arange(seen, seen + new, device=allow.device)[rows]
    first = max(0, seen + new - columns)
    keys = torch.arange(first, first + columns, device=allow.device)
    # The causal flag hides keys beside the tensor, and a tensor need not hide them again.
    expected = site.mask.dense(queries, keys)[None, None] & real[:, None, None, :]
    shown = allow & (keys <= queries[:, None]) if site.causal_flag else allow
    wrong = (shown != expected) & valid[:, None, rows, None]
    if bool(wrong.any()):
        raise UnsupportedError(
            f"'{site.fqn}': the mask passed now differs from {site.mask.describe()}, the mask this "
            "model was traced with (packed documents or a custom mask, say); pass plain padding "
            "masks, or keep this layer's original attention"
        )


def _owner(term: torch.Tensor) -> torch.Tensor:
    """The tensor that views of one mask share; each layer may slice its own view."""
    base: torch.Tensor | None = term._base
    return term if base is None else base


def _layout(term: torch.Tensor) -> tuple[object, ...]:
    return term._version, tuple(term.shape), term.stride(), term.storage_offset(), term.dtype


class _Note:
    """What is remembered on a mask: `valid`, and of which tensors and call. Never pickled."""

    def __init__(
        self, valid: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> None:
        self.valid, self.labels = valid, labels
        self.owners: tuple[weakref.ref[torch.Tensor], ...] = ()
        self.facts: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type[_Note], tuple[()]]:
        return _Note, ()


def _recall(tensors: tuple[torch.Tensor, ...], key: object) -> _Note | None:
    if any(t.is_inference() for t in tensors):
        return None  # inference tensors do not say when they change
    note = getattr(_owner(tensors[0]), _NOTE, None)
    if not isinstance(note, _Note) or note.facts != (key, *map(_layout, tensors)):
        return None
    same = all(ref() is _owner(t) for ref, t in zip(note.owners, tensors, strict=True))
    return note if same else None


def _remember(tensors: tuple[torch.Tensor, ...], key: object, note: _Note) -> None:
    if any(t.is_inference() for t in tensors):
        return
    note.owners = tuple(weakref.ref(_owner(t)) for t in tensors)
    note.facts = (key, *map(_layout, tensors))
    setattr(_owner(tensors[0]), _NOTE, note)
