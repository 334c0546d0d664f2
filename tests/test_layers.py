"""The shape of the code base: imports point downward, files stay short, the wheel is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = {"rewriter": ROOT / "rewriter", "rewriter.passes": ROOT / "passes",
         "rewriter.backends": ROOT / "backends"}  # fmt: skip
ORDER = (
    ("rewriter.errors", "rewriter.ir"),
    (
        "rewriter.documents",
        "rewriter.extension",
        "rewriter.atomic",
        "rewriter.timing",
        "rewriter.generation",
        "rewriter.kv_cache",
    ),
    ("rewriter.backends",),
    ("rewriter.mixers",),
    ("rewriter.targets", "rewriter.plan"),
    ("rewriter.budgets", "rewriter.policy", "rewriter.policies"),
    ("rewriter.passes",),
    (
        "rewriter.report",
        "rewriter.bench",
        "rewriter.distill",
        "rewriter.checkpoint",
        "rewriter.evaluate",
    ),
    ("rewriter.planner", "rewriter.pages"),
    ("rewriter.api", "rewriter.dynamo"),
    ("rewriter.cli", "rewriter.__main__"),
)


def sources() -> Iterator[tuple[str, Path]]:
    for package, folder in TREES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def layer(module: str) -> int | None:
    for number, names in enumerate(ORDER):
        if any(module == n or module.startswith(f"{n}.") for n in names):
            return number
    return None


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_downward() -> None:
    wrong = []
    for module, path in sources():
        mine = layer(module)
        if mine is None:
            assert module == "rewriter", f"{module} belongs to no layer"
            continue
        for name in imported(path):
            theirs = layer(name) if name.startswith("rewriter.") else None
            if theirs is not None and theirs > mine:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported: none of a function, none for types alone."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            yield from run_on_import(getattr(node, part, []))


def needed(path: Path) -> Iterator[str]:
    """What importing a file imports first, with the packages that hold it."""
    for node in run_on_import(ast.parse(path.read_text(encoding="utf-8")).body):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def test_any_module_can_be_imported_first() -> None:
    """No cycle of imports, counting the packages that an import runs on its way."""
    files = dict(sources())
    graph = nx.DiGraph(
        (module, name)
        for module, path in files.items()
        for name in needed(path)
        if name in files and not f"{module}.".startswith(f"{name}.")
    )
    assert [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1] == []


def test_no_file_is_too_long_to_hold_one_idea() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for _, p in sources()}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400} == {}


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(listed["tool"]["setuptools"]["packages"])
    found = {m for m, path in sources() if path.name == "__init__.py"}
    assert packages == found


def test_nothing_is_missing_from_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named 'setuptools'" in done.stderr:
        pytest.fail("setuptools is not installed here: install the 'dev' extra with constraints")
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("attention_rewriter-*.whl"))
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
        for package, folder in TREES.items()
        for path in [
            *folder.rglob("*.py"),
            *folder.rglob("*.yaml"),
            *folder.rglob("py.typed"),
            *folder.rglob("*.jinja"),
        ]
    }
    assert expected <= held
