"""Mixer names: lookup, typos, clashes and plugins that do not load."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from rewriter.errors import UsageError
from rewriter.mixers import plugins, registry
from rewriter.mixers.channel import registry as channel
from rewriter.mixers.exact.keep import Keep

OWN = {
    "keep",
    "sink_window",
    "hedgehog",
    "hedgehog_window",
    "gla",
    "retnet",
    "gated_deltanet",
    "rwkv7",
    "mamba2",
    "hydra",
    "s4d",
    "sigmoid_attention",
    "duo",
    "moba",
    "razor",
    "linear_shortcut",
    "drop",
}


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, registry.MIXERS.group)


def install(monkeypatch: pytest.MonkeyPatch, *extra: EntryPoint) -> None:
    real = list(plugins.entry_points(group=registry.MIXERS.group))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real, *extra])


def test_own_mixers() -> None:
    assert set(registry.names()) >= OWN
    found = registry.available()
    assert {name: found[name].info.name for name in OWN} == {name: name for name in OWN}
    assert registry.get("keep") is Keep


def test_typos_name_what_is_close() -> None:
    with pytest.raises(UsageError, match="did you mean 'hedgehog'"):
        registry.get("hedghog")
    with pytest.raises(UsageError, match=r"there are: .*keep"):
        registry.get("qqqq")
    with pytest.raises(UsageError, match=r"no channel mixer.* did you mean 'lowrank_mlp'"):
        channel.get("lowrank")


def test_a_clash_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, point("keep", "elsewhere:Keep"))
    with pytest.raises(UsageError, match="two mixers are registered as 'keep'"):
        registry.get("keep")
    with pytest.raises(UsageError, match="two mixers"):
        registry.available()


def test_the_same_entry_twice_is_no_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, point("keep", "rewriter.mixers.exact.keep:Keep"))
    assert registry.get("keep") is Keep


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:Thing", "cannot be loaded"),
        ("math:pi", "not a subclass of Mixer"),
        ("rewriter.mixers.exact.keep:Keep", "calls itself 'keep'"),
    ],
)
def test_a_broken_plugin_hurts_only_its_users(
    monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    install(monkeypatch, point("plugin", value))
    assert "plugin" in registry.names()
    assert set(registry.available()) >= OWN
    assert "plugin" not in registry.available()
    assert registry.get("keep") is Keep
    with pytest.raises(UsageError, match=reason):
        registry.get("plugin")
