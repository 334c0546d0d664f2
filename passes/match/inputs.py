"""What the inputs of a mask slice are, and which values to probe them with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch
from torch import fx

from rewriter.passes.match.slices import Slice
from rewriter.passes.match.view import View
from rewriter.passes.normalise.ops import value
from rewriter.passes.torch_private import symbolic_expression

InputKind = Literal["padding", "positions", "tokens", "counts"]
"""By example: zeros and ones, 0 1 2 ..., other integers over the tokens, integers that are not."""


@dataclass(frozen=True)
class MaskInput:
    """One input of the call that a mask depends on: (batch, tokens) or (tokens,)."""

    node: fx.Node
    kind: InputKind
    whole: bool

    def as_tokens(self) -> MaskInput:
        """A row of zeros and ones may number two documents as well as mark padding."""
        marks = self.kind == "padding" and self.whole
        return replace(self, kind="tokens") if marks else self


def mask_inputs(
    part: Slice, tokens: frozenset[sympy.Symbol], view: View
) -> tuple[MaskInput, ...] | str:
    """Classify the inputs by their example values; a sentence says why one cannot be probed."""
    out: list[MaskInput] = []
    for node in part.inputs:
        if node.name not in view.captured.inputs:
            continue
        val = value(node)
        if val is None:
            return f"the mask depends on '{node.name}', which is no tensor"
        example = example_of(node, view)
        over_tokens = [bool(symbolic_expression(s).free_symbols & tokens) for s in val.shape]
        kind = _kind(example, any(over_tokens) or (not tokens and val.dim() > 0))
        if val.is_floating_point() and val.dim() >= 3 and not (over_tokens and over_tokens[-1]):
            return f"the mask depends on the activation '{node.name}'"
        if sum(over_tokens) >= 2 or kind is None or (val.dim() >= 3 and kind != "padding"):
            return "mask is an input of the captured module"
        whole = not example.is_floating_point() and example.dtype != torch.bool
        out.append(MaskInput(node, kind, whole))
    return tuple(out)


def _kind(example: torch.Tensor, over_tokens: bool) -> InputKind | None:
    whole = not example.is_floating_point() and example.dtype != torch.bool
    if whole and not over_tokens and example.dim() <= 1:
        return "counts"
    if bool(((example == 0) | (example == 1)).all()):
        return "padding"
    if example.is_floating_point():
        return None
    steps = torch.arange(example.shape[-1]).expand_as(example)
    return "positions" if torch.equal(example.cpu(), steps) else "tokens"


def example_of(node: fx.Node, view: View) -> torch.Tensor:
    """The example value of an input placeholder."""
    root, *path = view.captured.inputs[node.name].split(".")
    item: Any = view.captured.args if root == "args" else view.captured.kwargs
    for key in path:
        if isinstance(item, list | tuple):
            item = item[int(key)]
        else:
            item = item[key] if hasattr(item, "__getitem__") else getattr(item, key)
    assert isinstance(item, torch.Tensor)
    return item
