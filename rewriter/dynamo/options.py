"""What `torch.compile(..., backend="rewriter", options={...})` accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rewriter.documents import did_you_mean
from rewriter.dynamo.report import CompileReport
from rewriter.errors import UsageError
from rewriter.policy import Policy


@dataclass(frozen=True)
class CompileOptions:
    """Options of the backend.

    Attributes:
        policy: a preset name, a YAML file, a mapping or a `Policy`; `exact` changes no result.
        inner: the backend that compiles what is left: 'inductor', 'aot_eager', 'eager' or any
            other name that `torch.compile` knows.
        inner_options: options of that backend (of Inductor: its config entries).
        report: collects what was done in each graph.
        allow_reference: let plain torch stand in where no generated kernel serves a site. Slower
            than what it replaces; for trying out a rewrite on a machine without a C++ compiler.
        linears: in graphs without gradients, run linear layers by the faster of torch's code and
            generated code, measured at first use.
    """

    policy: str | Path | Mapping[str, Any] | Policy = "exact"
    inner: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    report: CompileReport | None = None
    allow_reference: bool = False
    linears: bool = True

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> CompileOptions:
        """The options as given to `torch.compile`.

        Raises:
            UsageError: an option that does not exist, or a value of the wrong kind.
        """
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise UsageError(
                    f"backend=\"rewriter\" has no option '{name}'{did_you_mean(name, known)}; "
                    "options of the compiler behind it go into 'inner_options'"
                )
        report = given.get("report")
        if report is not None and not isinstance(report, CompileReport):
            raise UsageError("option 'report' takes a rewriter.CompileReport() to write into")
        return cls(**given)
