"""The custom operators: opcheck, compilation, export, vmap, autocast, gradients; specs as text."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from mask_cases import named
from torch import Tensor

from rewriter.backends.generated import kernel
from rewriter.backends.ops.attend import decode as decode_op
from rewriter.backends.ops.block_sparse import block_sparse as block_sparse_op
from rewriter.backends.ops.codec import decode, encode
from rewriter.backends.ops.recurrence import recurrence as recurrence_op
from rewriter.backends.registry import Query, choose
from rewriter.errors import UnsupportedError
from rewriter.ir.block_sparse import CAUSAL, BlockSparse, causal_window
from rewriter.ir.decode import Decode
from rewriter.ir.mask import H, I, J
from rewriter.ir.recurrence import Recurrence

BACKENDS = ("reference", "cpu")
WIDTH = 16
LINEAR = Recurrence(WIDTH, WIDTH, normaliser="ones")
SSD = Recurrence(WIDTH, WIDTH, decay="token")
GLOBAL = Recurrence(WIDTH, WIDTH, normaliser="ones", causal=False)
WINDOW = BlockSparse(WIDTH, WIDTH, 0.25, causal_window(7, 2))


def qkv(
    seed: int = 0, batch: int = 2, heads: int = 4, kv_heads: int = 2, n: int = 21
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-contiguous, as a projection's transpose gives them."""
    g = torch.Generator().manual_seed(seed)

    def draw(h: int) -> Tensor:
        return torch.rand(batch, n, h, WIDTH, generator=g).transpose(1, 2)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def gates(batch: int = 2, n: int = 21) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return -torch.rand(batch, 2, n, generator=g)


def recurrence_args(spec: Recurrence, backend: str, grad: bool = True) -> tuple[Any, ...]:
    q, k, v = (x.requires_grad_(grad) for x in qkv())
    decay = gates().requires_grad_(grad) if spec.decay == "token" else None
    start = torch.rand(2, 2, WIDTH, spec.state_width).requires_grad_(grad)
    return (q, k, v, decay, None, None, None, None, None, start, encode(spec), backend)


def block_args(spec: BlockSparse, backend: str, grad: bool = True) -> tuple[Any, ...]:
    q, k, v = (x.requires_grad_(grad) for x in qkv())
    return (q, k, v, None, None, None, None, None, None, None, encode(spec), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [LINEAR, SSD])
def test_recurrence_passes_opcheck(spec: Recurrence, backend: str) -> None:
    torch.library.opcheck(recurrence_op, recurrence_args(spec, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_sparse_passes_opcheck(backend: str) -> None:
    torch.library.opcheck(block_sparse_op, block_args(WINDOW, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_passes_opcheck(backend: str) -> None:
    q, k, v = qkv()
    spec = encode(Decode(WIDTH, WIDTH, 0.25))
    torch.library.opcheck(decode_op, (q[:, :, -1:], k, v, None, None, None, None, spec, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [LINEAR, SSD, GLOBAL, WINDOW])
def test_gradients_are_those_of_the_reference(spec: Any, backend: str) -> None:
    """Through the registry's call, with padding, against the reference in float64."""
    query = Query(spec, "cpu", torch.float64, True)
    expected_run = choose(query, ()).run
    results = []
    for run, dtype in ((expected_run, torch.float64), (kernel(backend, spec), torch.float32)):
        tensors = [x.detach().to(dtype).requires_grad_() for x in qkv(3)]
        more: dict[str, Any] = {}
        if spec == SSD:
            tensors.append(gates().to(dtype).requires_grad_())
            more["decay"] = tensors[3]
        if isinstance(spec, Recurrence):
            valid = torch.ones(2, 21, dtype=torch.bool)
            valid[1, :6] = False
            more["valid"] = valid
        out = run(*tensors[:3], **more)[0]
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), tensors)
        results.append([x.double() for x in (out, *grads)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [SSD, WINDOW])
def test_compiles_in_one_graph_for_any_length(spec: Any, backend: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        if isinstance(spec, Recurrence):
            rest = (None,) * 5
            return recurrence_op(q, k, v, decay, *rest, None, text, backend)[0] * 2
        return block_sparse_op(q, k, v, *(None,) * 7, text, backend)[0] * 2

    text = encode(spec)
    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for batch, n in ((2, 21), (3, 34)):
        args = (*qkv(n, batch=batch, n=n), gates(batch, n))
        torch.testing.assert_close(compiled(*args), run(*args))


def test_exports() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return block_sparse_op(q, k, v, *(None,) * 7, encode(WINDOW), "reference")[0]

    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(Block(), qkv(), dynamic_shapes=({2: n}, {2: n}, {2: n}))
    other = qkv(7, n=13)
    torch.testing.assert_close(program.module()(*other), Block()(*other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_joins_the_batch(backend: str) -> None:
    q, k, v = (torch.stack([x, x.flip(2)]) for x in qkv())
    decay = torch.stack([gates(), gates() / 2])

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        return recurrence_op(q, k, v, decay, *(None,) * 6, encode(SSD), backend)[0]

    got = torch.func.vmap(run)(q, k, v, decay)
    torch.testing.assert_close(
        got, torch.stack([run(*x) for x in zip(q, k, v, decay, strict=True)])
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_op(q, k, v, *(None,) * 7, encode(WINDOW), backend)[0]

    got = torch.func.vmap(attend)(q, k, v)
    torch.testing.assert_close(got, torch.stack([attend(*x) for x in zip(q, k, v, strict=True)]))


def test_vmap_over_packed_sequences_is_refused() -> None:
    q, k, v = (x[None, :1] for x in qkv())
    ends = torch.tensor([0, 21], dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rest = (None,) * 5
        return recurrence_op(q, k, v, *rest, ends, None, encode(LINEAR), "reference")[0]

    with pytest.raises(UnsupportedError, match="cu_seqlens"):
        torch.func.vmap(run)(q, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_kernel(backend: str) -> None:
    q, k, v = qkv()
    run = kernel(backend, LINEAR)
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = run(q, k, v)
    torch.testing.assert_close(inside, run(q, k, v)[0])
    assert inside.dtype == torch.float32


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        recurrence_op(*recurrence_args(LINEAR, "nonesuch", grad=False))


@pytest.mark.parametrize(
    "spec",
    [
        LINEAR,
        SSD,
        Recurrence(8, 4, "channel", "untied", "exclusive", bonus=True, scale=0.5),
        WINDOW,
        BlockSparse(8, 8, 1.0, CAUSAL, softcap=30.0, sinks=True, slopes=True, offset=3, block=64),
        BlockSparse(8, 8, 1.0, sympy.true),
        BlockSparse(
            8,
            8,
            1.0,
            sympy.And(
                sympy.Eq(sympy.floor((I + 3) / 8), sympy.floor((J + 3) / 8)),
                sympy.Or(sympy.Eq(sympy.Mod(J, 4), 1), sympy.Lt(sympy.Abs(I - J), 5)),
                sympy.Not(sympy.Eq(H, 2)),
            ),
        ),
        Decode(8, 8, 1.0, cache="paged", page=16),
    ],
)
def test_specs_survive_as_text(spec: Any) -> None:
    assert decode(encode(spec)) == spec


@pytest.mark.parametrize("case", named(60), ids=lambda c: c.name)
def test_every_mask_of_the_catalogue_survives_as_text(case: Any) -> None:
    spec = BlockSparse(8, 8, 1.0, case.mask)
    assert decode(encode(spec)) == spec


def test_text_is_never_evaluated() -> None:
    text = encode(WINDOW).replace('"And"', '"__import__"')
    with pytest.raises(KeyError):
        decode(text)


def test_a_function_without_text_form_is_refused() -> None:
    spec = BlockSparse(8, 8, 1.0, sympy.Eq(sympy.Function("table")(I), J))
    with pytest.raises(ValueError, match="table"):
        encode(spec)
