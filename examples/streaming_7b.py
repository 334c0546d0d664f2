"""A checkpoint larger than the memory it may use: 7B parameters converted within 8 GB.

    python examples/streaming_7b.py --work /tmp/streaming_7b --policy hybrid

Makes a Llama checkpoint of 6.7 billion random weights (bfloat16, 13.5 GB, one file for every two
layers), converts it by `rewriter convert` in a process of its own, and prints what that process had
in memory at most. Linux counts as resident (VmHWM, ru_maxrss) every page that is mapped into the
process: what it allocated and also what it read of mapped files, though the system could take that
back at any time. The peak of allocated memory alone is printed beside it. The result is then opened
again and some layers are compared with the source. Needs 28 GB of disk; the work folder is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

LAYERS_A_SHARD = 2
LIMIT = 8 * 10**9


def config(layers: int, hidden: int) -> LlamaConfig:
    """Llama 2 7B's sizes by default, with fewer layers or a smaller width for a quick look."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def make(folder: Path, made: LlamaConfig) -> int:
    """Write the checkpoint one shard at a time; returns its bytes."""
    folder.mkdir(parents=True)
    wide, inner, vocabulary = made.hidden_size, made.intermediate_size, made.vocab_size
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        return drawn.mul_(columns**-0.5).bfloat16()

    def layer(number: int) -> dict[str, torch.Tensor]:
        shapes = {f"self_attn.{x}_proj": (wide, wide) for x in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide)}
        shapes |= {"mlp.down_proj": (wide, inner)}
        prefix = f"model.layers.{number}."
        out = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{prefix}{norm}.weight"] = torch.ones(wide).bfloat16()
        return out

    starts = range(0, made.num_hidden_layers, LAYERS_A_SHARD)
    count, total = len(starts) + 1, 0
    places: dict[str, str] = {}
    for number, start in enumerate([*starts, None], start=1):
        if start is None:
            part = {"model.embed_tokens.weight": matrix(vocabulary, wide)}
            part["model.norm.weight"] = torch.ones(wide).bfloat16()
            part["lm_head.weight"] = matrix(vocabulary, wide)
        else:
            stop = min(start + LAYERS_A_SHARD, made.num_hidden_layers)
            part = {k: v for n in range(start, stop) for k, v in layer(n).items()}
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
        total += sum(t.numel() * t.element_size() for t in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made.save_pretrained(folder)
    return total


def convert(source: Path, target: Path, policy: str, memory: str) -> dict[str, float]:
    """Run `rewriter convert` and say what its process used.

    Peak resident memory is the kernel's own figure (ru_maxrss of the process, which is VmHWM). What
    it allocated (RssAnon) is sampled ten times a second while it runs.
    """
    command = [sys.executable, "-m", "rewriter", "convert", str(source), "--out", str(target)]
    command += ["--policy", policy, "--memory", memory]
    began = time.perf_counter()
    child = subprocess.Popen(command)
    status = Path(f"/proc/{child.pid}/status")
    allocated = 0
    while True:
        found, code, usage = os.wait4(child.pid, os.WNOHANG)
        if found:
            break
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        allocated = max(allocated, int(fields.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.1)
    child.returncode = os.waitstatus_to_exitcode(code)
    if child.returncode:
        sys.exit(child.returncode)
    return {
        "minutes": (time.perf_counter() - began) / 60,
        "processor minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "peak resident": usage.ru_maxrss * 1024,
        "peak allocated": allocated,
    }


def compare(source: Path, target: Path) -> tuple[int, int]:
    """How many tensors of the source the result holds bit for bit, and how many new ones."""
    places = {}
    for file in sorted(target.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    same = 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                with safe_open(places[name], framework="pt") as other:
                    same += torch.equal(opened.get_tensor(name), other.get_tensor(name))
    return same, sum(".core." in name for name in places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/streaming_7b"))
    parser.add_argument("--policy", default="hybrid")
    parser.add_argument("--memory", default="8 GB")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="width, a multiple of 256")
    parser.add_argument("--keep", action="store_true", help="leave the work folder there")
    options = parser.parse_args()
    console = Console()
    source, target = options.work / "model", options.work / "converted"
    try:
        size = make(source, config(options.layers, options.hidden))
        files = len(list(source.glob("*.safetensors")))
        console.print(f"made {size / 1e9:.1f} GB in {files} files")
        used = convert(source, target, options.policy, options.memory)
        same, new = compare(source, target)
        console.print(
            f"converted in {used['minutes']:.1f} minutes ({used['processor minutes']:.1f} of "
            f"processor time); peak resident memory {used['peak resident'] / 1e9:.2f} GB, mapped "
            f"files counted, of it allocated {used['peak allocated'] / 1e9:.2f} GB"
        )
        console.print(f"{same} tensors equal the source's bit for bit, {new} are new")
        within = used["peak resident"] <= LIMIT
        console.print(f"within {LIMIT / 1e9:.0f} GB: {'yes' if within else 'NO'}")
    finally:
        if not options.keep:
            shutil.rmtree(options.work, ignore_errors=True)
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
