"""Several processes on one distillation: parameters sharded by FSDP2, each rank its rows.

Started by `torchrun`, with a process group of gloo on CPUs or NCCL on GPUs; without a group
everything here is the identity. The teacher is replicated. What trains is sharded: every new core
by itself, since it is float32, each factor of a low-rank update, and with `train: all` every block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rewriter.distill.copies import rewritten_cores
from rewriter.distill.data import Rows
from rewriter.errors import UsageError


def size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return size() == 1 or dist.get_rank() == 0


def shard(student: nn.Module, trained: Iterable[str]) -> None:
    """Shard the trained parameters of a private copy over all processes, in place.

    Args:
        student: the copy that trains, not yet held by an optimiser.
        trained: names of the parameters that train; the others stay replicated.
    """
    if size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(student.parameters()).device.type
    mesh = init_device_mesh(device, (size(),))
    names = set(trained)
    parameters = dict(student.named_parameters(remove_duplicate=False))
    frozen = {p for name, p in parameters.items() if name not in names}
    frozen -= {parameters[name] for name in names}
    cores = rewritten_cores(student)
    for path, core in cores.items():
        if any(name.startswith(f"{path}.") for name in names):
            fully_shard(core, mesh=mesh)
    for path, module in student.named_modules():
        if ".lora_" in path and next(module.parameters(recurse=False), None) is not None:
            fully_shard(module, mesh=mesh)  # each by itself: a root of several modules is refused
    inside = tuple(f"{path}." for path in cores)
    if all(".lora_" in name or name.startswith(inside) for name in names):
        return
    for parent in list(student.modules()):
        for block in parent if isinstance(parent, nn.ModuleList) else ():
            if any(p not in frozen for p in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=frozen)
    fully_shard(student, mesh=mesh, ignored_params=frozen)


def part(rows: Rows) -> tuple[Rows, float]:
    """This process's rows of a batch, and what its mean loss weighs in the mean over processes.

    Raises:
        UsageError: the rows cannot be dealt out evenly.
    """
    count = size()
    if count == 1:
        return rows, 1.0
    if len(rows) % count:
        raise UsageError(
            f"A batch of {len(rows)} rows cannot be dealt out to {count} processes: "
            "make 'batch' a multiple of their number."
        )
    mine = rows.take(torch.arange(dist.get_rank(), len(rows), count))
    if rows.mask is None or mine.mask is None:
        return mine, 1.0
    return mine, float(mine.mask.sum()) * count / max(1.0, float(rows.mask.sum()))


def mean(values: list[float], device: torch.device) -> list[float]:
    """Means over the processes, equal on all of them."""
    if size() == 1:
        return values
    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    return [float(value) / size() for value in together]


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes, without gradients."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full, which every process has to ask for; one that is not sharded as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor, sharded as `like` is."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, like.placements)  # type: ignore[attr-defined]
