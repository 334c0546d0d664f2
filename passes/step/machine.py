"""A program bound to a model's weights and to memory: running one step is one call, or a few.

Cores that stay in Python cut the list of instructions into segments.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rewriter.backends.cpu.build import NoKernel
from rewriter.backends.cpu.pages import use_large_pages
from rewriter.backends.cpu.step import (
    BINARY,
    MOST_SPLITS,
    SLOT_FIELDS,
    UNARY,
    Four,
    Instruction,
    Listing,
    listing,
    runner,
)
from rewriter.kv_cache import GrowingLayer, SlidingLayer, in_place
from rewriter.passes.step.lower import Core, Program
from rewriter.passes.step.values import Draft, UnsupportedStepError, Value, Weight

_FLOAT = 4  # bytes


@dataclass
class Slot:
    """Where a core on the kernel keeps its tokens.

    Attributes:
        core: the core.
        at: first field of its `struct Slot`.
        like: keys and values of one token, for their sizes.
        buffers: those that the struct describes.
    """

    core: Core
    at: int
    like: tuple[torch.Tensor, torch.Tensor]
    buffers: Any = None


@dataclass(frozen=True)
class PythonCore:
    """A core that is called between two segments: views of the arena."""

    core: Core
    operands: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    out: torch.Tensor

    def run(self, cache: Any) -> None:
        q, k, v = (x.to(self.dtype, copy=True) for x in self.operands)
        mixer = self.core.mixer
        out, _ = mixer(q, k, v, (None,) * len(mixer.site.terms), cache=cache)
        self.out.copy_(out)


class Machine:
    """A program with addresses. It belongs to one model and one batch size."""

    def __init__(self, program: Program, run: Callable[[bytes, int, int], None]) -> None:
        self.program, self._run = program, run
        self.arena = torch.zeros(program.floats + 16, dtype=torch.float32)
        self.weights = dict(program.weights)
        self.slots: list[Slot] = []
        count = sum(c.kernel is not None for c in program.cores)
        self.table = array("q", [0]) * (SLOT_FIELDS * max(1, count))
        self.ids, self.position = self._view(program.ids), self._view(program.position)
        self.result = self._view(program.result)
        self.segments: list[tuple[Listing, PythonCore | None]] = []
        self._assemble()
        use_large_pages(self.weights.values())

    def run(self, ids: torch.Tensor, seen: int, cache: Any, advance: bool = True) -> Any:
        """Logits (batch, 1, vocabulary) of one new token per row, or None if the cache is unfit.

        Args:
            ids: (batch, 1) token numbers.
            seen: tokens before.
            cache: of the model; the new token is written into it.
            advance: count the new token; otherwise what was written is not part of the cache yet.
        """
        if not self._place(seen, cache):
            return None
        self.ids.copy_(ids)
        self.position.fill_(seen)
        threads = torch.get_num_threads()
        for part, core in self.segments:
            self._run(part.data, part.count, threads)
            if core is not None:
                core.run(cache)
        if advance:
            for slot in self.slots:
                _advance(cache.layers[slot.core.mixer.layer])
        return self.result.to(self.program.result.dtype, copy=True)

    def python_layers(self) -> list[int]:
        """Cache layers of the cores that run in Python."""
        return [c.mixer.layer or 0 for c in self.program.cores if c.kernel is None]

    def _place(self, seen: int, cache: Any) -> bool:
        """Make room for one token in every layer and tell the kernels where."""
        table, layers = self.table, cache.layers
        fresh: list[torch.Tensor] = []
        for slot in self.slots:
            index = slot.core.mixer.layer
            assert index is not None
            if index >= len(layers):
                return False
            layer = layers[index]
            if layer.__class__ not in (GrowingLayer, SlidingLayer):
                in_place(cache, index)
                layer = layers[index]
                if layer.__class__ not in (GrowingLayer, SlidingLayer):
                    return False
            if layer.get_seq_length() != seen or getattr(layer, "record_past", False):
                return False
            held = layer.buffers
            if held is None or held.end >= held.keys.shape[2]:
                held = layer.claim(*slot.like)
            at = slot.at
            if held is not slot.buffers:
                k, v = held.keys, held.values
                if (k.shape[0], k.dtype) != (slot.like[0].shape[0], slot.like[0].dtype):
                    return False
                if k.stride(3) != 1 or v.stride(3) != 1:
                    held = layer.claim_copy()
                    k, v = held.keys, held.values
                slot.buffers = held
                fields = (k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3])
                table[at : at + 8] = array("q", fields)
                fresh += (k, v)
            window = slot.core.mixer.site.mask.window
            first = held.start if window is None else max(held.start, held.end + 1 - window)
            table[at + 8], table[at + 9] = first, held.end
        if fresh:
            use_large_pages(fresh)
        return True

    def _assemble(self) -> None:
        ready: list[Instruction] = []
        for draft in self.program.drafts:
            if draft.op == "call":
                self.segments.append((listing(ready), self._python(draft)))
                ready = []
            else:
                ready.append(self._instruction(draft))
        self.segments.append((listing(ready), None))

    def _python(self, draft: Draft) -> PythonCore:
        operands = [self._view(x).unsqueeze(2) for x in draft.inputs if x is not None]
        core = self.program.cores[draft.core]
        return PythonCore(
            core, tuple(operands), draft.out.dtype, self._view(draft.out).unsqueeze(2)
        )

    def _view(self, x: Value) -> torch.Tensor:
        assert not isinstance(x.base, Weight)
        return self.arena.as_strided(x.shape, x.strides, x.base.at + x.offset)

    def _address(self, x: Value | None) -> int:
        if x is None:
            return 0
        if isinstance(x.base, Weight):
            tensor = self.weights[x.base.name]
            return tensor.data_ptr() + x.offset * tensor.element_size()
        return self.arena.data_ptr() + (x.base.at + x.offset) * _FLOAT

    def _instruction(self, d: Draft) -> Instruction:
        a, b, c = (*d.inputs, None, None, None)[:3]
        places = (self._address(d.out), self._address(a), self._address(b), self._address(c))
        rounds = d.out.dtype == torch.bfloat16
        assert a is not None
        room = 0 if d.room is None else self.arena.data_ptr() + d.room.at * _FLOAT
        if d.op in UNARY or d.op in BINARY:
            shapes = collapsed(d.out.shape, [d.out.strides, a.strides, *([b.strides] if b else [])])
            more = shapes[3] if b is not None else (0, 0, 0, 0)
            return Instruction(d.op, *places, shapes[0], shapes[1], shapes[2], more, d.s, d.t,
                               round=rounds)  # fmt: skip
        if d.op == "linear":
            e = d.extra
            assert b is not None and isinstance(b.base, Weight)
            narrow = b.base.dtype == torch.bfloat16
            sizes = (e["rows"], e["N"], e["K"], 0)
            return Instruction(d.op, *places, sizes, sb=(e["step"], 0, 0, 0),
                               x=(narrow, e["by_row"], room), round=rounds)  # fmt: skip
        if d.op == "embed":
            assert b is not None and isinstance(b.base, Weight)
            narrow = b.base.dtype == torch.bfloat16
            sizes = (d.extra["rows"], d.extra["width"], 0, 0)
            return Instruction(d.op, *places, sizes, sa=(1, 0, 0, 0),
                               sb=(d.extra["step"], 0, 0, 0), x=(narrow,))  # fmt: skip
        if d.op == "attend":
            return self._attend(d, places, room, rounds)
        sizes = _four(a.shape, 1)
        return Instruction(d.op, *places, sizes, _four(d.out.strides), _four(a.strides), s=d.s,
                           round=rounds)  # fmt: skip

    def _attend(
        self, d: Draft, places: tuple[int, int, int, int], room: int, rounds: bool
    ) -> Instruction:
        core, (q, k, v) = self.program.cores[d.core], d.inputs
        assert q is not None and k is not None and v is not None and core.kernel is not None
        at = SLOT_FIELDS * len(self.slots)
        like = tuple(torch.empty((*x.shape[:2], 1, x.shape[2]), dtype=x.dtype) for x in (k, v))
        self.slots.append(Slot(core, at, (like[0], like[1])))
        slot = self.table.buffer_info()[0] + 8 * at
        sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2])
        site = core.mixer.site
        more = (*v.strides, v.shape[2], slot, core.kernel.address, room, MOST_SPLITS)
        scale, cap = site.scale, site.softcap or 1.0
        return Instruction(d.op, *places, sizes, sa=_four(q.strides, 0, front=False),
                           sb=_four(k.strides, 0, front=False), s=scale, t=cap, x=more,
                           round=rounds)  # fmt: skip


def machine(program: Program) -> Machine | str:
    """The program with addresses, or why it cannot run here."""
    run = runner()
    if isinstance(run, NoKernel):
        return run.reason
    try:
        return Machine(program, run)
    except UnsupportedStepError as error:
        return str(error)


def _advance(layer: GrowingLayer | SlidingLayer) -> None:
    held = layer.buffers
    assert held is not None
    held.end += 1
    if isinstance(layer, SlidingLayer):
        layer.cumulative_length += 1
        held.start = max(held.start, held.end - layer.sliding_window + 1)


def _four(values: Sequence[int], fill: int = 0, front: bool = True) -> Four:
    more = (fill,) * (4 - len(values))
    found = (*more, *values) if front else (*values, *more)
    return found[0], found[1], found[2], found[3]


def collapsed(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[Four, ...]:
    """Sizes and strides with neighbouring dimensions merged, brought to four dimensions.

    Raises:
        UnsupportedStepError: more than four are left.
    """
    sizes: list[int] = []
    steps: list[list[int]] = []
    for d, size in enumerate(shape):
        if size == 1:
            continue
        mine = [s[d] for s in strides]
        if sizes and all(old == new * size for old, new in zip(steps[-1], mine, strict=True)):
            sizes[-1] *= size
            steps[-1] = mine
        else:
            sizes.append(size)
            steps.append(mine)
    if len(sizes) > 4:
        raise UnsupportedStepError("an operation over more than four dimensions")
    more = 4 - len(sizes)
    columns = [[*([0] * more), *(s[n] for s in steps)] for n in range(len(strides))]
    return _four(sizes, 1), *(_four(c) for c in columns)
