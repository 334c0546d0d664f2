"""One mask or bias tensor of a core: how to evaluate it and bring it to (B, H, Nq, Nk)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import nn

from rewriter.ir.site import AddTerm, FillTerm, PositionKind, TermRole
from rewriter.passes.match import bias as biases
from rewriter.passes.match import mask as masks
from rewriter.passes.match.draft import Draft
from rewriter.passes.match.heads import Operands
from rewriter.passes.match.inputs import MaskInput, mask_inputs
from rewriter.passes.match.probe import Probe, run
from rewriter.passes.match.slices import Slice, slice_of
from rewriter.passes.match.view import View
from rewriter.passes.normalise.noops import is_noop
from rewriter.passes.normalise.ops import op

_LONGEST_SLICE = 400
_RANDOM = frozenset(
    {"rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "bernoulli", "randperm"}
    | {"multinomial", "normal", "uniform", "exponential", "dropout", "native_dropout"}
)
_ORDER = ("batch", "kv_head", "group", "query", "key")


@dataclass(frozen=True)
class Term:
    """A term with everything that evaluating it needs.

    Attributes:
        factor: what the term is multiplied by before it is added.
        dims: what is folded into each dimension, outermost first: batch, head, kv_head, group,
            query, key.
        heads: (key/value heads, query heads per key/value head).
    """

    part: Slice
    inputs: tuple[MaskInput, ...]
    fill: FillTerm | None
    factor: float
    dims: tuple[tuple[str, ...], ...]
    heads: tuple[int, int]

    def with_tokens(self) -> Term:
        """The same, its integer inputs of zeros and ones taken for numbers that tokens carry."""
        return replace(self, inputs=tuple(i.as_tokens() for i in self.inputs))

    def learned(self, view: View) -> bool:
        """The term is computed from trainable parameters."""
        tensors = (view.captured.parameter(n.name) for n in self.part.inputs)
        return any(isinstance(t, nn.Parameter) for t in tensors)


@dataclass(frozen=True)
class Reading:
    """allowed (bool) and bias over (B, H, Nq, Nk), sizes 1 where the term broadcasts."""

    allowed: torch.Tensor
    bias: torch.Tensor | None

    @property
    def role(self) -> TermRole:
        hides = not bool(self.allowed.all())
        if self.bias is not None and bool((self.bias != 0).any()):
            return "mask_and_bias" if hides else "bias"
        return "mask" if hides else "none"

    def position(self, allowed: torch.Tensor) -> PositionKind | None:
        """The position scheme that the finite part is where all terms allow, if any."""
        if self.bias is None:
            return None
        shapes = self.bias[0].shape, allowed[0].shape[-2:]
        shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        kind = biases.classify(self.bias[0].expand(shape), allowed[0, :1])
        if kind == "alibi":
            return "alibi"
        return "relative_bias" if kind in ("relative", "dense") else None


def term_of(
    index: int, draft: Draft, named: Operands, tokens: frozenset[sympy.Symbol], view: View
) -> Term | str:
    """The term with this index; a sentence says why it cannot be evaluated."""
    part = slice_of(draft.terms[index].node, view)
    if len(part.nodes) > _LONGEST_SLICE:
        return "the mask depends on activations"
    chance = next((n for n in part.nodes if op(n) in _RANDOM and not is_noop(n)), None)
    if chance is not None:
        return f"the mask is drawn at random by '{op(chance)}'"
    inputs = mask_inputs(part, tokens, view)
    if isinstance(inputs, str):
        return inputs
    fill = next((s for s in draft.steps if isinstance(s, FillTerm) and s.index == index), None)
    if fill is not None and fill.value > masks.HIDDEN:
        return f"hidden scores are filled with {fill.value:g}, which hides nothing"
    layout = named.terms[index].layout
    if any("window" in dim for dim in layout.dims):
        return "it differs between the windows of one row"
    added = (s for s in draft.steps if isinstance(s, AddTerm) and s.index == index)
    factor = next((s.factor for s in added), 1.0)
    heads = (named.heads.key_value, named.heads.group)
    return Term(part, inputs, fill, factor, _dims(index, draft, named), heads)


def _dims(index: int, draft: Draft, named: Operands) -> tuple[tuple[str, ...], ...]:
    """Roles per dimension, query and key tokens told apart."""
    labels = draft.axes.resolve(draft.terms[index].labels)
    key = set(draft.axes.leaves(draft.key_axis))
    out: list[tuple[str, ...]] = []
    for dim, names in zip(labels, named.terms[index].layout.dims, strict=True):
        token = "key" if key & set(dim) else "query"
        out.append(tuple(token if n == "token" else str(n) for n in names))
    return tuple(out)


def read(term: Term, probe: Probe, view: View) -> Reading:
    """Evaluate a term on a probe.

    Raises:
        ProbeError: the slice cannot run on this probe.
    """
    tensor = _canonical(run(term.part, probe, view), term)
    if term.fill is not None:
        return Reading(tensor.bool() if term.fill.keep else ~tensor.bool(), None)
    if tensor.dtype == torch.bool:
        return Reading(tensor, None)
    return Reading(*masks.split_additive(tensor.float() * term.factor))


def _canonical(tensor: torch.Tensor, term: Term) -> torch.Tensor:
    known = {"kv_head": term.heads[0], "group": term.heads[1]}
    shape: list[int] = []
    roles: list[str] = []
    for size, names in zip(tensor.shape, term.dims, strict=True):
        flat = [n for name in names for n in _parts(name)]
        rest = size
        for name in flat:
            rest //= known.get(name, 1)
        shape.extend(known.get(name, rest) for name in flat)
        roles.extend(flat)
    tensor = tensor.reshape(shape).permute([roles.index(r) for r in _ORDER if r in roles])
    for place, role in enumerate(_ORDER):
        if role not in roles:
            tensor = tensor.unsqueeze(place)
    batch, kv, group, queries, keys = tensor.shape
    if (kv, group) != (1, 1):
        tensor = tensor.expand(batch, *term.heads, queries, keys)
    return tensor.reshape(batch, tensor.shape[1] * tensor.shape[2], queries, keys)


def _parts(name: str) -> Sequence[str]:
    return ("kv_head", "group") if name == "head" else (name,)
