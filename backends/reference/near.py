"""Unnormalised softmax over sinks and a window, in blocks of queries.

The keys of query block b are one slice of left + block + right tokens, so the work and the memory
are O(N (window + block)) and the window mask is the same small matrix for every block. A token
step is the same code with one block of one query. Grouped query heads are rows of their key/value
head's block: keys and values are never repeated per query head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rewriter.backends.reference.precision import wide
from rewriter.backends.reference.sinks import Sinks, gather_sinks
from rewriter.ir.kernels import WindowAttention
from rewriter.ir.state import State


@dataclass(frozen=True)
class Context:
    """What the near part looked at.

    Attributes:
        keys, values: (B, Hkv, left + n, D), the context before the new tokens, then these.
        valid: (B | 1, left + n), which of them are real tokens.
        sinks: the sinks after the new tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor
    sinks: Sinks


@dataclass(frozen=True)
class Near:
    """Result of the near part, before any normalisation.

    Attributes:
        numerator: (B, H, n, Dv), sum of exp(logit - top) v, float32.
        denominator, top: (B, H, n, 1), sum of exp(logit - top), and top, float32.
        context: keys and values it was computed from.

    `top` is the largest near logit of a query, 0 where it sees no near key.
    """

    numerator: torch.Tensor
    denominator: torch.Tensor
    top: torch.Tensor
    context: Context


@dataclass(frozen=True)
class _Blocks:
    """Sizes of the blocking: `count` blocks of `size` queries over left + size + right keys."""

    n: int
    size: int
    count: int
    left: int
    right: int

    @property
    def width(self) -> int:
        return self.left + self.size + self.right

    @property
    def tail(self) -> int:
        """Tokens that fill the last block up."""
        return self.size * self.count - self.n


def attend(
    spec: WindowAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    valid: torch.Tensor | None,
    bias: torch.Tensor | None,
    state: State | None,
    top_gradient: bool = False,
) -> Near:
    """Near part for n new tokens.

    Args:
        spec: window, sinks, direction, scale, softcap and what is hidden.
        q, k, v: (B, H, n, Dk), (B, Hkv, n, Dk), (B, Hkv, n, Dv).
        valid: (B, n) bool or None.
        bias: (1|B, 1|H, 1|n, seen + n) or None, added to the logits after the softcap.
        state: near tensors of `state_of`, or None.
        top_gradient: differentiate through `top`; a pure softmax does not depend on it.
    """
    B, H, n, Dk = q.shape
    Hkv, Dv = k.shape[1], v.shape[-1]
    keys, values, key_valid = context_of(spec, k, v, valid, state)
    blocks = _blocks(spec, n, keys.shape[-2] - n)
    C, nb, G = blocks.size, blocks.count, H // Hkv
    sinks = gather_sinks(spec.sinks, k, v, valid, state)
    seen = state["seen"] if state is not None else key_valid.new_zeros(1, dtype=torch.int64)

    queries = F.pad(q, (0, 0, 0, blocks.tail)).reshape(B, Hkv, G, nb, C, Dk).transpose(2, 3)
    queries = wide(queries).reshape(B, Hkv, nb, G * C, Dk) * spec.scale

    def score(keys_t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = rows @ keys_t
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        return logits.view(B, Hkv, nb, G, C, keys_t.shape[-1])

    near = score(_windows(wide(keys), blocks), queries)
    if bias is not None:
        near = near + _group(_window_bias(bias, blocks), Hkv)
    near = near.masked_fill(~_window_allowed(spec, blocks, key_valid), -torch.inf)
    top = near.amax(-1, keepdim=True)

    use_sinks = spec.sinks > 0 and "sinks" not in spec.hidden
    if use_sinks:
        sunk = score(wide(sinks.k).transpose(-1, -2), queries.reshape(B, Hkv, nb * G * C, Dk))
        if bias is not None:
            sunk = sunk + _group(_sink_bias(bias, sinks, blocks), Hkv)
        sunk = sunk.masked_fill(~_sink_allowed(spec, blocks, sinks, seen), -torch.inf)
        top = torch.maximum(top, sunk.amax(-1, keepdim=True))
    top = torch.where(top == -torch.inf, 0.0, top)
    if not top_gradient:
        top = top.detach()

    weight = (near - top).exp()
    denominator = weight.sum(-1, keepdim=True)
    windows = _windows(wide(values), blocks).transpose(-1, -2)
    numerator = weight.view(B, Hkv, nb, G * C, blocks.width) @ windows
    if use_sinks:
        weight = (sunk - top).exp()
        denominator = denominator + weight.sum(-1, keepdim=True)
        sunk_values = weight.view(B, Hkv, nb * G * C, spec.sinks) @ wide(sinks.v)
        numerator = numerator + sunk_values.view_as(numerator)

    def heads(x: torch.Tensor, width: int) -> torch.Tensor:
        x = x.view(B, Hkv, nb, G, C, width).transpose(2, 3)
        return x.reshape(B, H, nb * C, width)[:, :, :n]

    context = Context(keys, values, key_valid, sinks)
    return Near(heads(numerator, Dv), heads(denominator, 1), heads(top, 1), context)


def next_state(spec: WindowAttention, near: Context, state: State, n: int) -> State:
    """The near state after n new tokens; the last window - 1 keys stay."""

    def last(x: torch.Tensor, axis: int) -> torch.Tensor:
        kept = x.narrow(axis, n, spec.window - 1)
        # A view would keep a whole prefill alive; after a short chunk it is the cheaper choice.
        return kept.clone() if n > spec.window else kept

    return {
        "sink_k": near.sinks.k,
        "sink_v": near.sinks.v,
        "sink_at": near.sinks.at,
        "ring_k": last(near.keys, 2),
        "ring_v": last(near.values, 2),
        "ring_valid": last(near.valid, 1),
        "seen": state["seen"] + n,
    }


def context_of(
    spec: WindowAttention,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    state: State | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and validity (as in `Context`): window - 1 earlier tokens, then the new ones."""
    n = k.shape[-2]
    if state is None:
        left = min(spec.window, n) - 1
        ok = valid if valid is not None else k.new_ones(1, n, dtype=torch.bool)
        return F.pad(k, (0, 0, left, 0)), F.pad(v, (0, 0, left, 0)), F.pad(ok, (left, 0))
    before = state["ring_valid"]
    ok = valid if valid is not None else before.new_ones(before.shape[0], n)
    return (
        torch.cat((state["ring_k"], k), 2),
        torch.cat((state["ring_v"], v), 2),
        torch.cat((before, ok), 1),
    )


def _blocks(spec: WindowAttention, n: int, left: int) -> _Blocks:
    size = min(n, max(16, min(128, left + 1)))
    right = 0 if spec.causal else min(spec.window, n) - 1
    return _Blocks(n, size, -(-n // size), left, right)


def _windows(x: torch.Tensor, blocks: _Blocks) -> torch.Tensor:
    """(B, Hkv, left + n, D) to (B, Hkv, blocks, D, width), a view where possible."""
    if blocks.count == 1 and blocks.right == 0:
        return x.unsqueeze(2).transpose(-1, -2)
    return F.pad(x, (0, 0, 0, blocks.tail + blocks.right)).unfold(2, blocks.width, blocks.size)


def _window_allowed(
    spec: WindowAttention, blocks: _Blocks, key_valid: torch.Tensor
) -> torch.Tensor:
    """(B | 1, 1, blocks, 1, size, width) bool."""
    padded = F.pad(key_valid, (0, blocks.tail + blocks.right))
    ok = padded.unfold(1, blocks.width, blocks.size)[:, None, :, None, None, :]
    reach = _reach(spec)
    if blocks.size == 1 and blocks.right == 0 and blocks.width <= reach:
        return ok
    row = torch.arange(blocks.size, device=key_valid.device)[:, None]
    distance = row + blocks.left - torch.arange(blocks.width, device=key_valid.device)
    lowest = 0 if spec.causal else 1 - reach
    return ok & ((distance < reach) & (distance >= lowest))


def _reach(spec: WindowAttention) -> int:
    if "window" in spec.hidden:
        return 0
    return spec.window if spec.limit is None else min(spec.window, spec.limit)


def _sink_allowed(
    spec: WindowAttention, blocks: _Blocks, sinks: Sinks, seen: torch.Tensor
) -> torch.Tensor:
    """(B, 1, blocks, 1, size, slots) bool: sinks that the window does not already hold."""
    steps = torch.arange(blocks.size * blocks.count, device=seen.device)
    distance = (seen[:, None] + steps)[:, :, None] - sinks.at[:, None, :]
    distance = distance if spec.causal else distance.abs()
    ok = (sinks.at >= 0)[:, None, :] & (distance >= _reach(spec))
    if spec.limit is not None:
        ok = ok & (distance < spec.limit)
    return ok.view(-1, 1, blocks.count, 1, blocks.size, ok.shape[-1])


def _window_bias(bias: torch.Tensor, blocks: _Blocks) -> torch.Tensor:
    """(1|B, 1|H, 1|n, seen + n) to (1|B, 1|H, blocks, 1|size, width)."""
    start = bias.shape[-1] - blocks.n
    padded = F.pad(wide(bias), (blocks.left, blocks.tail + blocks.right))
    device = bias.device
    block = torch.arange(blocks.count, device=device)[:, None, None] * blocks.size
    columns = start + block + torch.arange(blocks.width, device=device)
    if bias.shape[-2] == 1:
        return padded[:, :, torch.zeros_like(block), columns]
    rows = (block + torch.arange(blocks.size, device=device)[:, None]).clamp(max=blocks.n - 1)
    return padded[:, :, rows, columns]


def _sink_bias(bias: torch.Tensor, sinks: Sinks, blocks: _Blocks) -> torch.Tensor:
    """(1|B, 1|H, 1|n, seen + n) to (B, 1|H, blocks | 1, 1|size, slots)."""
    B, slots = sinks.at.shape
    rows = wide(bias).expand(B, -1, -1, -1)
    index = sinks.at.clamp(min=0)[:, None, None, :].expand(*rows.shape[:3], slots)
    picked = rows.gather(-1, index)
    if picked.shape[2] == 1:
        return picked.unsqueeze(2)
    picked = F.pad(picked, (0, 0, 0, blocks.tail))
    return picked.view(B, picked.shape[1], blocks.count, blocks.size, slots)


def _group(bias: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(b, h, blocks, size, width) to (b, Hkv | 1, blocks, G | 1, size, width)."""
    if bias.shape[1] == 1:
        return bias.unsqueeze(3)
    return bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:]).transpose(2, 3)
