"""What is timed: a kernel of ours, the stock ways to do the same, and their floating-point work.

Every case is causal, batch 1. Ours is called as a mixer calls it: through the registry, so that the
figures include dispatch and autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.cpu.build import NoKernel
from rewriter.backends.cpu.recurrence_step import fixed_step
from rewriter.backends.reference.backend import ReferenceBackend
from rewriter.backends.registry import Query, resolve
from rewriter.ir.block_sparse import CAUSAL, BlockSparse, causal_window
from rewriter.ir.decode import Decode
from rewriter.ir.kernels import KernelSpec
from rewriter.ir.recurrence import Recurrence

WINDOW, SINKS = 512, 4
Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One point: tokens N, heads, key/value heads, head width, dtype, with backward or without."""

    length: int
    heads: int = 8
    kv_heads: int = 8
    width: int = 64
    dtype: torch.dtype = torch.float32
    train: bool = False


@dataclass(frozen=True)
class Prepared:
    """The contenders at one setting. `flops` is the arithmetic of ours, multiply-add = 2, or 0."""

    contenders: Mapping[str, Run]
    backend: str
    declined: tuple[tuple[str, str], ...]
    flops: float


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: what `--only` takes.
        title: for people.
        prepare: builds inputs and contenders; 'ours' is among them.
        against: names of the stock contenders; the ratio is taken to the fastest of them.
        trains: has a backward worth timing.
        decodes: `length` is the context of one step.
    """

    name: str
    title: str
    prepare: Callable[[Setting, bool], Prepared]
    against: tuple[str, ...]
    trains: bool = False
    decodes: bool = False


def dense(s: Setting, compiled: bool) -> Prepared:
    spec = BlockSparse(s.width, s.width, s.width**-0.5, CAUSAL)
    q, k, v = _qkv(s)
    contenders: dict[str, Run] = {"sdpa": _timed(s, _sdpa, q, k, v)}
    flops = 2.0 * s.length * s.width * s.length * s.heads
    return _prepared(s, spec, contenders, flops, q, k, v)


def window(s: Setting, compiled: bool) -> Prepared:
    spec = BlockSparse(s.width, s.width, s.width**-0.5, causal_window(WINDOW, SINKS))
    q, k, v = _qkv(s)
    contenders: dict[str, Run] = {"sdpa causal": _timed(s, _sdpa, q, k, v)}
    if compiled and not s.train:
        contenders["flex compiled"] = _flex(s, q, k, v)
    flops = 4.0 * min(WINDOW + SINKS, s.length / 2) * s.width * s.length * s.heads
    return _prepared(s, spec, contenders, flops, q, k, v)


def linear(s: Setting, compiled: bool) -> Prepared:
    spec = Recurrence(s.width, s.width, normaliser="ones")
    q, k, v = _qkv(s)
    q, k = F.elu(q.detach()) + 1, F.elu(k.detach()) + 1
    return _recurrent(s, spec, compiled, _leaf(s, q), _leaf(s, k), v)


def ssd(s: Setting, compiled: bool) -> Prepared:
    spec = Recurrence(s.width, s.width, decay="token")
    return _recurrent(s, spec, compiled, *_qkv(s), decay=_leaf(s, _gates(s)))


def gla(s: Setting, compiled: bool) -> Prepared:
    spec = Recurrence(s.width, s.width, decay="channel")
    gates = _leaf(s, _gates(s, s.width))
    return _recurrent(s, spec, compiled, *_qkv(s), decay=gates)


def gated_delta(s: Setting, compiled: bool) -> Prepared:
    spec = Recurrence(s.width, s.width, decay="token", correction="delta")
    q, k, v = _qkv(s)
    k = _leaf(s, F.normalize(k.detach().float(), dim=-1).to(s.dtype))
    beta = _leaf(s, torch.rand(1, s.kv_heads, s.length))
    return _recurrent(s, spec, compiled, q, k, v, decay=_leaf(s, _gates(s)), beta=beta)


def cache_step(s: Setting, compiled: bool) -> Prepared:
    spec = Decode(s.width, s.width, s.width**-0.5)
    q = torch.randn(1, s.heads, 1, s.width, dtype=s.dtype)
    k = torch.randn(1, s.kv_heads, s.length, s.width, dtype=s.dtype)
    v = torch.randn_like(k)
    grouped = q.view(1, s.kv_heads, -1, s.width)

    def eager() -> Tensor:
        scores = (grouped @ k.transpose(-1, -2)).float() * s.width**-0.5
        out: Tensor = scores.softmax(-1).to(s.dtype) @ v
        return out

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=s.heads != s.kv_heads)

    return _prepared(s, spec, {"sdpa": sdpa, "grouped eager": eager}, 0.0, q, k, v)


def recurrent_step(s: Setting, compiled: bool) -> Prepared:
    spec = Recurrence(s.width, s.width, decay="token")
    one = Setting(1, s.heads, s.kv_heads, s.width, s.dtype)
    q, k, v = _qkv(one)
    state = {"S": torch.randn(1, s.kv_heads, s.width, s.width)}
    gate = _gates(one)
    kernel = resolve(spec, "cpu", s.dtype)

    def torch_form() -> Tensor:
        after = gate.exp()[..., None] * state["S"] + k.float().transpose(-1, -2) * v.float()
        return (q.float() @ after).to(s.dtype)

    def ours() -> object:
        return kernel.run(q, k, v, decay=gate, state=state)

    contenders: dict[str, Run] = {"ours": ours, "torch form": torch_form}
    fixed = fixed_step(spec, q, k, v, torch.empty_like(q), torch.clone(state["S"]), decay=gate)
    if not isinstance(fixed, NoKernel):
        contenders["ours, fixed buffers"] = fixed
    if s.heads != s.kv_heads:
        del contenders["torch form"]
    return Prepared(contenders, kernel.backend, kernel.declined, 0.0)


CASES: tuple[Case, ...] = (
    Case("dense", "dense causal attention", dense, ("sdpa",), trains=True),
    Case("window", f"window {WINDOW} + {SINKS} sinks", window, ("sdpa causal", "flex compiled")),
    Case("linear", "linear attention, no decay", linear, ("sdpa",), trains=True),
    Case("ssd", "scalar decay (SSD)", ssd, ("sdpa",), trains=True),
    Case("gla", "decay per channel (GLA)", gla, ("sdpa",), trains=True),
    Case("gated_delta", "gated delta rule", gated_delta, ("sdpa",), trains=True),
    Case("cache_step", "one step, KV cache", cache_step, ("sdpa", "grouped eager"), decodes=True),
    Case("recurrent_step", "one recurrent step", recurrent_step, ("torch form",), decodes=True),
)


def _recurrent(
    s: Setting, spec: Recurrence, compiled: bool, q: Tensor, k: Tensor, v: Tensor, **more: Tensor
) -> Prepared:
    contenders: dict[str, Run] = {"sdpa": _timed(s, _sdpa, q, k, v)}
    query = Query(spec, "cpu", s.dtype, s.train)
    form = ReferenceBackend().kernel(query)

    def torch_form(*tensors: Tensor) -> Tensor:
        out: Tensor = form(*tensors[:3], **dict(zip(more, tensors[3:], strict=True)))[0]
        return out

    contenders["torch form"] = _timed(s, torch_form, q, k, v, *more.values())
    if compiled:
        fast = torch.compile(torch_form, dynamic=False)
        contenders["torch form compiled"] = _timed(s, fast, q, k, v, *more.values())
    delta = spec.correction != "none"
    chunk = 64
    per_token = (4 if delta else 2) * chunk * s.width + (6 if delta else 4) * s.width**2
    return _prepared(s, spec, contenders, per_token * s.length * s.heads, q, k, v, **more)


def _prepared(
    s: Setting,
    spec: KernelSpec,
    contenders: dict[str, Run],
    flops: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **more: Tensor,
) -> Prepared:
    kernel = resolve(spec, "cpu", s.dtype, s.train)

    def ours(*tensors: Tensor) -> Tensor:
        out: Tensor = kernel.run(*tensors[:3], **dict(zip(more, tensors[3:], strict=True)))[0]
        return out

    runs = {"ours": _timed(s, ours, q, k, v, *more.values()), **contenders}
    return Prepared(runs, kernel.backend, kernel.declined, flops)


def _timed(s: Setting, run: Callable[..., Tensor], *tensors: Tensor) -> Run:
    """The call, with its backward when training is timed."""
    if not s.train:

        def forward() -> object:
            with torch.no_grad():
                return run(*tensors)

        return forward
    leaves = [t for t in tensors if t.requires_grad]
    with torch.no_grad():
        grad = torch.randn_like(run(*tensors))

    def both() -> object:
        return torch.autograd.grad(run(*tensors), leaves, grad, allow_unused=True)

    return both


def _qkv(s: Setting) -> tuple[Tensor, Tensor, Tensor]:
    def draw(heads: int) -> Tensor:
        return _leaf(s, torch.randn(1, heads, s.length, s.width, dtype=s.dtype))

    return draw(s.heads), draw(s.kv_heads), draw(s.kv_heads)


def _leaf(s: Setting, x: Tensor) -> Tensor:
    return x.detach().requires_grad_(s.train)


def _gates(s: Setting, *width: int) -> Tensor:
    """Log decays of a trained gate's size: half-lives of tens of tokens."""
    return F.logsigmoid(torch.randn(1, s.kv_heads, s.length, *width) + 4)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def _flex(s: Setting, q: Tensor, k: Tensor, v: Tensor) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((i - j < WINDOW) | (j < SINKS))

    mask = create_block_mask(allowed, None, None, s.length, s.length, device="cpu")
    fast = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fast(q, k, v, block_mask=mask, enable_gqa=s.heads != s.kv_heads)
        assert isinstance(out, Tensor)
        return out

    return _timed(s, run, q, k, v)
