"""Policies and plans as text: safe YAML or JSON whose errors point at file, line and column."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rewriter.errors import UsageError

Location = tuple[int | str, ...]
MAX_BYTES = 64 * 2**20  # a plan of a thousand sites is under 4 MiB; this only stops accidents


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2: `no`, `on` and `1:30` are strings, not values."""


_CORE_SCALARS: Sequence[tuple[str, str, str]] = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE_SCALARS:
    _Loader.add_implicit_resolver(
        _tag,
        re.compile(rf"^(?:{_pattern})$"),
        [*_first.replace("\0", ""), *([""] if "\0" in _first else [])],
    )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class Document:
    """Parsed data and, where it came from text, the node tree that knows the positions.

    Attributes:
        name: file name, or 'policy' / 'plan' for data that came from Python.
        data: plain values.
        root: YAML node tree of the text, or None.
    """

    name: str
    data: Any
    root: yaml.Node | None = None

    def where(self, location: Location, key: bool = False) -> str:
        """'file:line:column' of a value (of its key with `key=True`), else 'name, at a[0].b'."""
        if self.root is None:
            return f"{self.name}, at {dotted(location)}" if location else self.name
        mark = _find(self.root, location, key).start_mark
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"


def dotted(location: Location) -> str:
    """('rules', 1, 'use') -> 'rules[1].use'."""
    out = ""
    for part in location:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Ending of an error sentence: the closest known name, or all of them when there are few."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 24 else ""


def read_text(path: Path, what: str) -> str:
    """Text of a policy or plan file.

    Raises:
        UsageError: it cannot be read, is not UTF-8 or is far too large.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is too large for a {what} (over {MAX_BYTES >> 20} MiB)")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"the {what} file {path} does not exist; check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text, so it is not a {what} file") from None
    except OSError as error:
        raise UsageError(f"cannot read the {what} file {path}: {error.strerror}") from None


def parse(text: str, name: str) -> Document:
    """Parse YAML (or JSON, which is YAML) with the safe loader only.

    Raises:
        UsageError: syntax errors, tags beyond plain data, duplicate keys; each with its position.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise UsageError(f"{name} is empty")
        _refuse_duplicates(root, name)
        return Document(name, loader.construct_document(root), root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = error.problem or error.context or "not valid YAML"
        if "could not determine a constructor" in problem:
            problem = f"{problem.split('constructor for ')[-1]} is not allowed: only plain data is"
        raise UsageError(f"{place}: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name}: not valid YAML ({reason})") from None
    finally:
        loader.dispose()


def explain(error: ValidationError, document: Document, model: type[BaseModel]) -> UsageError:
    """One sentence for the first problem of a pydantic validation, at its place in the document."""
    problems = error.errors(include_url=False)
    first = problems[0]
    location = _existing(document.data, first["loc"])
    kind = first["type"]
    if kind == "extra_forbidden":
        key = str(location[-1])
        text = f"unknown key '{key}'{did_you_mean(key, fields_at(model, location[:-1]))}"
    elif kind == "missing":
        text = f"the key '{first['loc'][-1]}' is missing"
    else:
        text = f"{_subject(location)}{_sentence(first['msg'])}"
        if isinstance(first["input"], str | int | float):
            text += f", not {first['input']!r}"
    others = len({_existing(document.data, p["loc"]) for p in problems}) - 1
    more = f" (and {others} more)" if others else ""
    place = document.where(location, key=kind == "extra_forbidden")
    return UsageError(f"{place}: {text}{more}")


def fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields that a model nested at `location` has."""
    current: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):
            continue
        if current is None or part not in current.model_fields:
            return []
        current = _model_in(current.model_fields[part].annotation)
    return [] if current is None else list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a)) is not None), None)


def _existing(data: Any, location: Location) -> Location:
    """The part of a pydantic location that is in the data; the rest are tags of union members."""
    for depth, part in enumerate(location):
        is_key = isinstance(data, Mapping) and part in data
        is_item = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if not (is_key or is_item):
            return location[:depth]
        data = data[part]
    return location


def _subject(location: Location) -> str:
    named = [part for part in location if isinstance(part, str)]
    return f"'{named[-1]}': " if named else ""


def _sentence(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text[:1].lower() + text[1:] if text.startswith("Input") else text


def _find(node: yaml.Node, location: Location, key: bool) -> yaml.Node:
    """The deepest node on the way to `location`."""
    for depth, part in enumerate(location):
        last = depth == len(location) - 1
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if isinstance(name, yaml.ScalarNode) and name.value == str(part):
                    found = name if key and last else value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            found = node.value[part] if part < len(node.value) else None
        if found is None:
            return node
        node = found
    return node


def _refuse_duplicates(root: yaml.Node, name: str) -> None:
    seen: set[int] = set()  # aliases make the tree a graph, possibly a cyclic one
    queue = [root]
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            queue.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            keys: dict[Hashable, yaml.Node] = {}
            for key, value in node.value:
                queue.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in keys:
                    line, column = key.start_mark.line + 1, key.start_mark.column + 1
                    first = keys[key.value].start_mark.line + 1
                    raise UsageError(
                        f"{name}:{line}:{column}: the key '{key.value}' is already given in "
                        f"line {first}; remove one of them"
                    )
                keys[key.value] = key
