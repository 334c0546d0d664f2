"""Writes fla.safetensors: inputs, outputs and gradients of fla-core's naive recurrences.

    pip download --no-deps fla-core==0.6.0, unpack it, then: python make.py FOLDER_OF_FLA

The package is no dependency: where it is installed, transformers dispatches its own torch
fallbacks to it, which then need a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

SHAPES = ((2, 2, 9, 8), (1, 3, 21, 16), (2, 1, 33, 8))  # batch, heads, tokens, width
STREAM, RANK = 12, 4


def load(folder: Path, path: str):
    sys.modules.setdefault("einops", types.SimpleNamespace(rearrange=None))  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location("naive", folder / "ops" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: Path) -> None:
    gla = load(folder, "gla/naive.py").naive_recurrent_gla
    retention = load(folder, "retention/naive.py").naive_retention
    dplr = load(folder, "generalized_delta_rule/dplr/naive.py").dplr_recurrence
    out: dict[str, torch.Tensor] = {}
    for number, (B, H, N, D) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)

        def normal(*shape: int, g: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=g)

        given = {
            "q": normal(B, H, N, D),
            "k": normal(B, H, N, D),
            "v": normal(B, H, N, D),
            "hidden": normal(B, N, STREAM),
            "down": normal(RANK, STREAM),
            "up": normal(H * D, RANK),
            "start": normal(H * D),
            "rate": torch.rand(B, H, N, D, generator=generator),
            "weight": normal(B, H, N, D),
        }
        q, k, v = (given[n].requires_grad_() for n in "qkv")
        gate = given["hidden"] @ given["down"].T @ given["up"].T + given["start"]
        decay = (F.logsigmoid(gate) / 16).view(B, N, H, D)
        unit = F.normalize(k, dim=-1)
        slow = -0.6 * given["rate"]
        results = {
            "gla": gla(*(t.transpose(1, 2) for t in (q, k, v)), decay)[0].transpose(1, 2),
            "retention": retention(q, k, v),
            "dplr": dplr(q, k, v, -unit, unit * given["rate"], slow)[0],
        }
        for name, result in results.items():
            grads = torch.autograd.grad((result * given["weight"]).sum(), (q, k, v))
            out[f"{number}.{name}"] = result
            out |= {f"{number}.{name}.d{n}": g for n, g in zip("qkv", grads, strict=True)}
        out |= {f"{number}.{name}": t for name, t in given.items()}
    tensors = {name: t.detach().contiguous() for name, t in out.items()}
    save_file(tensors, Path(__file__).with_name("fla.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
