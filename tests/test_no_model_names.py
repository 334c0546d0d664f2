"""Attention is found by structure: no model family, class or config name in any pass."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

import rewriter.passes.capture

PASSES = Path(rewriter.passes.capture.__file__).parent
FORBIDDEN = re.compile(
    r"llama|gpt|bert|mistral|mixtral|qwen|gemma|phi-?[1-9]|neox|\bopt[-_]|bloom|falcon|\bvit\b|"
    r"dino|smollm|minilm|deepseek|whisper|\bbart\b|\bt5\b|model_type|__class__\.__name__|"
    r"LlamaAttention|architectures",
    re.IGNORECASE,
)
FILES = sorted(PASSES.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PASSES)))
def test_no_names_in_code_or_comments(path):
    text = path.read_text(encoding="utf-8")
    found = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if FORBIDDEN.search(token.string)
    ]
    assert not found


def test_the_lint_reads_the_matcher():
    names = {p.relative_to(PASSES).as_posix() for p in FILES}
    assert {"capture.py", "match/matcher.py", "normalise/softmax.py"} <= names


@pytest.mark.parametrize("line", ["LlamaAttention", "config.model_type", "GPT2", "ViT", "opt-125m"])
def test_the_lint_would_find(line):
    assert FORBIDDEN.search(line)
