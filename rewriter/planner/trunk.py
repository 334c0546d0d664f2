"""What a model does around the cores of its attention: products with weights, and the rest.

Read off the operations of two small calls of the model, of different batch and length: a product
with a parameter is a matrix, what grows with the number of tokens is pointwise work, and what grows
faster belongs to a core. Nothing is known about classes or configs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.errors import UsageError
from rewriter.evaluate.scoring import evaluation_mode
from rewriter.ir.state import BATCH, TOKENS
from rewriter.passes.examples import Examples, examples_for
from rewriter.passes.realise.apply import call_sizes
from rewriter.planner.work import Phase, Work, matrix_work

_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.linear.", "aten.bmm.", "aten.baddbmm.")


@dataclass(frozen=True)
class Matrix:
    """`count` products of every token with a weight (inputs, outputs).

    Attributes:
        head: it makes the model's output, so a prefill that generates runs it on one token a row.
    """

    inputs: int
    outputs: int
    count: int
    head: bool = False


@dataclass(frozen=True)
class Trunk:
    """Everything of a model but its cores.

    Attributes:
        matrices: products with weights.
        elements: values read and written by all other operations, per token.
        calls: operations of one forward, views left out.
        parameters: values of all weights, shared ones once.
    """

    matrices: tuple[Matrix, ...]
    elements: float
    calls: int
    parameters: int

    def parts(self, phase: Phase, width: int = 4, all_logits: bool = False) -> list[Work]:
        """The work over B and N; see `work`.

        Args:
            width: bytes of a value.
            all_logits: a prefill makes the output of every token, not of the last alone.
        """
        tokens = BATCH * (TOKENS if phase == "prefill" else 1)
        out = []
        for m in self.matrices:
            rows = BATCH if m.head and not all_logits else tokens
            name = f"{m.inputs} x {m.outputs}"
            out.append(matrix_work(name, m.inputs, m.outputs, rows, width, m.count))
        rest = Work("pointwise", tokens * 0, tokens * width * self.elements, self.calls)
        return [*out, rest]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trunk:
        matrices = tuple(Matrix(**m) for m in data["matrices"])
        return cls(matrices, data["elements"], data["calls"], data["parameters"])


def trunk_of(model: nn.Module, examples: Examples | None = None) -> Trunk:
    """Read the trunk off a model by two small calls of it.

    Raises:
        UsageError: the model multiplies nothing with a parameter.
    """
    examples = examples if examples is not None else examples_for(model)
    with evaluation_mode(model):
        first, second = (
            recorded(model, c.args, c.kwargs) for c in (examples.primary, examples.resized)
        )
    sizes = [call_sizes(c) for c in (examples.primary, examples.resized)]
    tokens = [s["batch"] * s["tokens"] for s in sizes]
    if not first.products:
        raise UsageError("no operation of the model multiplies with a parameter")
    last = first.products[-1]
    head = last if last[1] == examples.vocabulary else None
    counts = Counter(first.products)
    if head is not None:
        counts[head] -= 1
    matrices = [Matrix(i, o, n) for (i, o), n in counts.items() if n]
    if head is not None:
        matrices.append(Matrix(*head, 1, head=True))
    return Trunk(
        tuple(matrices),
        _per_token(first.moved, second.moved, tokens),
        first.calls,
        sum(p.numel() for p in model.parameters()),
    )


def _per_token(first: Sequence[int], second: Sequence[int], tokens: Sequence[int]) -> float:
    """Elements of the operations whose size is proportional to the tokens."""
    if len(first) != len(second):  # the calls ran different operations: take all of the first
        return sum(first) / tokens[0]
    both = zip(first, second, strict=True)
    return sum(a for a, b in both if a * tokens[1] == b * tokens[0]) / tokens[0]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what runs.

    Attributes:
        products: (inputs, outputs) of each product with a parameter of the model.
        moved: values read and written by each other operation, cores that are one operation and
            views left out.
        calls: operations, views left out.
    """

    def __init__(self, model: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.products: list[tuple[int, int]] = []
        self.moved: list[int] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not results or _is_view(func):
            return out
        self.calls += 1
        name = str(func)
        weight = next((t for t in tensors if t.dim() >= 2 and self._owned(t)), None)
        if name.startswith(_PRODUCTS) and weight is not None:
            inner = tensors[-2].shape[-1] if "addmm" in name else tensors[0].shape[-1]
            self.products.append((int(inner), int(results[0].shape[-1])))
        elif not name.startswith(_PRODUCTS) and "attention" not in name:
            read = sum(t.numel() for t in tensors if not self._owned(t))
            self.moved.append(read + sum(r.numel() for r in results))
        return out

    def _owned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.known


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


def recorded(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recorder:
    """What one call of a module runs, without gradients."""
    recorder = Recorder(module)
    with torch.no_grad(), recorder:
        module(*args, **kwargs)
    return recorder
