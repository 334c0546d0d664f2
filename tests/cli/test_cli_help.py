"""Help texts, and that they come without loading torch."""

import subprocess
import sys
import time

import pytest
from cli_tools import failed, run

COMMANDS = (
    "inspect",
    "plan",
    "convert",
    "distill",
    "recipes",
    "eval",
    "generate",
    "mixers",
    "bench",
    "profile",
    "sensitivity",
    "report",
)


def test_help_names_every_command_and_the_exit_codes() -> None:
    out = run("--help")
    assert out.exit_code == 0
    assert all(f"│ {name} " in out.stdout for name in COMMANDS)
    assert "130" in out.stdout


def test_no_arguments_show_the_help() -> None:
    out = run()
    assert out.exit_code == 0
    assert "Usage: rewriter" in out.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(name: str) -> None:
    out = run(name, "--help")
    assert out.exit_code == 0
    assert "Example" in out.stdout
    assert out.stdout.count(f"rewriter {name}") >= 1
    for option in ("--json", "--threads", "--traceback"):
        assert option in out.stdout
    assert max(map(len, out.stdout.splitlines())) <= 80
    assert "\x1b" not in out.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nonsense",), "nonsense"),
        (("convert", "somewhere"), "--out"),
        (("inspect",), "CHECKPOINT"),
        (("inspect", "a", "--no-such-option"), "--no-such-option"),
        (("generate", "a", "--prompt", "b", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("convert", "a", "--out", "b", "--verify", "some"), "--verify"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    words: tuple[str, ...], said: str
) -> None:
    line = failed(run(*words), 2)
    assert said in line
    assert "--help" in line


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from rewriter.cli.main import app; "
        "print([m for m in ('torch', 'transformers', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_can_be_run_and_is_quick() -> None:
    start = time.process_time()
    done = subprocess.run(
        [sys.executable, "-m", "rewriter", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Usage: rewriter " in done.stdout
    assert time.process_time() - start < 5


def test_version() -> None:
    import rewriter

    assert run("--version").stdout.strip() == rewriter.__version__
