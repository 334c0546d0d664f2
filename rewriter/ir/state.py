"""What a mixer carries between tokens: named tensors with symbolic shapes and initial values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sympy
import torch

from rewriter.ir.site import AttentionSite

BATCH, KV_HEADS, HEADS, KEY_DIM, VALUE_DIM, HIDDEN, TOKENS = sympy.symbols(
    "B H_kv H D_k D_v D_m N", integer=True, positive=True
)
State = dict[str, torch.Tensor]


class Owned(State):
    """State tensors that nobody reads after the call: the new state may be written over them.

    A cache layer hands its state out so, since it keeps what comes back and drops what it gave.
    Kernels that cannot write in place take no notice.
    """


StateDtype = Literal["model", "float32", "bool", "int64"]
_BYTES: Mapping[str, int] = {"float32": 4, "bool": 1, "int64": 8}


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a state. Axis 0 is always the batch, so beams reorder by index_select(0).

    Attributes:
        name: key in the state.
        shape: symbolic sizes; axis 0 is `BATCH`.
        dtype: 'model' follows the values; accumulators are 'float32' (contract: never less).
        fill: initial value of every element.
    """

    name: str
    shape: tuple[sympy.Expr | int, ...]
    dtype: StateDtype = "model"
    fill: float = 0.0


@dataclass(frozen=True)
class StateSpec:
    """All tensors of a mixer's state, and what a cache may do with it.

    Attributes:
        tensors: the named tensors.
        bounded: no shape depends on the number of tokens seen.
        croppable: the state of a prefix can be recovered (needed by assisted decoding).
    """

    tensors: tuple[StateTensor, ...]
    bounded: bool = True
    croppable: bool = False

    def new(
        self, site: AttentionSite, batch: int, dtype: torch.dtype, device: torch.device
    ) -> State:
        """Initial state of a bounded spec for `batch` rows; `dtype` is that of the values."""
        out: State = {}
        for tensor in self.tensors:
            sizes = [int(sympy.sympify(s).subs(bindings(site, batch))) for s in tensor.shape]
            kind = dtype if tensor.dtype == "model" else getattr(torch, tensor.dtype)
            out[tensor.name] = torch.full(sizes, tensor.fill, dtype=kind, device=device)
        return out

    def bytes(self, model_dtype_bytes: int = 4) -> sympy.Expr:
        """Symbolic size in bytes over (B, H_kv, H, D_k, D_v, D_m, N)."""
        total = sympy.Integer(0)
        for tensor in self.tensors:
            width = _BYTES.get(tensor.dtype, model_dtype_bytes)
            total += sympy.prod([sympy.sympify(s) for s in tensor.shape]) * width
        return total


def bindings(site: AttentionSite, batch: int, tokens: int = 0) -> dict[sympy.Symbol, int]:
    """Values of the size symbols at a site."""
    return {
        BATCH: batch,
        KV_HEADS: site.heads.key_value,
        HEADS: site.heads.query,
        KEY_DIM: site.heads.key_dim,
        VALUE_DIM: site.heads.value_dim,
        HIDDEN: site.hidden_dim,
        TOKENS: tokens,
    }
