"""Compile the kernels of a call for a GPU that is not there, and read what they need.

A call is planned on meta tensors; its launches are compiled instead of run. A successful compile
proves little: shared memory beyond the device's limit, spills and kernels reduced to a trap all
compile. So the resources are read back from the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.triton.launch import Launch, Runner
from rewriter.backends.triton.targets import Target

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}
_AMD_OPERATIONS = ("s_", "v_", "ds_", "global_", "buffer_", "flat_", "scratch_")
# "  /*0040*/   @!P0 LDG.E R2, ..." gives LDG.E.
_OPERATION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        registers: of a thread (AMD: VGPRs, accumulation registers included).
        spills: instructions that store or load spilled registers (AMD: spilled VGPRs).
        shared: bytes of shared memory of a program.
        matrix: matrix instructions in the code.
        instructions: all instructions.
        warps, stages: compile options.
    """

    registers: int
    spills: int
    shared: int
    matrix: int
    instructions: int
    warps: int
    stages: int

    def problem(self, target: Target, needs_matrix: bool) -> str | None:
        """Why the kernel must not be shipped for a target, or None."""
        if self.shared > target.shared:
            return f"{self.shared} bytes of shared memory, {target.name} has {target.shared}"
        if self.spills:
            return f"it spills {self.spills}"
        if needs_matrix and not self.matrix:
            return "it has no matrix instruction"
        if self.instructions < 32:
            return f"its body has only {self.instructions} instructions"
        return None


def planned(call: Callable[[Runner], Any]) -> list[Launch]:
    """The launches of a call, none of which is run."""
    launches: list[Launch] = []
    call(launches.append)
    return launches


def compiled(launch: Launch, target: Target) -> Resources:
    """Compile a launch for a target.

    Raises:
        triton.CompilationError: the kernel is not valid Triton.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    names = launch.kernel.arg_names
    signature, attributes = {}, {}
    constants: dict[Any, Any] = dict(launch.constants)
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.args[name]
        signature[name] = _type(value)
        if isinstance(value, int) and value == 1:  # as at run time, 1 is a constant
            signature[name], constants[name] = "constexpr", 1
        elif isinstance(value, Tensor) or (isinstance(value, int) and value and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,
    }
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    kernel = build(source, target=gpu, options=options)
    return _amd(kernel, launch) if target.backend == "hip" else _nvidia(kernel, launch, target)


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _amd(kernel: Any, launch: Launch) -> Resources:
    text = kernel.asm["amdgcn"]
    lines = (line.split() for line in text.splitlines())
    body = [words[0] for words in lines if words and words[0].startswith(_AMD_OPERATIONS)]
    return Resources(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", text),
        shared=kernel.metadata.shared,
        matrix=sum("mfma" in op for op in body),
        instructions=len(body),
        warps=launch.warps,
        stages=launch.stages,
    )


def _nvidia(kernel: Any, launch: Launch, target: Target) -> Resources:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = _output(str(knobs.nvidia.cuobjdump.path), "-res-usage", str(binary))
        code = _output(str(knobs.nvidia.nvdisasm.path), "-c", str(binary))
    body = _OPERATION.findall(code)
    return Resources(
        registers=_number(r"REG:(\d+)", usage),
        spills=sum(op.startswith(("STL", "LDL")) for op in body),
        shared=kernel.metadata.shared,
        matrix=sum(op.startswith(target.matrix) for op in body),
        instructions=len(body),
        warps=launch.warps,
        stages=launch.stages,
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
