"""The real checkpoints that `make assets` fetches, from REWRITER_ASSETS or assets/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rewriter.api import Inspection, inspect
from rewriter.checkpoint import open_checkpoint
from rewriter.checkpoint.read import Source

ROOT = Path(__file__).resolve().parents[2]


def asset(name: str, pattern: str) -> Path:
    folder = Path(os.environ.get("REWRITER_ASSETS", ROOT / "assets")) / name
    found = sorted(folder.glob(pattern))
    if not found:
        message = f"{folder} has no {pattern}: run `make assets` first"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found[0]


@pytest.fixture(autouse=True)
def _as_a_person_has_it(generated_kernels: None) -> None:
    """Real models run on the generated kernels."""


@pytest.fixture(scope="session")
def smollm2() -> Any:
    return open_checkpoint(asset("smollm2", "*.gguf"), dtype="float32").model.eval()


@pytest.fixture
def smollm2_source() -> Source:
    return open_checkpoint(asset("smollm2", "*.gguf"))


@pytest.fixture(scope="session")
def smollm2_found(smollm2: Any) -> Inspection:
    return inspect(smollm2)


@pytest.fixture(scope="session")
def minilm() -> Any:
    return open_checkpoint(asset("minilm", "config.json").parent, dtype="float32").model.eval()


@pytest.fixture(scope="session")
def minilm_found(minilm: Any) -> Inspection:
    return inspect(minilm)
