"""What another package adds by entry points: the package under examples/extension, installed by
writing what an installer writes, and packages that are broken in every way."""

from __future__ import annotations

import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewriter
from rewriter import extension
from rewriter.mixers import registry
from rewriter.passes.verify.cores import check_core

PACKAGE = Path(__file__).resolve().parents[2] / "examples" / "extension"
X = torch.randn(2, 12, 32)


def install(folder: Path, name: str, points: dict[str, dict[str, str]]) -> None:
    """Write the metadata that an installer would write."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    extension.forget()
    yield tmp_path
    extension.forget()
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


@pytest.fixture
def extras(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package under examples/, installed."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    install(packages, project["name"], project["entry-points"])
    monkeypatch.syspath_prepend(PACKAGE)
    extension.forget()
    return packages


class Attention(nn.Module):
    """Causal attention whose scores and weights go through functions of the caller."""

    def __init__(self, normalise: Any, seen: Any = lambda x: x) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.normalise, self.seen = normalise, seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        n = x.shape[1]
        scores = self.seen(q @ k.mT * 8**-0.5)
        hidden = torch.ones(n, n, device=x.device).triu(1).bool()
        weights = self.seen(self.normalise(scores.masked_fill(hidden, -torch.inf), -1))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_the_examples_are_short() -> None:
    for file in (PACKAGE / "attention_extras").glob("*.py"):
        assert len(file.read_text().splitlines()) < 80, file.name


def test_a_transparent_operator_is_looked_through(extras: Path) -> None:
    from attention_extras.named import named

    model = Attention(torch.softmax, lambda x: named(x, "attention")).eval()
    (site,) = rewriter.inspect(model, (X,)).sites
    assert site.kind == "causal" and site.scale == pytest.approx(8**-0.5)
    result = rewriter.rewrite(model, "identity", (X,), verify="quick")
    torch.testing.assert_close(result(X), model(X), rtol=0, atol=1e-6)


def test_without_the_rule_the_operator_stops_the_matcher(packages: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(PACKAGE)
    from attention_extras.named import named

    extension.forget()
    (miss,) = rewriter.inspect(
        Attention(torch.softmax, lambda x: named(x, "attention")).eval(), (X,)
    ).misses
    assert "'attention_extras::named' stands between" in miss.reason
    assert "declare it transparent" in miss.advice


def test_attention_begins_at_a_normaliser_of_another_package(extras: Path) -> None:
    from attention_extras.softmax_one import softmax_one

    model = Attention(softmax_one).eval()
    (site,) = rewriter.inspect(model, (X,)).sites
    assert site.normaliser == "softmax_one" and site.mask.causal
    same = rewriter.rewrite(model, "identity", (X,), verify="quick")
    torch.testing.assert_close(same(X), model(X), rtol=0, atol=1e-6)
    window = {"rules": [{"use": "sink_window"}]}
    plan, _ = rewriter.make_plan_for(model, window, (X,))
    assert "computes a softmax, and this block a softmax_one" in str(plan.decisions[0].reason)
    learned = {"rules": [{"use": "elu_linear"}]}
    result = rewriter.rewrite(model, learned, (X,), verify="quick")
    assert result.core.info.name == "elu_linear"


def test_a_constant_added_before_it_is_not_ignored(extras: Path) -> None:
    from attention_extras.softmax_one import softmax_one

    model = Attention(lambda x, dim: softmax_one(x + 1.0, dim)).eval()
    found = rewriter.inspect(model, (X,))
    assert not found.sites
    assert "a constant is added to scores that are not normalised" in found.misses[0].reason


def test_an_identity_that_is_none_is_refused_by_the_proof(packages: Path) -> None:
    """What a rule claims is not believed."""
    (packages / "liar.py").write_text(
        "from rewriter.extension import Transparent\nRULE = Transparent('erf')\n"
    )
    install(packages, "liar", {extension.RULES: {"erf": "liar:RULE"}})
    extension.forget()
    model = Attention(torch.softmax, lambda x: torch.erf(x)).eval()
    with pytest.raises(rewriter.RewriterError, match="differs from the original"):
        rewriter.rewrite(model, "identity", (X,))


class Gelu(nn.Module):
    """GPT-2's activation between two linear layers, as transformers spells it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.activations import NewGELUActivation

        self.up, self.act, self.down = nn.Linear(32, 64), NewGELUActivation(), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def test_a_graph_pattern_is_applied_by_the_compiler(extras: Path) -> None:
    torch._dynamo.reset()
    report = rewriter.CompileReport()
    model = Gelu().eval()
    options = {"inner": "eager", "report": report}
    compiled = torch.compile(model, backend="rewriter", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-6)
    assert report.graphs[0].to_json()["patterns"] == {"new_gelu": 1}
    assert "pattern new_gelu: replaced 1 times" in report.describe()
    loss = compiled(X).square().mean()
    (expected,) = torch.autograd.grad(model(X).square().mean(), [model.up.weight])
    (grad,) = torch.autograd.grad(loss, [model.up.weight])
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_a_check_declines_with_a_reason(extras: Path) -> None:
    torch._dynamo.reset()
    report = rewriter.CompileReport()
    model = Gelu().eval().double()
    options = {"inner": "eager", "report": report}
    compiled = torch.compile(model, backend="rewriter", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X.double()), model(X.double()))
    assert "which was not compared" in report.describe()


WRONG_PATTERN = """
import torch
from rewriter.extension import GraphPattern
class Wrong(GraphPattern):
    name = "wrong"
    def examples(self): return (torch.ones(3),)
    def pattern(self, x): return torch.tanh(x)
    def replacement(self, x): return torch.sin(x)
"""


def test_a_pattern_that_changes_values_is_not_applied(packages: Path) -> None:
    torch._dynamo.reset()
    (packages / "wrong_pattern.py").write_text(WRONG_PATTERN)
    install(packages, "wrong", {extension.PATTERNS: {"wrong": "wrong_pattern:Wrong"}})
    extension.forget()
    report = rewriter.CompileReport()
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh()).eval()
    compiled = torch.compile(
        model, backend="rewriter", options={"inner": "eager", "report": report}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    assert "its two functions differ" in report.describe()


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Equation 9 of the paper, over all pairs, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    f = [torch.where(x > 0, x + 1, x.exp()) for x in (q * scale**0.5, k * scale**0.5)]
    weights = (f[0] @ f[1].mT).tril()
    return (weights @ v / weights.sum(-1, keepdim=True)).float()


def test_the_mixer_equals_its_formula_and_keeps_the_contracts(extras: Path) -> None:
    mixer = registry.get("elu_linear")
    (site,) = rewriter.inspect(Attention(torch.softmax).eval(), (X,)).sites
    core = mixer(site, mixer.Options())
    q, k, v = torch.randn(3, 2, 4, 17, 8)
    torch.testing.assert_close(
        core(q, k, v, (None,) * len(site.terms))[0], dense(q, k, v, site.scale)
    )
    assert [r.check for r in check_core(core, "elu_linear") if r.outcome == "fail"] == []


BROKEN = {
    "raises": ("raise RuntimeError('no luck')", "broken:RULE", "RuntimeError: no luck"),
    "missing": ("", "broken:RULE", "cannot be loaded: AttributeError"),
    "absent": ("", "nowhere_at_all:RULE", "ModuleNotFoundError"),
    "kind": ("RULE = 3", "broken:RULE", "is no named Transparent"),
    "abstract": (
        "from rewriter.extension import Anchor\nclass RULE(Anchor): pass",
        "broken:RULE",
        "TypeError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_one_sentence_that_names_it(packages: Path, case: str) -> None:
    code, point, sentence = BROKEN[case]
    (packages / "broken.py").write_text(code + "\n")
    group = extension.ANCHORS if case == "abstract" else extension.RULES
    install(packages, "broken-package", {group: {"it": point}})
    extension.forget()
    with pytest.warns(UserWarning) as caught:
        found = rewriter.inspect(Attention(torch.softmax).eval(), (X,))
    texts = [str(w.message) for w in caught if "broken-package" in str(w.message)]
    assert len(texts) == 1 and sentence in texts[0] and "\n" not in texts[0]
    assert len(found.sites) == 1


def test_an_anchor_that_fails_later_is_left_out(packages: Path) -> None:
    (packages / "fails.py").write_text(
        "from rewriter.extension import Anchor\n"
        "class Fails(Anchor):\n"
        "    name = 'fails'\n"
        "    def read(self, node): raise KeyError('val')\n"
        "    def apply(self, scores): return scores\n"
    )
    install(packages, "fails", {extension.ANCHORS: {"fails": "fails:Fails"}})
    extension.forget()
    with pytest.warns(UserWarning, match="'fails' of fails failed with KeyError"):
        found = rewriter.inspect(Attention(torch.softmax).eval(), (X,))
    assert len(found.sites) == 1


def test_order_is_by_priority_then_name_and_one_name_counts_once(packages: Path) -> None:
    (packages / "several.py").write_text(
        "from rewriter.extension import Transparent\n"
        "A, B = Transparent('a::x'), Transparent('b::x', priority=2)\n"
        "C, D = Transparent('c::x'), Transparent('c::x', priority=9)\n"
    )
    install(packages, "one", {extension.RULES: {"c": "several:C", "a": "several:A"}})
    install(packages, "two", {extension.RULES: {"d": "several:D", "b": "several:B"}})
    extension.forget()
    with pytest.warns(UserWarning, match="'one' and 'two' both register 'c::x'"):
        names = [rule.operator for rule in extension.rules()]
    assert names == ["b::x", "a::x", "c::x"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [rule.operator for rule in extension.rules()] == names
