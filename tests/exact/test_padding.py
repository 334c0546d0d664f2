"""Layers of encoders run on their tokens alone: same outputs at tokens, 0 at padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter.backends.registry import VARIABLE
from rewriter.passes.exact import padding
from rewriter.passes.exact.tokenwise import mixing

pytestmark = pytest.mark.usefixtures("generated_kernels")
Pair = tuple[nn.Module, nn.Module]


@pytest.fixture(scope="module")
def bert() -> Pair:
    torch.manual_seed(0)
    config = hf.BertConfig(**{**tiny_models.BODY, "num_hidden_layers": 2})
    model = tiny_models.sharpen(hf.BertModel(config)).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        policy = {"rules": [{"use": "fused"}], "packed": True}
        return model, rewriter.rewrite(model, policy, verify="quick")


def batch(*lengths: int, width: int = 40, left: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    steps = torch.arange(width)
    sizes = torch.tensor(lengths)[:, None]
    mask = steps >= width - sizes if left else steps < sizes
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every packed run."""
    seen: list[int] = []
    run = padding._run_packed

    def spy(*args: Any) -> Any:
        seen.append(int(args[-1].sum()))
        return run(*args)

    monkeypatch.setattr(padding, "_run_packed", spy)
    return seen


def test_every_layer_is_packed_and_the_contracts_hold(bert: Pair) -> None:
    plan = rewriter.plan_of(bert[1])
    assert [(x.fqn, x.status) for x in plan.packed] == [
        ("encoder.layer.0", "done"),
        ("encoder.layer.1", "done"),
    ]
    checks = [c for c in rewriter.report_of(bert[1]).contracts if "packed layers" in c.check]
    assert [c.outcome for c in checks] == ["pass"]


@pytest.mark.parametrize("left", [False, True])
def test_tokens_are_equal_and_padding_is_zero(bert: Pair, rows: list[int], left: bool) -> None:
    call = batch(3, 40, 1, 17, left=left)
    valid = call["attention_mask"].bool()
    ours, theirs = (m(**call) for m in reversed(bert))
    assert rows == [61, 61]
    a, b = ours.last_hidden_state, theirs.last_hidden_state
    torch.testing.assert_close(a[valid], b[valid], rtol=1e-4, atol=1e-5)
    assert not a[~valid].any()
    if not left:
        torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=1e-4, atol=1e-5)


def test_gradients_are_equal(bert: Pair, rows: list[int]) -> None:
    call = batch(3, 40, 1, 17)
    wanted = torch.randn(4, 40, 64) * call["attention_mask"][..., None]
    grads = []
    for model in bert:
        loss = (model(**call).last_hidden_state * wanted).sum()
        layer = model.get_submodule("encoder.layer.0.intermediate.dense")
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert rows == [61, 61]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_batches_with_little_padding_run_as_they_are(bert: Pair, rows: list[int]) -> None:
    for call in (batch(40, 40), batch(39, 40), {"input_ids": batch(40)["input_ids"]}):
        ours, theirs = (m(**call).last_hidden_state for m in reversed(bert))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert rows == []


def test_who_looks_inside_sees_whole_batches(bert: Pair, rows: list[int]) -> None:
    call = batch(3, 40)
    ours, theirs = (m(**call, output_hidden_states=True).hidden_states for m in reversed(bert))
    valid = call["attention_mask"].bool()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[valid], b[valid], rtol=1e-4, atol=1e-5)
    assert rows == []
    shapes = []
    inner = bert[1].get_submodule("encoder.layer.0.intermediate")
    handle = inner.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    bert[1](**call)
    handle.remove()
    assert shapes == [(2, 40, 96)]
    assert rows == [43]  # the other layer, whose inside nobody sees


def test_save_and_load_keep_it(bert: Pair, rows: list[int], tmp_path: Path) -> None:
    bert[1].save_pretrained(tmp_path / "saved")
    again = rewriter.load(tmp_path / "saved")
    call = batch(3, 40, 1, 17)
    assert torch.equal(again(**call)[0], bert[1](**call)[0])
    assert rows == [61] * 4


class Layer(nn.Module):
    """Attention and a step of the wanted kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.into = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.into(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.kind == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.kind == "convolution":
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        elif self.kind == "shift":
            x = x + x.roll(1, 1)
        elif self.kind == "place":
            x = x + torch.arange(x.shape[1])[:, None]
        elif self.kind == "running":
            x = x.cumsum(1)
        elif self.kind == "first":
            x = x + x[:, :1]
        else:
            x = self.norm(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).relu()
        return x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("none", None),
        *((k, "may mix") for k in ("mean", "convolution", "shift", "running", "first")),
        ("place", "place of a token"),
    ],
)
def test_what_mixes_tokens_is_refused(kind: str, reason: str | None) -> None:
    found = mixing(Layer(kind).eval(), {"x": torch.randn(2, 9, 16)})
    assert (found is None) if reason is None else (found is not None and reason in found)
