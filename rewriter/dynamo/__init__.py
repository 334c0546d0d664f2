"""`torch.compile(model, backend="rewriter")`: sites are found and replaced in dynamo's graphs."""

from rewriter.dynamo.backend import rewriter_backend
from rewriter.dynamo.report import CompileReport, GraphReport

__all__ = ["CompileReport", "GraphReport", "rewriter_backend"]
