"""What lies beside the weights: the plan, versions, hashes and names that loading needs."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewriter.documents import Document, explain
from rewriter.errors import InputError, UsageError
from rewriter.plan import Plan, tool_version

FORMAT = 1
MANIFEST = "rewriter.json"
_CHUNK = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WeightFile(_Strict):
    """Name, size in bytes and sha256 of one weight file."""

    name: str
    bytes: int
    sha256: str


class Versions(_Strict):
    """What wrote the checkpoint."""

    tool: str = Field(default_factory=tool_version)
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    python: str = Field(default_factory=platform.python_version)


class Manifest(_Strict):
    """`rewriter.json`.

    Attributes:
        format: version of this document.
        versions: what wrote it.
        base_architecture: class name of the original model.
        original: name of the checkpoint it came from, for people.
        dtype: dtype the model was built with, such as 'float32'; buffers depend on it.
        attention: attention implementation of the layers that stayed as they were.
        buffer_dtypes: dtypes of floating buffers outside the state dict.
        plan: what was done.
        new_keys: keys the rewrite added.
        aliases: key -> key of the same tensor that is stored.
        weights: the files, in order.
    """

    format: int = FORMAT
    versions: Versions = Field(default_factory=Versions)
    base_architecture: str
    original: str = ""
    dtype: str = "float32"
    attention: str | None = None
    buffer_dtypes: dict[str, str] = Field(default_factory=dict)
    plan: Plan
    new_keys: list[str] = Field(default_factory=list)
    aliases: dict[str, str] = Field(default_factory=dict)
    weights: list[WeightFile] = Field(default_factory=list)

    def to_bytes(self) -> bytes:
        text = json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False)
        return (text + "\n").encode()

    @classmethod
    def read(cls, folder: Path, expected_sha256: str | None) -> Manifest:
        """The manifest of a checkpoint directory.

        Args:
            expected_sha256: hash that config.json gives, or None to skip the comparison.

        Raises:
            InputError: missing, changed, damaged, or written by a newer version.
        """
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{folder} has lost its {MANIFEST}, without which the rewritten layers cannot be "
                "rebuilt; restore it or convert again"
            ) from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            raise InputError(f"{path} is not valid JSON; restore it or convert again") from None
        version = data.get("format") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise InputError(
                f"{folder} was written by a newer version (format {version}, this one reads up to "
                f"{FORMAT}); upgrade attention-rewriter"
            )
        if expected_sha256 is not None and hashlib.sha256(content).hexdigest() != expected_sha256:
            raise InputError(
                f"{path} was changed after it was written (its hash differs from the one in "
                "config.json); restore it, or load with verify_hashes=False if you meant to edit it"
            )
        return cls._parsed(path, data)

    @classmethod
    def _parsed(cls, path: Path, data: Any) -> Manifest:
        try:
            manifest = cls.model_validate(data)
            Plan.from_json(manifest.plan.to_json(), f"{path}, 'plan'")
        except ValidationError as error:
            problem = explain(error, Document(str(path), data), cls)
            raise InputError(f"{problem}; restore it or convert again") from None
        except UsageError as error:
            raise InputError(f"{error}; is the package of that mixer installed?") from None
        return manifest


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_weights(folder: Path, manifest: Manifest, hashes: bool) -> list[Path]:
    """The weight files of the manifest, present and of the right size (and hash).

    Raises:
        InputError: a file is missing, leads elsewhere, or was changed.
    """
    out = []
    for entry in manifest.weights:
        path = folder / entry.name
        if Path(entry.name).name != entry.name:
            raise InputError(f"{folder / MANIFEST} names the file '{entry.name}' elsewhere")
        if not path.is_file():
            raise InputError(f"the weight file {path} is missing; restore it or convert again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise InputError(
                f"{path} has {size} bytes instead of {entry.bytes}; it is truncated or was "
                "changed, restore it"
            )
        if hashes and sha256_of(path) != entry.sha256:
            raise InputError(
                f"{path} was changed after it was written (its sha256 differs from the manifest); "
                "restore it, or load with verify_hashes=False to accept it"
            )
        out.append(path)
    return out
