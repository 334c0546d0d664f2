"""A compiler-style graph rewriter for efficient attention.

import rewriter
student = rewriter.rewrite(model, "hybrid")   # find, replace, prove
print(rewriter.report_of(student).passed)
"""

from importlib.metadata import PackageNotFoundError, version

from rewriter.api import inspect, make_plan_for, plan_of, report_of, rewrite
from rewriter.errors import RewriterError

try:
    __version__ = version("attention-rewriter")
except PackageNotFoundError:  # running from an uninstalled tree
    __version__ = "0"

__all__ = [
    "RewriterError",
    "__version__",
    "inspect",
    "make_plan_for",
    "plan_of",
    "report_of",
    "rewrite",
]
