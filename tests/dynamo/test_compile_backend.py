"""`torch.compile(backend="rewriter")`: the same results, one compile for all lengths, a report."""

from __future__ import annotations

import logging

import pytest
import torch
import torch._dynamo
import transformers as hf
from tiny_models import GROUPED, VOCABULARY, EinsumAttention, Residual, sharpen
from torch import nn
from torch._dynamo.testing import CompileCounter

import rewriter
from rewriter.errors import UsageError

PLAIN = {"inner": "eager", "allow_reference": True, "linears": False}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def causal_lm(implementation: str = "sdpa", **more) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        **{**GROUPED, "num_hidden_layers": 1, **more}, attn_implementation=implementation
    )
    return sharpen(hf.LlamaForCausalLM(config)).eval()


def batch(rows: int, tokens: int, padding: str | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[0, slice(-3, None) if padding == "right" else slice(3)] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def compiled(model: nn.Module, dynamic: bool | None = None, **options):
    report = rewriter.CompileReport()
    options = {**PLAIN, "report": report, **options}
    return torch.compile(model, backend="rewriter", dynamic=dynamic, options=options), report


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, valid: torch.Tensor) -> None:
    gap = (ours - theirs).abs() * valid[..., None]
    assert float(gap.max()) <= 1e-5 * float(theirs.abs().max())


def test_the_backend_is_installed():
    assert "rewriter" in torch.compiler.list_backends()


class Padded(nn.Module):
    """Causal attention of four heads over two key heads, with a padding mask of the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        q = self.q(x).view(rows, tokens, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(rows, tokens, 2, 2, 8).unbind(2)
        k, v = (t.transpose(1, 2).repeat_interleave(2, dim=1) for t in (k, v))
        steps = torch.arange(tokens)
        shown = (steps[None, :] <= steps[:, None]) & attention_mask.bool()[:, None, None, :]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        return out.transpose(1, 2).reshape(rows, tokens, 32)


def test_one_compile_serves_lengths_batches_and_paddings():
    model = Padded()
    compiled_model, report = compiled(model, dynamic=True)
    calls = (batch(2, 13), batch(3, 29, "right"), batch(2, 17, "left"), batch(2, 90))
    with torch.no_grad():
        for mask in (call["attention_mask"] for call in calls):
            x = torch.randn(*mask.shape, 32)
            assert_same(compiled_model(x, mask), model(x, mask), mask)
    assert len(report.graphs) == 1 and report.spliced == 1
    site = report.graphs[0].outcomes[0].site
    assert site.mask.describe() == "causal & key_padding"
    assert (site.heads.query, site.heads.key_value) == (4, 2)


@pytest.mark.nightly
def test_a_language_model_compiles_once():
    model = causal_lm()
    compiled_model, report = compiled(model, dynamic=True)
    with torch.no_grad():
        for call in (batch(2, 13), batch(3, 29, "right"), batch(2, 17, "left"), batch(2, 90)):
            assert_same(compiled_model(**call).logits, model(**call).logits, call["attention_mask"])
    assert len(report.graphs) == 1 and report.spliced == 1
    site = report.graphs[0].outcomes[0].site
    assert site.fqn == "model.layers.0.self_attn"
    assert site.mask.describe() == "causal & key_padding"
    assert (site.heads.query, site.heads.key_value) == (4, 2)


class Scaled(nn.Module):
    """Hand-written causal attention whose scale is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.scaling = 0.4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        q = x.view(rows, tokens, 4, 8).transpose(1, 2)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = (q @ q.transpose(-1, -2)) * self.inner.scaling
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ q


def test_a_float_attribute_is_a_constant_under_guard():
    model = Scaled()
    compiled_model, report = compiled(model, dynamic=True)
    q = torch.randn(2, 13, 32)
    torch.testing.assert_close(compiled_model(q), model(q))
    assert report.spliced == 1, str(report)
    model.inner.scaling = 0.8
    torch.testing.assert_close(compiled_model(q), model(q))
    assert report.spliced == 2, str(report)


def test_training_gives_the_same_gradients():
    model = Residual(EinsumAttention()).train()
    compiled_model, report = compiled(model, inner="aot_eager")
    x = torch.randn(2, 19, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [x, *model.parameters()]
    theirs = torch.autograd.grad(model(x).square().sum(), leaves)
    ours = torch.autograd.grad(compiled_model(x).square().sum(), leaves)
    assert report.spliced == 1 and report.graphs[0].differentiable
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_dense_mask_is_not_computed_any_more():
    model = Residual(EinsumAttention())
    counter = CompileCounter()
    torch._dynamo.reset()
    kept = []

    def inner(graph, inputs):
        kept.append([str(n.target) for n in graph.graph.nodes])
        return counter(graph, inputs)

    torch._dynamo.register_backend(inner, name="keeps_the_graph")
    compiled_model, report = compiled(model, inner="keeps_the_graph")
    x = torch.randn(2, 19, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled_model(x), model(x), rtol=1e-5, atol=1e-5)
    assert report.spliced == 1 and counter.frame_count == 1
    assert any("attention_rewriter.block_sparse" in t for t in kept[0])
    assert not any("triu" in t or "softmax" in t or "masked_fill" in t for t in kept[0])


def test_graph_breaks_give_one_report_entry_each():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Residual(EinsumAttention()), Residual(EinsumAttention())

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x).relu()

    model = Broken()
    compiled_model, report = compiled(model)
    x = torch.randn(2, 19, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled_model(x), model(x), rtol=1e-5, atol=1e-5)
    assert [g.spliced for g in report.graphs] == [1, 1]


class Dropping(nn.Module):
    """SDPA with dropout on the weights."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(
            q, q, q, dropout_p=0.5 if self.training else 0.0, is_causal=True
        )


def test_active_dropout_stays_dropout():
    model = Dropping().train()
    compiled_model, report = compiled(model)
    q = torch.ones(1, 2, 400, 8)
    out = compiled_model(q)
    assert report.spliced == 0
    assert "dropout" in report.graphs[0].outcomes[0].what
    assert float(out.std()) > 0.01
    model.eval()
    torch.testing.assert_close(compiled_model(q), model(q))
    assert report.spliced == 1


def test_an_opaque_mask_stays_as_it_is():
    class Given(nn.Module):
        def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    compiled_model, report = compiled(Given())
    q, mask = torch.randn(1, 2, 9, 8), torch.rand(9, 9) < 0.7
    mask |= torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(compiled_model(q, mask), Given()(q, mask))
    assert report.spliced == 0 and "opaque" in report.graphs[0].outcomes[0].what


@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (9, 9)])
def test_a_mask_that_hides_nothing_today_is_not_dropped(shape):
    """The first call shows an open mask; the graph must still obey the next one."""

    class Given(nn.Module):
        def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask.bool())

    compiled_model, report = compiled(Given())
    q = torch.randn(1, 2, 9, 8)
    for mask in (torch.ones(shape), torch.ones(shape).tril()):
        torch.testing.assert_close(compiled_model(q, mask), Given()(q, mask))
    assert report.spliced == 0


def test_positions_of_the_caller_are_not_taken_for_granted():
    class Positioned(nn.Module):
        def forward(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            shown = positions[:, None, None, :] <= positions[:, None, :, None]
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=shown)

    compiled_model, report = compiled(Positioned())
    q = torch.randn(1, 2, 9, 8)
    for positions in (torch.arange(9)[None], torch.arange(9).flip(0)[None]):
        torch.testing.assert_close(compiled_model(q, positions), Positioned()(q, positions))
    assert report.spliced == 0


def test_an_approximate_policy_is_carried_out_when_it_is_named():
    policy = {"rules": [{"use": "sink_window", "options": {"window": 4, "sinks": 1}}]}
    model = Residual(EinsumAttention())
    compiled_model, report = compiled(model, policy=policy)
    x = torch.randn(2, 13, 64)
    rewritten = rewriter.rewrite(model, policy, (x,), verify="none")
    with torch.no_grad():
        torch.testing.assert_close(compiled_model(x), rewritten(x), rtol=1e-5, atol=1e-5)
        assert float((compiled_model(x) - model(x)).abs().max()) > 1e-3
    assert report.spliced == 1


def test_linear_layers_run_by_the_faster_code():
    model = Residual(EinsumAttention())
    compiled_model, report = compiled(model, linears=True)
    x = torch.randn(2, 19, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled_model(x), model(x), rtol=1e-5, atol=1e-5)
    assert report.graphs[0].linears == 4


def test_autocast_and_no_grad_regions():
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.plain = Residual(EinsumAttention()), Residual(EinsumAttention())

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.inside(x)
            with torch.no_grad():
                return self.plain(x.float())

    model = Regions()
    compiled_model, report = compiled(model)
    x = torch.randn(2, 19, 64)
    torch.testing.assert_close(compiled_model(x), model(x), rtol=2e-2, atol=2e-2)
    assert not compiled_model(x).requires_grad
    assert report.spliced == 2, str(report)


@pytest.mark.nightly
def test_inductor_with_a_generated_kernel(generated_kernels):
    model = Residual(EinsumAttention())
    compiled_model, report = compiled(model, inner="inductor", allow_reference=False)
    x = torch.randn(2, 19, 64)
    with torch.inference_mode():
        torch.testing.assert_close(compiled_model(x), model(x), rtol=1e-5, atol=1e-5)
    assert report.spliced == 1, str(report)
    assert "on cpu" in report.graphs[0].outcomes[0].what


def test_without_a_generated_kernel_the_original_stays():
    compiled_model, report = compiled(Residual(EinsumAttention()), allow_reference=False)
    with torch.no_grad():
        compiled_model(torch.randn(2, 19, 64))
    assert report.spliced == 0
    assert "no generated kernel" in report.graphs[0].outcomes[0].what


def test_the_report_reads_well_and_one_line_is_logged(caplog):
    compiled_model, report = compiled(Residual(EinsumAttention()))
    assert "call the compiled model" in str(report)
    with caplog.at_level(logging.INFO, logger="rewriter.compile"), torch.no_grad():
        compiled_model(torch.randn(2, 19, 64))
    assert [r.getMessage() for r in caplog.records] == [report.graphs[0].summary()]
    assert "1 of 1 sites spliced" in str(report)
    assert "attention: causal: spliced: block_sparse on reference" in str(report)
    assert report.to_json()["graphs"][0]["sites"][0]["status"] == "spliced"


def test_wrong_options_are_explained():
    model = Residual(EinsumAttention())
    for options, words in (
        ({"polcy": "exact"}, "did you mean 'policy'"),
        ({"policy": "exakt"}, "no preset policy 'exakt'"),
        ({"policy": "hedgehog"}, "call rewriter.rewrite"),
        ({"inner": "nothing"}, "no compiler 'nothing'"),
        ({"report": []}, "CompileReport"),
    ):
        torch._dynamo.reset()
        compiled_model = torch.compile(model, backend="rewriter", options={**PLAIN, **options})
        with pytest.raises(Exception, match=words) as caught:
            compiled_model(torch.randn(1, 5, 64))
        inner = caught.value.__cause__ or getattr(caught.value, "inner_exception", caught.value)
        assert isinstance(inner, UsageError), type(inner)
