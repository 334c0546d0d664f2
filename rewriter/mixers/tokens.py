"""What a mixer is given: the new tokens of a call, and how a kernel spec is run on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.registry import resolve
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.kernels import KernelSpec, state_of
from rewriter.ir.state import Owned, State


@dataclass(frozen=True)
class Tokens:
    """n new tokens after those in `state`.

    Attributes:
        q, k, v: (B, H, n, Dk), (B, Hkv, n, Dk), (B, Hkv, n, Dv).
        hidden: (B, n, Dm), what the projections read; only given where the site knows it, and
            present for every mixer that says it needs it.
        valid: (B, n) bool, False at padding; None means all valid.
        bias: (1|B, 1|H, 1|n, seen + n) additive bias of the logits, or None.
        state: tensors of the mixer's `state_spec`, or None when the sequence starts here and
            nothing is kept. Where it is `Owned`, kernels may write over them: it is handed to one
            kernel, and not read afterwards.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None = None
    valid: Tensor | None = None
    bias: Tensor | None = None
    state: State | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def count(self) -> int:
        """n."""
        return self.q.shape[2]

    @property
    def stream(self) -> Tensor:
        """`hidden`, for mixers that need it."""
        assert self.hidden is not None
        return self.hidden

    def shown(self, out: Tensor) -> Tensor:
        """(B, H, n, D) with 0 at padding."""
        return out if self.valid is None else out * self.valid[:, None, :, None]

    def own_values(self) -> Tensor:
        """(B, H, n, Dv) float32: what each query head finds in its own token."""
        return self.v.float().repeat_interleave(self.q.shape[1] // self.v.shape[1], 1)

    def cut(self, start: int, stop: int) -> Tokens:
        """Tokens start … stop - 1; the bias keeps the keys before them, the state is dropped."""
        return replace(
            self,
            q=self.q[:, :, start:stop],
            k=self.k[:, :, start:stop],
            v=self.v[:, :, start:stop],
            hidden=None if self.hidden is None else self.hidden[:, start:stop],
            valid=None if self.valid is None else self.valid[:, start:stop],
            bias=None if self.bias is None else self.bias[..., :stop],
            state=None,
        )

    def padded(self, left: int, right: int, value: float) -> Tokens:
        """With tokens of `value` on both sides that `valid` hides."""
        valid = torch.ones(self.batch, self.count, dtype=torch.bool, device=self.q.device)
        valid = valid if self.valid is None else self.valid

        def wide(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, left, right), value=value)

        return replace(
            self,
            q=wide(self.q),
            k=wide(self.k),
            v=wide(self.v),
            hidden=None if self.hidden is None else wide(self.hidden),
            valid=F.pad(valid, (left, right), value=False),
            bias=None if self.bias is None else F.pad(self.bias, (left, right)),
        )

    def rows(self, which: slice) -> Tokens:
        """Some rows of the batch, without state."""

        def some(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[which]

        hidden, valid, bias = some(self.hidden), some(self.valid), some(self.bias)
        return Tokens(self.q[which], self.k[which], self.v[which], hidden, valid, bias)


def run(spec: KernelSpec, x: Tokens, *operands: Any, **given: Any) -> tuple[Tensor, State | None]:
    """Run a spec on the best kernel for the tokens, with their padding and their state.

    Args:
        spec: what to compute.
        x: the tokens; of its state only the tensors of the spec are read.
        operands: inputs of the spec in order, by default q, k and v.
        given: further inputs of the spec by name.

    Returns:
        (B, H, n, Dv) and the spec's part of the new state (None if none was given).
    """
    kernel = resolve(spec, x.v.device, x.v.dtype, torch.is_grad_enabled())
    state = None if x.state is None else part(x.state, spec)
    inputs = operands or (x.q, x.k, x.v)
    out: tuple[Tensor, State | None] = kernel.run(*inputs, valid=x.valid, state=state, **given)
    return out


def attend(
    spec: BlockSparse, q: Tensor, k: Tensor, v: Tensor, **given: Any
) -> tuple[Tensor, Tensor]:
    """Run a block-sparse spec: (B, H, n, Dv) and the log-sum-exp (B, H, n) float32."""
    kernel = resolve(spec, v.device, v.dtype, torch.is_grad_enabled())
    out: tuple[Tensor, Tensor] = kernel.run(q, k, v, **given)
    return out


def part(state: Mapping[str, Tensor], spec: KernelSpec) -> State:
    """The tensors of a mixer's state that belong to one spec, owned if the state is."""
    mine = {t.name: state[t.name] for t in state_of(spec).tensors}
    return Owned(mine) if isinstance(state, Owned) else mine
