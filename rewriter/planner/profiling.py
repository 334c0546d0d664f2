"""Measure a device once: products with weights, pointwise operations, and cores by length.

All times come from `rewriter.timing.interleaved`, which `rewriter bench` uses too. Weights are
taken from a pool that no cache holds, as they are in a model, and inputs of cores have the strides
that projections give them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from rewriter.backends.cpu.build import NoKernel
from rewriter.backends.cpu.probe import measure as measure_limits
from rewriter.bench.machine import this_machine
from rewriter.errors import UsageError
from rewriter.ir.site import AttentionSite
from rewriter.mixers import registry
from rewriter.planner.device import CoreTime, Device, MoveTime, ProductTime
from rewriter.planner.predict import causal_site
from rewriter.planner.trunk import recorded, trunk_of
from rewriter.timing import Clock, interleaved

LAYER = 2**22  # values of the weights between two cores: 16 MiB in float32
STREAM = "stream"
POOL = 2**27  # values that weights are taken from: 512 MiB in float32, more than a cache
MATRICES = ((512, 512), (512, 2048), (2048, 512), (1024, 1024), (2048, 2048))
Note = Callable[[str], None]


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    Attributes:
        dtype: of all values.
        threads: torch threads.
        clock: 'wall', or 'cpu' for processor time: on a shared machine, one thread.
        rows: of the products and the pointwise operations.
        matrices: (inputs, outputs) of the weights.
        mixers: cores to time, (name, options).
        heads: (query, key/value, key width, value width) of every kind of block.
        hidden: width of the stream of these blocks.
        prefill, decode: lengths at which cores are timed.
        seconds: spent on each group of timings, at least three rounds.
        pool: values in the pool of weights.
    """

    dtype: str = "float32"
    threads: int = 1
    clock: Clock = "wall"
    rows: tuple[int, ...] = (1, 16, 128, 512, 2048)
    matrices: tuple[tuple[int, int], ...] = MATRICES
    mixers: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("keep", {}),
        ("fused", {}),
        ("sink_window", {}),
        ("hedgehog_window", {}),
        ("hedgehog", {}),
        ("retnet", {}),
        ("gla", {}),
    )
    heads: tuple[tuple[int, int, int, int], ...] = ((9, 3, 64, 64),)
    hidden: int = 576
    prefill: tuple[int, ...] = (256, 1024, 4096)
    decode: tuple[int, ...] = (256, 1024, 4096)
    seconds: float = 0.5
    pool: int = field(default=POOL, repr=False)


def profile(options: ProfileOptions, note: Note = lambda text: None) -> Device:
    """Measure this machine; sets torch's thread count while it runs.

    Raises:
        UsageError: an unknown mixer, or processor time with several threads.
    """
    if options.clock == "cpu" and options.threads > 1:
        raise UsageError("the cpu clock adds the time of all threads up; use it with one thread")
    with _threads(options.threads), torch.inference_mode():
        note("limits of the processor")
        limits = measure_limits(options.threads)
        products = tuple(_products(options, note))
        moves = tuple(_moves(options, note))
        cores = tuple(_cores(options, note))
        machine = this_machine()
    best = max(2.0 * p.rows * p.inputs * p.outputs / p.seconds for p in products)
    if isinstance(limits, NoKernel):
        streamed = [p for p in products if p.rows == min(options.rows)]
        width = _dtype(options).itemsize
        bandwidth = max(width * p.inputs * p.outputs / p.seconds for p in streamed)
    else:
        bandwidth = limits.gbytes * 1e9
    return Device(
        name=machine.processor,
        source=f"measured: {machine.describe()}",
        dtype=options.dtype,
        threads=options.threads,
        clock=options.clock,
        torch=torch.__version__,
        peak={options.dtype: best},
        bandwidth=bandwidth,
        launch=min(m.seconds for m in moves),
        products=products,
        moves=moves,
        cores=cores,
    )


def _products(options: ProfileOptions, note: Note) -> Iterator[ProductTime]:
    dtype = _dtype(options)
    pool = torch.randn(options.pool, dtype=torch.float32).to(dtype)
    for rows in options.rows:
        note(f"products of {rows} rows")
        contenders: dict[str, Callable[[], object]] = {}
        for inputs, outputs in options.matrices:
            x = torch.randn(rows, inputs, dtype=dtype)
            contenders[f"{inputs} {outputs}"] = _product(x, pool, outputs)
        found = interleaved(contenders, seconds=options.seconds, clock=options.clock)
        for name, timing in found.items():
            inputs, outputs = map(int, name.split())
            yield ProductTime(rows=rows, inputs=inputs, outputs=outputs, seconds=timing.median)


def _product(x: Tensor, pool: Tensor, outputs: int) -> Callable[[], object]:
    """The product with another weight of the pool at every call."""
    size = x.shape[1] * outputs
    if size > pool.numel():
        raise UsageError(f"a weight of {size} values does not fit the pool of {pool.numel()}")
    count = min(4096, pool.numel() // size)
    weights = itertools.cycle(
        [pool[n * size : (n + 1) * size].view(outputs, x.shape[1]) for n in range(count)]
    )
    return lambda: F.linear(x, next(weights))


class _Pointwise(nn.Module):
    """The operations around the products of a usual layer: norm, rotation, gate, residual."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        h = self.gain.to(x.dtype) * h
        first, second = h.chunk(2, -1)
        h = h * y + torch.cat((-second, first), -1) * y
        return x + F.silu(h) * y


def _moves(options: ProfileOptions, note: Note) -> Iterator[MoveTime]:
    """Mean bytes and seconds of an operation of a block of pointwise operations, by rows."""
    note("pointwise operations")
    dtype = _dtype(options)
    block = _Pointwise(options.hidden).to(dtype)
    contenders: dict[str, Callable[[], object]] = {}
    sizes: dict[str, tuple[float, int]] = {}
    for rows in sorted({1, *options.rows}):
        x, y = (torch.randn(rows, options.hidden, dtype=dtype) for _ in range(2))
        found = recorded(block, (x, y), {})
        name = str(rows)
        sizes[name] = (dtype.itemsize * sum(found.moved) / found.calls, found.calls)
        contenders[name] = _call(block, x, y)
    timings = interleaved(contenders, seconds=options.seconds, clock=options.clock)
    for name, timing in timings.items():
        moved, calls = sizes[name]
        yield MoveTime(bytes=moved, seconds=timing.median / calls)


def _call(module: nn.Module, *args: Tensor) -> Callable[[], object]:
    return lambda: module(*args)


def _cores(options: ProfileOptions, note: Note) -> Iterator[CoreTime]:
    for heads in options.heads:
        for tokens in options.prefill:
            note(f"cores of {heads[0]} heads over {tokens} tokens")
            yield from _timed(options, heads, tokens, "prefill")
        for tokens in options.decode:
            note(f"cores of {heads[0]} heads, one token behind {tokens - 1}")
            yield from _timed(options, heads, tokens, "decode")


def _timed(
    options: ProfileOptions, heads: tuple[int, int, int, int], tokens: int, phase: Any
) -> Iterator[CoreTime]:
    site = causal_site(heads, options.hidden)
    dtype = _dtype(options)
    contenders: dict[str, Callable[[], object]] = {}
    stream = _layer(options) if phase == "decode" else None
    if stream is not None:
        contenders[STREAM] = stream
    named: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for number, (mixer, given) in enumerate(options.mixers):
        kind = registry.get(mixer)
        chosen = kind.Options(**given)
        if kind.refuse(site, chosen) is not None:
            continue
        core = kind(site, chosen, layer=0).to(dtype).eval()
        name = str(number)
        named[name] = (mixer, chosen.model_dump(mode="json"))
        drawn = _inputs(heads, options.hidden, tokens, dtype)
        if phase == "prefill":
            contenders[name] = _run(core, drawn, None)
        else:
            cache = DynamicCache()
            _run(core, _inputs(heads, options.hidden, tokens - 1, dtype), cache)()
            step = _run(core, _inputs(heads, options.hidden, 1, dtype), cache)
            contenders[name] = _after(stream, step)
    found = interleaved(contenders, seconds=options.seconds, clock=options.clock)
    alone = found.pop(STREAM).median if STREAM in found else 0.0
    for name, timing in found.items():
        mixer, plain = named[name]
        yield CoreTime(
            mixer=mixer,
            options=dict(plain),
            heads=heads,
            hidden=options.hidden,
            phase=phase,
            tokens=tokens,
            seconds=max(timing.median - alone, 1e-7),
        )


def _layer(options: ProfileOptions) -> Callable[[], object]:
    """One token through weights of a layer's size: what the caches hold when a core is called.

    Called in a tight loop, a core of one token would find its code and its state in the nearest
    caches; behind the weights of a layer it takes up to twice as long.
    """
    dtype = _dtype(options)
    size = min(options.pool // 8, LAYER)
    pool = torch.randn(8 * size).to(dtype)
    width = min(512, size)
    return _product(torch.randn(1, width, dtype=dtype), pool, size // width)


def _after(first: Callable[[], object] | None, second: Callable[[], object]) -> Any:
    def run() -> None:
        if first is not None:
            first()
        second()

    return run


def _inputs(
    heads: tuple[int, int, int, int], hidden: int, tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, kv, key_width, value_width = heads

    def draw(count: int, width: int) -> Tensor:
        return torch.randn(1, tokens, count, width, dtype=dtype).transpose(1, 2)

    stream = torch.randn(1, tokens, hidden, dtype=dtype)
    return draw(query, key_width), draw(kv, key_width), draw(kv, value_width), stream


def _run(core: nn.Module, drawn: Sequence[Tensor], cache: Any) -> Callable[[], object]:
    q, k, v, hidden = drawn
    return lambda: core(q, k, v, (), cache=cache, hidden=hidden)


def _dtype(options: ProfileOptions) -> torch.dtype:
    found = getattr(torch, options.dtype, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"there is no dtype '{options.dtype}'")
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_model(
    options: ProfileOptions, model: nn.Module, sites: Sequence[AttentionSite]
) -> ProfileOptions:
    """The same options over the shapes of a model: its weights, its kinds of attention."""
    shapes = dict.fromkeys((m.inputs, m.outputs) for m in trunk_of(model).matrices)
    heads = dict.fromkeys(
        (s.heads.query, s.heads.key_value, s.heads.key_dim, s.heads.value_dim) for s in sites
    )
    hidden = next((s.hidden_dim for s in sites if s.hidden_dim), options.hidden)
    return replace(options, matrices=tuple(shapes), heads=tuple(heads), hidden=hidden)
