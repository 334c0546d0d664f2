"""A compiler-style graph rewriter for efficient attention.

import rewriter
student = rewriter.rewrite(model, "hybrid")   # find, replace, prove
print(rewriter.report_of(student).passed)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.api import inspect, make_plan_for, plan_of, report_of, rewrite
    from rewriter.budgets import budget
    from rewriter.checkpoint.load import load
    from rewriter.dynamo.report import CompileReport

try:
    __version__ = version("attention-rewriter")
except PackageNotFoundError:  # running from an uninstalled tree
    __version__ = "0"

# Loaded on first use: importing torch and transformers takes seconds, `rewriter --help` should not.
_HOMES = {
    "CompileReport": "rewriter.dynamo.report",
    "budget": "rewriter.budgets",
    "inspect": "rewriter.api",
    "load": "rewriter.checkpoint.load",
    "make_plan_for": "rewriter.api",
    "plan_of": "rewriter.api",
    "report_of": "rewriter.api",
    "rewrite": "rewriter.api",
}

__all__ = [
    "CompileReport",
    "RewriterError",
    "__version__",
    "budget",
    "inspect",
    "load",
    "make_plan_for",
    "plan_of",
    "report_of",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rewriter' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
