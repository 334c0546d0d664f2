"""Which backend runs a kernel spec on a device: ask each, take the first that can.

A backend says for a spec either that it can run it or why not; the reference backend can run
everything, so resolution never fails. ATTENTION_REWRITER_BACKENDS, names separated by commas,
limits the choice to these and the reference ('reference' alone switches generated code off). Third
parties register under the entry point group
`attention_rewriter.backends` with an object (or a class without arguments) that satisfies
`Backend`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

import torch

from rewriter.backends.generated import GeneratedBackend, kernel
from rewriter.backends.ops.choice import VARIABLE as VARIABLE
from rewriter.backends.ops.choice import switched_on
from rewriter.backends.reference.backend import ReferenceBackend
from rewriter.ir.block_sparse import BlockSparse
from rewriter.ir.kernels import KernelSpec

GROUP = "attention_rewriter.backends"
BUILT_IN = (GeneratedBackend("cpu", "cpu", 10), GeneratedBackend("triton", "cuda", 10))
Run = Callable[..., Any]


@dataclass(frozen=True)
class Query:
    """What a kernel is needed for. `needs_grad`: it must be differentiable."""

    spec: KernelSpec
    device: str
    dtype: torch.dtype
    needs_grad: bool


@runtime_checkable
class Backend(Protocol):
    """A set of kernels. Higher `priority` is asked first; the reference has priority 0."""

    @property
    def name(self) -> str:
        """As reports show it."""

    @property
    def priority(self) -> int:
        """Higher is asked first."""

    def decline(self, query: Query) -> str | None:
        """Why it cannot serve the query, as one sentence, or None if it can."""

    def kernel(self, query: Query) -> Run:
        """The kernel of a query that was not declined, with the signature of the reference's."""


@dataclass(frozen=True)
class Kernel:
    """A kernel and how it was chosen.

    Attributes:
        backend: name of the backend that runs it.
        run: the function; its first argument (the spec) is already bound.
        declined: (backend, reason) of every backend that was asked before.
    """

    backend: str
    run: Run
    declined: tuple[tuple[str, str], ...] = ()


def resolve(
    spec: KernelSpec, device: torch.device | str, dtype: torch.dtype, needs_grad: bool = False
) -> Kernel:
    """The best kernel for `spec` on values of `dtype` on `device`.

    Args:
        spec: what to compute.
        device: where the tensors live; only its type matters.
        dtype: dtype of the values.
        needs_grad: gradients are wanted.

    In a graph that is being compiled the choice is a constant, and it is among the built-in
    backends: the operators of generated code, or the reference, whose operations can be fused.
    """
    kind = torch.device(device).type
    if not torch.compiler.is_dynamo_compiling():
        return _resolve(spec, kind, dtype, needs_grad, os.environ.get(VARIABLE))
    name = _name(spec, kind, dtype, needs_grad)
    if any(name == b.name for b in BUILT_IN):
        return Kernel(name, kernel(name, spec))
    if isinstance(spec, BlockSparse):
        # Its schedule is made outside of the graph.
        return Kernel("reference", kernel("reference", spec))
    return choose(Query(spec, kind, dtype, needs_grad), ())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name(spec: KernelSpec, device: str, dtype: torch.dtype, needs_grad: bool) -> str:
    return _resolve(spec, device, dtype, needs_grad, os.environ.get(VARIABLE)).backend


@lru_cache(maxsize=512)
def _resolve(
    spec: KernelSpec, device: str, dtype: torch.dtype, needs_grad: bool, only: str | None
) -> Kernel:
    backends, broken = _installed_once()
    backends = (*BUILT_IN, *backends)
    if only is not None:
        backends = tuple(b for b in backends if switched_on(b.name, only))
    return choose(Query(spec, device, dtype, needs_grad), backends, broken)


def allowed(name: str) -> bool:
    """Whether the environment leaves a backend switched on."""
    return switched_on(name, os.environ.get(VARIABLE))


def choose(
    query: Query, backends: Sequence[Backend], declined: tuple[tuple[str, str], ...] = ()
) -> Kernel:
    """First backend by priority that does not decline, then the reference."""
    reasons = list(declined)
    for backend in sorted(backends, key=lambda b: (-b.priority, b.name)):
        reason = backend.decline(query)
        if reason is None:
            return Kernel(backend.name, backend.kernel(query), tuple(reasons))
        reasons.append((backend.name, reason))
    reference = ReferenceBackend()
    return Kernel(reference.name, reference.kernel(query), tuple(reasons))


@lru_cache(maxsize=1)
def _installed_once() -> tuple[tuple[Backend, ...], tuple[tuple[str, str], ...]]:
    """`installed`, kept: the search reads the metadata of every package of the environment."""
    return installed()


def installed() -> tuple[tuple[Backend, ...], tuple[tuple[str, str], ...]]:
    """Third-party backends, and (name, reason) of those that could not be loaded."""
    good: list[Backend] = []
    broken: list[tuple[str, str]] = []
    for point in entry_points(group=GROUP):
        loaded = _load(point)
        if isinstance(loaded, str):
            broken.append((point.name, loaded))
        else:
            good.append(loaded)
    return tuple(good), tuple(broken)


def _load(point: EntryPoint) -> Backend | str:
    try:
        loaded = point.load()
        backend = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:  # a plugin may fail in any way; the reference still serves
        return f"entry point {point.value} cannot be loaded: {error}"
    if not isinstance(backend, Backend):
        return f"entry point {point.value} is not a backend: it lacks name, priority or methods"
    return backend
