"""What a person sees when something goes wrong: one line on stderr and an exit code.

Exit codes: 0 done, 1 to 7 the errors of `rewriter.errors` (2 also for a wrong command line),
70 a bug in this package, 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup

from rewriter.errors import RewriterError

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
TRACEBACK_VARIABLE = "REWRITER_TRACEBACK"


@dataclass(frozen=True)
class Failure:
    """What is told about an exception: kind, one line of text, exit code, and a report if any."""

    kind: str
    message: str
    code: int
    report: Any = None


class GuardedGroup(TyperGroup):
    """A command group whose exceptions end as one line and an exit code."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run a command line and leave through SystemExit, whatever happens."""
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra.pop("standalone_mode", None)
        try:
            code = super().main(words, standalone_mode=False, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            _forget_stdout()
            sys.exit(BROKEN_PIPE)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:  # the last line of defence: nobody is shown a bare traceback
            if wants_traceback(words):
                traceback.print_exc(file=sys.stderr)
            code = tell(describe(error), as_json="--json" in words)
        if code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Keep a broken pipe from being taken for an ordinary failure on the way up."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _forget_stdout()
            raise SystemExit(BROKEN_PIPE) from None


def wants_traceback(words: Sequence[str]) -> bool:
    return "--traceback" in words or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def describe(error: Exception) -> Failure:
    """The line and exit code for an exception."""
    if isinstance(error, RewriterError):
        report = getattr(error, "report", None)
        return Failure(type(error).__name__, one_line(str(error)), error.exit_code, report)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own errors
        context = getattr(error, "ctx", None)
        command = getattr(context, "command_path", None) or "rewriter"
        text = one_line(str(error.format_message())).rstrip(".")
        text = text[:1].lower() + text[1:]
        return Failure("UsageError", f"{text}; see '{command} --help'", 2)
    if isinstance(error, MemoryError):
        text = "out of memory; use a smaller --length, a smaller model or --dtype bfloat16"
        return Failure("MemoryError", text, 1)
    cause = one_line(f"{type(error).__name__}: {error}")
    hint = f"run it again with {TRACEBACK_VARIABLE}=1 or --traceback and report what it prints"
    return Failure("Bug", f"this is a bug in rewriter ({cause}); {hint}", BUG)


def tell(failure: Failure, as_json: bool) -> int:
    """Write the failure to stderr, and with `--json` also as an object to stdout; its exit code."""
    sys.stderr.write(f"error: {failure.message}\n")
    if as_json:
        body = {"kind": failure.kind, "message": failure.message, "exit_code": failure.code}
        whole = {"error": body}
        if failure.report is not None:
            from rewriter.cli.session import plain

            whole["report"] = plain(failure.report.to_json())
        sys.stdout.write(json.dumps(whole, indent=2) + "\n")
    return failure.code


def one_line(text: str) -> str:
    return " ".join(text.split())


def _forget_stdout() -> None:
    """Let the interpreter's last flush go nowhere instead of failing once more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no real file, as in tests
        return
