"""Losses on attention weights against the dense maps computed by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill_standin import tiny_student, tiny_teacher, token_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewriter import rewrite
from rewriter.distill import Rows, distill, match_layers, parse_config
from rewriter.distill.attention import attention_losses, drawn, softmax_rows
from rewriter.distill.match_layers import MatchLayers
from rewriter.errors import UnsupportedError, UsageError
from rewriter.ir.mask import Causal, KeyPadding, Mask
from rewriter.ir.site import AttentionSite, HeadGroups, Scale, Softcap, Source
from rewriter.mixers.base import Mixer
from rewriter.mixers.hybrid.hedgehog_window import HedgehogWindow, HedgehogWindowOptions
from rewriter.mixers.linear.hedgehog import Hedgehog, HedgehogOptions
from rewriter.mixers.tokens import Tokens

KINDS = ["cross_entropy", "frobenius"]


def site_of(causal: bool, cap: float | None = None) -> AttentionSite:
    return AttentionSite(
        fqn="attention",
        index=0,
        heads=HeadGroups(4, 2, 8, 8),
        score=(Scale(0.4), *(() if cap is None else (Softcap(cap),))),
        terms=("mask",),
        mask=Mask((*((Causal(),) if causal else ()), KeyPadding())),
        spelling="sdpa",
        source=Source("attention"),
    )


def tokens_of(n: int, padded: bool) -> Tokens:
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, heads, n, 8, generator=g) for heads in (4, 2, 2))
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0, :3] = False
    valid[1, -2:] = False
    return Tokens(q, k, v, valid=valid if padded else None)


def dense_map(x: Tokens, causal: bool, cap: float | None) -> torch.Tensor:
    """By torch's own softmax, attention weights of queries that are not padding."""
    logits = x.q @ x.k.repeat_interleave(2, 1).mT * 0.4
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    seen = torch.ones(2, 1, x.count, x.count, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    if x.valid is not None:
        seen = seen & x.valid[:, None, None, :] & x.valid[:, None, :, None]
    return torch.nan_to_num(torch.softmax(logits.masked_fill(~seen, -torch.inf), -1), 0.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_teachers_rows_are_torchs_softmax(
    causal: bool, padded: bool, cap: float | None
) -> None:
    x = tokens_of(13, padded)
    rows = softmax_rows(site_of(causal, cap), x, slice(4, 11))
    torch.testing.assert_close(rows, dense_map(x, causal, cap)[:, :, 4:11])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["causal", "both ways", "window"])
def test_chunks_add_up_to_the_dense_loss_and_gradient(
    kind: Any, rows: int, padded: bool, name: str
) -> None:
    torch.manual_seed(0)
    causal = name != "both ways"
    core: Mixer = Hedgehog(site_of(causal), HedgehogOptions())
    if name == "window":
        options = HedgehogWindowOptions(window=3, sinks=1, initial_log_ratio=-1.0)
        core = HedgehogWindow(site_of(True), options)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    x = tokens_of(13, padded)
    value = 0.0
    for share in attention_losses(core, x, kind, rows):
        share.backward()
        value += share.item()
    got = [p.grad for p in core.parameters()]

    # The student's map read off its outputs on unit vectors as values, one key at a time.
    eye = torch.eye(16)[:13].expand(2, 2, 13, 16)
    columns = [core.mix(Tokens(x.q, x.k, eye[..., part], valid=x.valid))[0]
               for part in (slice(0, 8), slice(8, 16))]  # fmt: skip
    student, teacher = torch.cat(columns, -1)[..., :13], dense_map(x, causal, None)
    keep = torch.ones(2, 13, dtype=torch.bool) if x.valid is None else x.valid
    student, teacher = student.transpose(1, 2)[keep], teacher.transpose(1, 2)[keep]
    if kind == "frobenius":
        expected = F.mse_loss(student, teacher, reduction="sum") / teacher[..., 0].numel()
    else:
        logs = torch.where(teacher > 0, student.clamp_min(1e-12), 1.0).log()
        expected = -(teacher * logs).sum() / teacher[..., 0].numel()
    wanted = torch.autograd.grad(expected, list(core.parameters()))
    assert value == pytest.approx(expected.item(), rel=1e-4)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-3)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_no_map_of_all_pairs_is_ever_made(kind: Any, causal: bool) -> None:
    core, n, rows = Hedgehog(site_of(causal), HedgehogOptions()), 128, 8
    x = tokens_of(n, True)
    with Largest() as seen:
        for share in attention_losses(core, x, kind, rows):
            share.backward()
    weights, features = x.batch * 4 * rows * n, x.batch * 4 * n * 16
    assert seen.numel <= max(weights, features) < x.batch * 4 * n * n / 4


@pytest.mark.parametrize("count", [1, 7, 64, 65])
@pytest.mark.parametrize("some", [None, 1, 8, 20, 500])
def test_drawn_blocks_are_disjoint_and_in_order(count: int, some: int | None) -> None:
    torch.manual_seed(count)
    met = set()
    for _ in range(60):
        blocks = drawn(count, 8, some)
        places = [i for block in blocks for i in range(block.start, block.stop)]
        assert places == sorted(set(places)) and places[-1] < count
        assert all(block.stop - block.start <= 8 for block in blocks)
        if some is None or some >= count:
            assert places == list(range(count))
        else:
            assert len(blocks) == -(-some // 8)
        met.update(places)
    assert met == set(range(count))


@pytest.mark.parametrize("padded", [True, False])
def test_a_draw_estimates_the_loss_of_all_queries(padded: bool) -> None:
    x, core = tokens_of(64, padded), Hedgehog(site_of(True), HedgehogOptions())
    torch.manual_seed(1)
    with torch.no_grad():
        whole = sum(map(float, attention_losses(core, x, "cross_entropy", 8)))
        some = [
            sum(map(float, attention_losses(core, x, "cross_entropy", 8, 16))) for _ in range(300)
        ]
    assert sum(some) / len(some) == pytest.approx(whole, rel=0.03)


def stage_of(**fields: Any) -> Any:
    stage = {"steps": 25, "batch": 2, "lr": 2e-2, **fields}
    return parse_config({"dtype": "float32", "length": 24, "fit": 0, "layers": stage})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", [0.0, 1.0])
def test_a_rewritten_model_learns_from_attention_weights(kind: str, output: float) -> None:
    teacher = tiny_teacher()
    student = rewrite(teacher, {"rules": [{"use": "hedgehog"}]}, verify="none", force=True)
    result = distill(teacher, student, Rows(token_rows(8)), stage_of(attention=kind, output=output))
    assert result.stages[0].last < result.stages[0].first


def test_weights_of_losses_multiply_the_gradients() -> None:
    teacher = tiny_teacher()
    student = rewrite(teacher, {"rules": [{"use": "hedgehog"}]}, verify="none", force=True)
    rows = Rows(token_rows(2))

    def of(**fields: Any) -> tuple[float, list[torch.Tensor]]:
        stage = MatchLayers(teacher, student, stage_of(**fields))
        total = stage.backward(rows, 1.0).total
        return total, [p.grad for p in stage.core.values() if p.grad is not None]

    output = of()
    maps = of(output=0.0, attention="frobenius")
    both = of(output=0.5, attention="frobenius", attention_weight=3.0)
    assert both[0] == pytest.approx(0.5 * output[0] + 3 * maps[0], rel=1e-5)
    for sum_, a, b in zip(both[1], output[1], maps[1], strict=True):
        torch.testing.assert_close(sum_, 0.5 * a + 3 * b, atol=1e-6, rtol=1e-4)


def test_what_has_no_attention_weights_is_refused() -> None:
    teacher = tiny_teacher()
    with pytest.raises(UsageError, match="stand_in does not state its attention weights"):
        MatchLayers(teacher, tiny_student(teacher), stage_of(attention="frobenius"))
    core = Mixer(site_of(True), HedgehogOptions())
    core.info = Hedgehog.info  # type: ignore[misc]
    with pytest.raises(UnsupportedError, match="does not state"):
        core.attention_rows(tokens_of(4, False), slice(0, 4))
    with pytest.raises(UsageError, match="give 'output' a weight"):
        stage_of(output=0)


def test_modules_and_runs_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    student = rewrite(teacher, {"rules": [{"use": "hedgehog"}]}, verify="none", force=True)
    config = stage_of(attention="frobenius", output=0)
    with monkeypatch.context() as patch:
        patch.setattr(match_layers, "rewritten_owners", lambda model: {})
        with pytest.raises(UsageError, match="has no attention weights to learn"):
            MatchLayers(teacher, student, config)
    monkeypatch.setattr(match_layers, "size", lambda: 2)
    with pytest.raises(UsageError, match="one process only"):
        MatchLayers(teacher, student, config)
