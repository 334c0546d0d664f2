"""Which module and which source line a graph node comes from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

from rewriter.ir.site import Source

MODULE_STACK = "module_stack"
"""Node metadata: ((path relative to the captured module, call number), ...), outermost first."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = str(Path(torch.__file__).parent)


def normalise_stacks(graph: fx.Graph, prefix: str | re.Pattern[str]) -> None:
    """Write `MODULE_STACK` on every node; `prefix` is what stands before the model's own paths."""
    root = re.compile(re.escape(prefix)) if isinstance(prefix, str) else prefix
    for node in graph.nodes:
        entries: list[tuple[str, int]] = []
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            found = root.match(path)
            if found is None or path[found.end() :][:1] not in ("", "."):
                continue
            number = key.rsplit("@", 1)[1] if "@" in key else "0"
            entries.append((path[found.end() + 1 :], int(number) if number.isdigit() else 0))
        node.meta[MODULE_STACK] = tuple(entries)


def module_stack(node: fx.Node) -> tuple[tuple[str, int], ...]:
    """((module path, call number), ...) from the captured module ('') to the innermost one."""
    return tuple(node.meta.get(MODULE_STACK, ()))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that ran `node`, relative to the captured module ('' = it)."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def call_number(node: fx.Node) -> int:
    """How often the innermost module had run before (0 for the first call)."""
    stack = module_stack(node)
    return stack[-1][1] if stack else 0


def source_of(node: fx.Node) -> Source:
    """Where `node` was written: innermost module and the innermost line outside torch."""
    file, line = source_line(node.meta.get("stack_trace") or "")
    return Source(node.name, module_path(node), file, line)


def source_line(trace: str) -> tuple[str | None, int | None]:
    """(file, line) of the innermost frame outside torch in a formatted stack trace."""
    frames = [(file, int(line)) for file, line in _FRAME.findall(trace)]
    own = [f for f in frames if not f[0].startswith(_TORCH) and not f[0].startswith("torch/")]
    if not own and not frames:
        return None, None
    return (own or frames)[-1]


def common_module(paths: list[str]) -> str:
    """Deepest module path that contains all `paths` ('' if nothing deeper does)."""
    split = [p.split(".") if p else [] for p in paths]
    out: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) != 1:
            break
        out.append(parts[0])
    return ".".join(out)
