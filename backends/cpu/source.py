"""Assembles the source of a unit: constants of the spec, then headers, as one readable file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files

from rewriter.backends.cpu.target import Target

_LOCAL_INCLUDE = re.compile(r'^#include "(\w+)\.hpp"\n', re.MULTILINE)


@lru_cache(maxsize=64)
def header(name: str) -> str:
    """The text of `include/<name>.hpp`."""
    return (files("rewriter.backends.cpu") / "include" / f"{name}.hpp").read_text()


def assemble(
    target: Target,
    headers: Sequence[str],
    constants: Mapping[str, int | float | bool],
    types: Mapping[str, str] | None = None,
    code: str = "",
    split: str | None = None,
) -> str:
    """One self-contained translation unit.

    Args:
        target: gives LANES.
        headers: names of headers; those they include are put before them.
        constants: `constexpr` values by name.
        types: type aliases by name.
        code: C++ text after the constants, for generated functions.
        split: the first header that uses the constants, types and `code`, which come right before
            it; the last header if not given.

    The text holds everything it depends on, so its hash identifies the unit.
    """
    order: list[str] = []
    for name in headers:
        _add(name, order)
    cut = len(order) - 1 if split is None else order.index(split)
    parts = [f"#define LANES {target.lanes}\n", *(_body(name) for name in order[:cut])]
    parts += [f"using {name} = {value};\n" for name, value in (types or {}).items()]
    parts += [_constant(name, value) for name, value in constants.items()]
    return "".join([*parts, code, *(_body(name) for name in order[cut:])])


def _add(name: str, order: list[str]) -> None:
    for needed in _LOCAL_INCLUDE.findall(header(name)):
        _add(needed, order)
    if name not in order:
        order.append(name)


def _body(name: str) -> str:
    text = _LOCAL_INCLUDE.sub("", header(name)).replace("#pragma once\n", "")
    return f"// ---- {name}\n{text}"


def _constant(name: str, value: int | float | bool) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};\n"
    return f"constexpr float {name} = {value!r}f;\n"
