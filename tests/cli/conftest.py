"""Tiny random checkpoints on disk, made once."""

from pathlib import Path

import pytest
from cli_tools import TEXT, byte_tokenizer, run, tiny_llama

from rewriter import api
from rewriter.checkpoint import open_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def converted(tiny: Path) -> Path:
    """The same with a trainable mixer in every layer."""
    target = tiny.parent / "converted"
    policy = tiny.parent / "all.yaml"
    policy.write_text("rules: [{use: hedgehog_window, options: {window: 8}}]\n")
    out = run("convert", tiny, "--policy", policy, "--out", target, "--verify", "none")
    assert out.exit_code == 0, out.stderr
    return target


@pytest.fixture(scope="session")
def text(tiny: Path) -> Path:
    path = tiny.parent / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def found(tiny: Path) -> api.Inspection:
    return api.inspect(open_checkpoint(tiny).model)


@pytest.fixture
def known(found: api.Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a command the tracing of the tiny model, which another test has seen work."""
    monkeypatch.setattr(api, "find", lambda *_: found)
