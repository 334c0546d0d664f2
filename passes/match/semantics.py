"""What the mask and bias tensors of a core mean, found by evaluating them."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from rewriter.ir.mask import Atom, Causal, KeyPadding, Mask
from rewriter.ir.site import FillTerm, PositionKind, TermRole
from rewriter.passes.match import bias as biases
from rewriter.passes.match import mask as masks
from rewriter.passes.match.draft import Draft
from rewriter.passes.match.heads import Operands
from rewriter.passes.match.inputs import MaskInput, mask_inputs
from rewriter.passes.match.probe import Probe, ProbeError, number, run
from rewriter.passes.match.slices import Slice, integer_constants, slice_of
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import value
from rewriter.passes.torch_private import symbolic_expression

_ROWS = 2
_DENSE = 300
_FALLBACK = 5000
_LONGEST_SLICE = 400


@dataclass(frozen=True)
class Meaning:
    """Roles of the terms, and the mask they and the causal flag make together."""

    roles: tuple[TermRole, ...]
    mask: Mask
    position: PositionKind | None = None


@dataclass(frozen=True)
class _Term:
    """A term with everything that evaluating it needs.

    `axes` lists, per dimension of the term, (role, size) of what is folded into it, outermost
    first; a size of 0 stands for the batch or token count of the probe.
    """

    part: Slice
    inputs: tuple[MaskInput, ...]
    fill: FillTerm | None
    dims: tuple[tuple[str, ...], ...]
    heads: tuple[int, int]


@dataclass(frozen=True)
class _Reading:
    """allowed and bias over (B, H, Nq, Nk), sizes 1 where the term broadcasts."""

    allowed: torch.Tensor
    bias: torch.Tensor | None


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
            self._known[key] = _Evaluation(draft, named, self._view).meaning(atoms)
        return self._known[key]


class _Evaluation:
    """Evaluates the terms of one core."""

    def __init__(self, draft: Draft, named: Operands, view: View) -> None:
        self._view = view
        self._draft = draft
        self._named = named
        self._sizes = self._token_sizes()

    def _token_sizes(self) -> tuple[sympy.Expr, sympy.Expr]:
        """Symbolic numbers of queries and keys."""
        return (
            self._size(self._draft.query.node, self._draft.query.labels, self._draft.query_axis),
            self._size(self._draft.key.node, self._draft.key.labels, self._draft.key_axis),
        )

    def _size(
        self, node: fx.Node, labels: tuple[tuple[int, ...], ...], axis: tuple[int, ...]
    ) -> sympy.Expr:
        axes = self._draft.axes
        val = value(node)
        assert val is not None
        for dim, size in zip(axes.resolve(labels), val.shape, strict=True):
            if dim == axes.leaves(axis):
                return symbolic_expression(size)
        return sympy.Integer(axes.total(axes.leaves(axis)))

    def meaning(self, atoms: tuple[Atom, ...]) -> Meaning:
        terms: list[_Term] = []
        unknown: tuple[TermRole, ...] = ("mask",) * len(self._named.terms)
        for index in range(len(self._named.terms)):
            term = self._term(index)
            if isinstance(term, str):
                return Meaning(unknown, Mask(opaque=term))
            terms.append(term)
        try:
            return self._evaluate(terms, atoms)
        except ProbeError as error:
            return Meaning(unknown, Mask(opaque=f"the mask cannot be evaluated: {error}"))

    def _term(self, index: int) -> _Term | str:
        node = self._draft.terms[index].node
        part = slice_of(node, self._view)
        if len(part.nodes) > _LONGEST_SLICE:
            return "the mask depends on activations"
        tokens = frozenset(s for e in self._sizes for s in e.free_symbols)
        inputs = mask_inputs(part, tokens, self._view)
        if isinstance(inputs, str):
            return inputs
        fill = next(
            (s for s in self._draft.steps if isinstance(s, FillTerm) and s.index == index), None
        )
        if fill is not None and fill.value > masks.HIDDEN:
            return f"hidden scores are filled with {fill.value:g}, which hides nothing"
        heads = self._named.heads
        return _Term(part, inputs, fill, self._dims(index), (heads.key_value, heads.group))

    def _dims(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Roles per dimension, query and key tokens told apart."""
        draft, layout = self._draft, self._named.terms[index].layout
        labels = draft.axes.resolve(draft.terms[index].labels)
        out: list[tuple[str, ...]] = []
        for dim, names in zip(labels, layout.dims, strict=True):
            token = "key" if set(draft.axes.leaves(draft.key_axis)) & set(dim) else "query"
            out.append(tuple(token if n == "token" else n for n in names))
        return tuple(out)

    # -- probing ---------------------------------------------------------------------------

    def _evaluate(self, terms: list[_Term], atoms: tuple[Atom, ...]) -> Meaning:
        constants = sorted({c for t in terms for c in integer_constants(t.part)})
        readings = [self._read(t, self._probe(t, 11)) for t in terms]
        roles = tuple(self._role(r) for r in readings)
        position = next((p for r in readings if (p := self._position(r)) is not None), None)
        if any(not bool(r.allowed.all()) for r in readings) or constants or atoms:
            mask = self._fit(terms, constants, atoms)
        else:
            mask = Mask(atoms)
        if mask.opaque is not None:
            return Meaning(roles, mask, position)
        reason = self._content(terms)
        padding = reason or self._padding(terms, mask)
        if isinstance(padding, str):
            return Meaning(roles, Mask(opaque=padding), position)
        if padding:
            mask = Mask((*mask.atoms, KeyPadding()))
        padded = [self._hides_padding(t) for t in terms]
        roles = tuple(
            _with_mask(role) if hides else role for role, hides in zip(roles, padded, strict=True)
        )
        return Meaning(roles, mask, position)

    def _fit(self, terms: list[_Term], constants: list[int], atoms: tuple[Atom, ...]) -> Mask:
        evaluations: list[masks.Evaluated] = []
        small = [c for c in constants if 2 * c + 3 <= _DENSE]
        for length in masks.lengths_to_probe(small, _DENSE):
            allowed = self._allowed(terms, [self._probe(t, length) for t in terms], atoms)
            if isinstance(allowed, str):
                return Mask(opaque=allowed)
            evaluations.append(masks.Evaluated.dense(allowed))
            if not self._dynamic:
                break
        large = [c for c in constants if 2 * c + 3 > _DENSE]
        if not self._dynamic:
            seen = evaluations[0].allowed.shape[-1]
            beyond = [c for c in constants if c >= seen] if not evaluations[0].allowed.all() else []
            if beyond:
                return Mask(opaque="the sequence length was fixed by the capture")
            large = []
        for c in large:
            found = self._sampled(terms, c, atoms, evaluations)
            if isinstance(found, str):
                return Mask(opaque=found)
            evaluations.append(found)
        mask = masks.fit(evaluations, constants)
        return mask or Mask(opaque="it fits no known combination of masks")

    def _sampled(
        self,
        terms: list[_Term],
        constant: int,
        atoms: tuple[Atom, ...],
        before: list[masks.Evaluated],
    ) -> masks.Evaluated | str:
        """Evaluate at sampled positions; where the graph does not allow that, at full length."""
        positions = masks.positions_to_sample([constant])
        for whole in (True, False):
            try:
                probes = [self._probe(t, positions.numel(), positions, whole) for t in terms]
                allowed = self._allowed(terms, probes, atoms)
            except ProbeError:
                continue
            if isinstance(allowed, str):
                continue
            found = masks.Evaluated(allowed, positions, positions)
            if masks.fit([*before, found], [constant]) is not None:
                return found
        length = constant + 2
        if length > _FALLBACK:
            return f"a size of {constant} in the graph is too large to evaluate"
        try:
            allowed = self._allowed(terms, [self._probe(t, length) for t in terms], atoms)
        except ProbeError:
            return before[-1]  # the graph itself cannot run at this length
        return allowed if isinstance(allowed, str) else masks.Evaluated.dense(allowed)

    def _allowed(
        self, terms: list[_Term], probes: list[Probe], atoms: tuple[Atom, ...]
    ) -> torch.Tensor | str:
        """(Nq, Nk) visibility without padding, or why there is none."""
        out: torch.Tensor | None = None
        for term, probe in zip(terms, probes, strict=True):
            allowed = self._read(term, probe).allowed
            if bool((allowed != allowed[:1, :1]).any()):
                return "the mask differs between heads or rows of the batch"
            out = allowed[0, 0] if out is None else out & allowed[0, 0]
        assert out is not None
        probe = probes[0]
        wanted = [int(number_of(e, probe)) for e in self._sizes]
        out = out.expand(wanted[0], wanted[1]).clone()
        if atoms:
            rows, columns = torch.arange(wanted[0]), torch.arange(wanted[1])
            if probe.positions is not None:
                rows = columns = probe.positions
            out &= Mask(atoms).dense(rows, columns)
        return out

    @property
    def _dynamic(self) -> bool:
        return bool(self._sizes[0].free_symbols)

    def _probe(
        self,
        term: _Term,
        length: int,
        positions: torch.Tensor | None = None,
        whole: bool = True,
        padding: torch.Tensor | None = None,
        seed: int = 0,
    ) -> Probe:
        """Inputs of neutral value; `padding` (B, N) bool replaces those of padding inputs."""
        sizes: dict[sympy.Symbol, int] = {}
        for symbol in self._sizes[0].free_symbols:
            sizes[symbol] = length
        for symbol in self._sizes[1].free_symbols - self._sizes[0].free_symbols:
            sizes[symbol] = length + 5
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, torch.Tensor] = {}
        for item in term.inputs:
            val = value(item.node)
            assert val is not None
            shape = [number(s, sizes) for s in val.shape]
            if positions is not None and whole:
                shape[-1] = int(positions.max()) + 1
            if item.kind == "padding":
                neutral = self._neutral(term, item)
                valid = torch.ones(shape) if padding is None else padding.expand(shape).float()
                inputs[item.node.name] = (valid if neutral else 1 - valid).to(val.dtype)
            elif item.kind == "positions":
                steps = torch.arange(shape[-1])
                if positions is not None and not whole:
                    steps = positions
                inputs[item.node.name] = steps.expand(shape).to(val.dtype).contiguous()
            else:
                inputs[item.node.name] = torch.randint(
                    0, max(item.high, 2), shape, generator=generator
                ).to(val.dtype)
        return Probe(sizes, inputs, positions)

    def _neutral(self, term: _Term, item: MaskInput) -> bool:
        """True if ones mean valid. Decided by which constant value leaves more keys visible."""
        val = value(item.node)
        assert val is not None
        visible = []
        for fill in (0, 1):
            sizes = {s: 11 for e in self._sizes for s in e.free_symbols}
            inputs = {item.node.name: torch.full([number(s, sizes) for s in val.shape], fill)}
            for other in term.inputs:
                if other is not item:
                    shape = [number(s, sizes) for s in _shape(other.node)]
                    ones = torch.ones(shape) if other.kind == "padding" else torch.arange(shape[-1])
                    inputs[other.node.name] = ones.expand(shape).long()
            inputs[item.node.name] = inputs[item.node.name].to(val.dtype)
            reading = self._read(term, Probe(sizes, inputs))
            visible.append(float(reading.allowed.double().mean()))
        return visible[1] >= visible[0]

    # -- padding and content ---------------------------------------------------------------

    def _content(self, terms: list[_Term]) -> str | None:
        for term in terms:
            if not any(i.kind == "tokens" for i in term.inputs):
                continue
            one, two = (self._read(term, self._probe(term, 11, seed=s)) for s in (1, 2))
            if not torch.equal(one.allowed, two.allowed):
                return "the mask depends on token values"
        return None

    def _padding(self, terms: list[_Term], mask: Mask) -> bool | str:
        """True if padding inputs hide exactly the padded keys, False if they hide nothing."""
        if not any(i.kind == "padding" for t in terms for i in t.inputs):
            return False
        hides = False
        for valid in self._patterns():
            length = valid.shape[1]
            seen = torch.ones(_ROWS, 1, 1, 1, dtype=torch.bool)
            for term in terms:
                seen = seen & self._read(term, self._probe(term, length, padding=valid)).allowed
            rows, columns = torch.arange(length), torch.arange(seen.shape[-1])
            base = mask.dense(torch.arange(seen.shape[-2]), columns)
            if seen.shape[-2] == 1:
                base = mask.dense(rows, columns)
            wanted = base[None, None] & valid[:, None, None, :]
            alive = wanted.any(-1, keepdim=True)
            seen, wanted, alive = torch.broadcast_tensors(seen, wanted, alive)
            if torch.equal(seen & alive, wanted & alive):
                hides = True
            elif not torch.equal(seen, base.expand_as(seen)):
                return "padding does more than hide padded keys"
        return hides

    def _patterns(self) -> list[torch.Tensor]:
        length = 11
        right = torch.ones(_ROWS, length, dtype=torch.bool)
        left = right.clone()
        right[0, 7:] = False
        left[0, :3] = False
        both = right & left
        both[1, 9:] = False
        return [right, left, both]

    def _hides_padding(self, term: _Term) -> bool:
        if not any(i.kind == "padding" for i in term.inputs):
            return False
        plain = self._read(term, self._probe(term, 11)).allowed
        padded = self._read(term, self._probe(term, 11, padding=self._patterns()[0])).allowed
        plain, padded = torch.broadcast_tensors(plain, padded)
        return not torch.equal(plain, padded)

    # -- reading ---------------------------------------------------------------------------

    def _read(self, term: _Term, probe: Probe) -> _Reading:
        tensor = self._canonical(run(term.part, probe, self._view), term)
        if term.fill is not None:
            allowed = tensor.bool() if term.fill.keep else ~tensor.bool()
            return _Reading(allowed, None)
        if tensor.dtype == torch.bool:
            return _Reading(tensor, None)
        allowed, finite = masks.split_additive(tensor.float())
        return _Reading(allowed, finite)

    def _canonical(self, tensor: torch.Tensor, term: _Term) -> torch.Tensor:
        """(B, H, Nq, Nk) with sizes 1 where the term broadcasts."""
        order = ("batch", "kv_head", "group", "query", "key")
        known = {"kv_head": term.heads[0], "group": term.heads[1]}
        shape: list[int] = []
        roles: list[str] = []
        for size, names in zip(tensor.shape, term.dims, strict=True):
            flat = [n for name in names for n in _expanded(name)]
            rest = size
            for name in flat:
                rest = rest // known[name] if name in known else rest
            shape.extend(known.get(name, rest) for name in flat)
            roles.extend(flat)
        tensor = tensor.reshape(shape)
        tensor = tensor.permute([roles.index(r) for r in order if r in roles])
        for place, role in enumerate(order):
            if role not in roles:
                tensor = tensor.unsqueeze(place)
        batch, kv, group, queries, keys = tensor.shape
        if (kv == 1) != (group == 1) and term.heads[0] > 1 and term.heads[1] > 1:
            kv, group = term.heads
            tensor = tensor.expand(batch, kv, group, queries, keys)
        return tensor.reshape(batch, kv * group, queries, keys)

    def _role(self, reading: _Reading) -> TermRole:
        hides = not bool(reading.allowed.all())
        biased = reading.bias is not None and bool((reading.bias != 0).any())
        if hides and biased:
            return "mask_and_bias"
        return "mask" if hides else "bias" if biased else "none"

    def _position(self, reading: _Reading) -> PositionKind | None:
        if reading.bias is None:
            return None
        allowed, bias = torch.broadcast_tensors(reading.allowed, reading.bias)
        kind = biases.classify(bias[0], allowed[0])
        if kind == "alibi":
            return "alibi"
        return "relative_bias" if kind in ("relative", "dense") else None


def _expanded(name: str) -> tuple[str, ...]:
    return ("kv_head", "group") if name == "head" else (name,)


def _with_mask(role: TermRole) -> TermRole:
    return {"none": "mask", "bias": "mask_and_bias"}.get(role, role)  # type: ignore[return-value]


def _shape(node: fx.Node) -> torch.Size:
    val = value(node)
    assert val is not None
    return val.shape


def number_of(expression: sympy.Expr, probe: Probe) -> int:
    """An expression under the probe's sizes."""
    return int(expression.subs({s: probe.sizes.get(s, 2) for s in expression.free_symbols}))
