"""What each ATen operation becomes in a step program. Everything that is not here refuses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rewriter.passes.step import values as v
from rewriter.passes.step.values import Buffer, Draft, UnsupportedStepError, Value, Weight

NUMBERS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


class Emit:
    """Collects the instructions of a program; every method returns the value it makes."""

    def __init__(self) -> None:
        self.drafts: list[Draft] = []

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        if dtype not in (*NUMBERS, *INTEGERS):
            raise UnsupportedStepError(f"values of {dtype}")
        made = Value(Buffer(1), tuple(shape), v.row_major(shape), dtype)
        assert isinstance(made.base, Buffer)
        made.base.size = max(1, made.numel)
        return made

    def add(self, op: str, out: Value, *inputs: Value | None, s: float = 0.0, t: float = 0.0,
            room: Buffer | None = None, **extra: int) -> Value:  # fmt: skip
        self.drafts.append(Draft(op, out, inputs, s, t, room=room, extra=extra))
        return out

    def loaded(self, x: Value) -> Value:
        """As float numbers; a bf16 parameter is converted."""
        if not isinstance(x.base, Weight) or x.base.dtype == torch.float32:
            return x
        if x.base.dtype != torch.bfloat16:
            raise UnsupportedStepError(f"the parameter '{x.base.name}' has {x.base.dtype}")
        return self.add("load_bf16", self.new(x.shape, x.dtype), x)

    def one(self, op: str, x: Value, dtype: torch.dtype, s: float = 0.0, t: float = 0.0) -> Value:
        return self.add(op, self.new(x.shape, dtype), self.loaded(x), s=s, t=t)

    def two(self, op: str, x: Value, y: Value, dtype: torch.dtype, s: float = 1.0) -> Value:
        shape = v.broadcast(x.shape, y.shape)
        x, y = (v.expanded(self.loaded(z), shape) for z in (x, y))
        return self.add(op, self.new(shape, dtype), x, y, s=s)

    def copied(self, x: Value) -> Value:
        return self.one("copy", x, x.dtype)

    def rows(self, x: Value) -> Value:
        """As contiguous numbers."""
        x = self.loaded(x)
        return x if x.contiguous else self.copied(x)

    def reshaped(self, x: Value, shape: Sequence[int]) -> Value:
        found = v.viewed(x, shape)
        if found is None:
            found = v.viewed(self.rows(x), shape)
        assert found is not None
        return found

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        if dtype == x.dtype:
            return x
        if dtype not in (*NUMBERS, *INTEGERS) or (dtype in INTEGERS and x.dtype in NUMBERS):
            raise UnsupportedStepError(f"a cast from {x.dtype} to {dtype}")
        if dtype == torch.bfloat16:
            return self.one("copy", x, dtype)
        return replace(self.loaded(x), dtype=dtype)

    def joined(self, parts: Sequence[Value], dim: int, dtype: torch.dtype) -> Value:
        dim = v.dim_of(parts[0], dim)
        shape = list(parts[0].shape)
        shape[dim] = sum(p.shape[dim] for p in parts)
        out, at = self.new(shape, dtype), 0
        for part in parts:
            end = at + part.shape[dim]
            self.add("copy", v.sliced(out, dim, at, end), self.loaded(part))
            at = end
        return out

    def linear(self, x: Value, w: Value, bias: Value | None, dtype: torch.dtype) -> Value:
        """x (..., K) times w (N, K); w is a matrix of parameters in either memory order."""
        if not isinstance(w.base, Weight) or len(w.shape) != 2 or w.base.dtype not in NUMBERS:
            raise UnsupportedStepError("a product with something else than a matrix of parameters")
        N, K = w.shape
        by_row = w.strides[1] == 1 or K == 1
        if not by_row and w.strides[0] != 1:
            raise UnsupportedStepError("a matrix of parameters with gaps")
        if bias is not None and not (
            isinstance(bias.base, Weight)
            and bias.base.dtype == w.base.dtype
            and bias.shape == (N,)
            and bias.contiguous
        ):
            raise UnsupportedStepError("a bias that is not a vector of parameters")
        x = self.rows(x)
        rows = x.numel // K
        return self.add(
            "linear", self.new((*x.shape[:-1], N), dtype), x, w, bias, room=Buffer(rows * K + 16),
            rows=rows, N=N, K=K, by_row=int(by_row), step=w.strides[0] if by_row else w.strides[1],
        )  # fmt: skip


Rule = Callable[[Emit, tuple[Any, ...], Mapping[str, Any], torch.dtype], Any]


def _binary(op: str) -> Rule:
    def rule(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
        x, y = args[:2]
        alpha = float(kw.get("alpha", 1))
        if isinstance(x, Value) and isinstance(y, Value):
            return e.two(op, x, y, dtype, alpha)
        if not isinstance(x, Value):
            if isinstance(y, Value) and op in ("add", "mul"):
                x, y = y, x
            else:
                raise UnsupportedStepError(f"'{op}' of a number and a tensor")
        y = float(y)
        s, t = {
            "add": (1.0, alpha * y),
            "sub": (1.0, -alpha * y),
            "mul": (y, 0.0),
            "div": (1.0 / y, 0.0) if y else (float("inf"), 0.0),
        }[op]
        return x if (s, t) == (1.0, 0.0) and x.dtype == dtype else e.one("affine", x, dtype, s, t)

    return rule


def _pow(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x, exponent = args
    if float(exponent) == 3.0:
        return e.two("mul", e.one("square", x, dtype), x, dtype)
    named = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(float(exponent))
    return e.one(named or "pow", x, dtype, float(exponent))


def _unary(op: str) -> Rule:
    return lambda e, args, kw, dtype: e.one(op, args[0], dtype)


def _gelu(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return e.one("gelu_tanh" if kw.get("approximate") == "tanh" else "gelu", args[0], dtype)


def _reduce(op: str) -> Rule:
    def rule(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
        x, dims, keep = args[0], args[1], len(args) > 2 and args[2]
        dims = [v.dim_of(x, d) for d in ([dims] if isinstance(dims, int) else dims)]
        if dims != [len(x.shape) - 1] or len(x.shape) > 4:
            raise UnsupportedStepError("a reduction over other dimensions than the last")
        out = e.add(op, e.new((*x.shape[:-1], 1), dtype), e.loaded(x))
        return out if keep else v.squeezed(out, -1)

    return rule


def _norm(op: str) -> Rule:
    def rule(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
        x, shape, *rest = args
        if list(shape) != [x.shape[-1]] or len(x.shape) > 4:
            raise UnsupportedStepError("a normalisation over several dimensions")
        weight = rest[0] if rest else kw.get("weight")
        bias = rest[1] if op == "layer_norm" and len(rest) > 1 else None
        at = 2 if op == "layer_norm" else 1
        eps = rest[at] if len(rest) > at else kw.get("eps")
        if eps is None:
            eps = torch.finfo(dtype).eps if op == "rms_norm" else 1e-5
        given = [None if w is None else e.rows(w) for w in (weight, bias)]
        return e.add(op, e.new(x.shape, dtype), e.loaded(x), *given, s=float(eps))

    return rule


def _embedding(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    table, index = args[:2]
    if not isinstance(table.base, Weight) or table.base.dtype not in NUMBERS:
        raise UnsupportedStepError("an embedding that is not a table of parameters")
    index = e.rows(index)
    width = table.shape[1]
    return e.add("embed", e.new((*index.shape, width), dtype), index, table,
                 rows=index.numel, width=width, step=table.strides[0])  # fmt: skip


def _repeat(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x, times = args
    more = len(times) - len(x.shape)
    old = (1,) * more + x.shape
    if any(n != 1 and r != 1 for n, r in zip(old, times, strict=True)):
        raise UnsupportedStepError("a repetition of more than one entry")
    return v.expanded(x, [n * r for n, r in zip(old, times, strict=True)])


def _interleaved(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Every entry along a dimension several times in a row."""
    x, times = args[:2]
    dim = kw.get("dim", args[2] if len(args) > 2 else None)
    if dim is None:
        raise UnsupportedStepError("a repetition of all entries")
    dim %= len(x.shape)
    wide = (*x.shape[: dim + 1], times, *x.shape[dim + 1 :])
    flat = (*x.shape[:dim], x.shape[dim] * times, *x.shape[dim + 1 :])
    return e.reshaped(v.expanded(v.unsqueezed(x, dim + 1), wide), flat)


def _gather(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Whole rows of a table of parameters, the same one for the whole batch."""
    table, dim, index = args
    shared = len(table.shape) == 3 and (table.shape[0] == 1 or table.strides[0] == 0)
    rows = len(index.shape) == 3 and index.strides[2] == 0 and index.shape[2] == table.shape[-1]
    if not (dim in (1, -2) and shared and rows and table.strides[2] == 1):
        raise UnsupportedStepError("gathering anything but rows of a table")
    flat = replace(table, shape=table.shape[1:], strides=table.strides[1:])
    one = replace(index, shape=index.shape[:2], strides=index.strides[:2])
    return _embedding(e, (flat, one), kw, dtype)


def _addmm(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    if kw.get("alpha", 1) != 1 or kw.get("beta", 1) != 1:
        raise UnsupportedStepError("addmm with factors")
    bias, x, w = args
    return e.linear(x, v.swapped(w, 0, 1), bias, dtype)


def _matmul(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x, w = args
    if isinstance(w.base, Weight) and len(w.shape) == 2:
        return e.linear(x, v.swapped(w, 0, 1), None, dtype)
    # An outer product, as of positions and frequencies.
    if x.shape[-1] == 1 and w.shape[-2] == 1:
        return e.two("mul", x, w, dtype)
    raise UnsupportedStepError("a product of two computed matrices")


def _split(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x, sizes, dim = args[0], args[1], args[2] if len(args) > 2 else kw.get("dim", 0)
    total = x.shape[v.dim_of(x, dim)]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return tuple(v.sliced(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True))


def _chunk(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x, count, dim = args[0], args[1], args[2] if len(args) > 2 else kw.get("dim", 0)
    return _split(e, (x, -(-x.shape[v.dim_of(x, dim)] // count), dim), {}, dtype)


def _unbind(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x, dim = args[0], args[1] if len(args) > 1 else 0
    return tuple(v.selected(x, dim, n) for n in range(x.shape[v.dim_of(x, dim)]))


def _flatten(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x = args[0]
    start, end = (args[1] if len(args) > 1 else 0), (args[2] if len(args) > 2 else -1)
    start, end = v.dim_of(x, start), v.dim_of(x, end)
    return e.reshaped(x, (*x.shape[:start], -1, *x.shape[end + 1 :]))


def _unflatten(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    x, dim, sizes = args
    dim = v.dim_of(x, dim)
    sizes = v.sized(sizes, x.shape[dim])
    return e.reshaped(x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


def _stack(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    dim = args[1] if len(args) > 1 else kw.get("dim", 0)
    return e.joined([v.unsqueezed(x, dim) for x in args[0]], dim, dtype)


def _dropout(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    if args[2] and args[1]:
        raise UnsupportedStepError("dropout in training")
    return args[0]


def _slice(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    given: tuple[Any, ...] = (*args[1:], *[0, None, None, 1][len(args) - 1 :])
    dim, start, end, step = given
    return v.sliced(args[0], dim, start, end, step)


def _same(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return args[0]


def _cast(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return e.cast(args[0], dtype)


def _squeeze(e: Emit, args: tuple[Any, ...], kw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return v.squeezed(args[0], args[1])


RULES: dict[str, Rule] = {
    **{f"aten.{n}.Tensor": _binary(n) for n in ("add", "sub", "mul", "div")},
    **{f"aten.{n}.Scalar": _binary(n) for n in ("add", "sub", "mul", "div")},
    "aten.maximum.default": lambda e, a, kw, d: e.two("max", a[0], a[1], d),
    "aten.minimum.default": lambda e, a, kw, d: e.two("min", a[0], a[1], d),
    "aten.rsub.Scalar": lambda e, a, kw, d: e.one("affine", a[0], d, -1.0, float(a[1])),
    "aten.pow.Tensor_Scalar": _pow,
    **{
        f"aten.{n}.default": _unary(n)
        for n in (
            *("neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "cos", "sin"),
            *("tanh", "sigmoid", "silu", "relu"),
        )
    },
    "aten.gelu.default": _gelu,
    "aten.mean.dim": _reduce("mean"),
    "aten.sum.dim_IntList": _reduce("sum"),
    "aten.layer_norm.default": _norm("layer_norm"),
    "aten.rms_norm.default": _norm("rms_norm"),
    "aten.embedding.default": _embedding,
    "aten.gather.default": _gather,
    "aten.repeat.default": _repeat,
    "aten.repeat_interleave.self_int": _interleaved,
    "aten.linear.default": lambda e, a, kw, d: e.linear(a[0], a[1], (*a, None)[2], d),
    "aten.addmm.default": _addmm,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.t.default": lambda e, a, kw, d: v.swapped(a[0], 0, 1),
    "aten.transpose.int": lambda e, a, kw, d: v.swapped(*a),
    "aten.permute.default": lambda e, a, kw, d: v.permuted(a[0], a[1]),
    "aten.view.default": lambda e, a, kw, d: e.reshaped(a[0], a[1]),
    "aten.reshape.default": lambda e, a, kw, d: e.reshaped(a[0], a[1]),
    "aten._unsafe_view.default": lambda e, a, kw, d: e.reshaped(a[0], a[1]),
    "aten.flatten.using_ints": _flatten,
    "aten.unflatten.int": _unflatten,
    "aten.unsqueeze.default": lambda e, a, kw, d: v.unsqueezed(a[0], a[1]),
    "aten.squeeze.dim": _squeeze,
    "aten.expand.default": lambda e, a, kw, d: v.expanded(a[0], a[1]),
    "aten.slice.Tensor": _slice,
    "aten.select.int": lambda e, a, kw, d: v.selected(*a),
    "aten.cat.default": lambda e, a, kw, d: e.joined(a[0], (*a, kw.get("dim", 0))[1], d),
    "aten.stack.default": _stack,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _chunk,
    "aten.unbind.int": _unbind,
    "aten.dropout.default": _dropout,
    **{
        f"aten.{n}": _cast
        for n in (
            *("to.dtype", "to.device", "to.dtype_layout", "to.other", "_to_copy.default"),
            *("type_as.default", "contiguous.default", "clone.default", "alias.default"),
            *("detach.default", "lift_fresh_copy.default", "detach_.default"),
        )
    },
}

# Arithmetic on sizes.
SIZES: dict[Any, Callable[..., Any]] = {
    **{f: f for f in (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod)},
    operator.neg: operator.neg,
}
