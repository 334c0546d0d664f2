"""Private copies to train on, and the way back into the student the caller holds.

The caller's student shares its untouched parameters, and often whole modules, with the teacher.
Training therefore happens on copies in the compute dtype; at the end only what was trained is
written back, and a parameter that is shared with the teacher is replaced in the student, never
changed in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rewriter.errors import UsageError
from rewriter.mixers.base import Mixer
from rewriter.mixers.channel.base import Projection
from rewriter.mixers.placed import mixers_of


def rewritten_owners(student: nn.Module) -> dict[str, dict[str, Mixer]]:
    """Modules with mixers that are not exact, in module order: path -> mixers by path in it."""
    owners: dict[str, dict[str, Mixer]] = {}
    for path, module in student.named_modules():
        cores = {n: m for n, m in mixers_of(module).items() if m.info.tier != "exact"}
        if cores:
            owners[path] = cores
    return owners


def rewritten_cores(student: nn.Module) -> dict[str, Mixer]:
    """The mixers that are not exact by their full path, in module order."""
    return {
        f"{path}.{name}" if path else name: core
        for path, cores in rewritten_owners(student).items()
        for name, core in cores.items()
    }


def learning_owners(student: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Modules that learn to imitate their original: path -> what learns in them, by full path.

    Owners of mixers, and the modules whose projections became structures.
    """
    owners: dict[str, dict[str, nn.Module]] = {}
    for path, module in student.named_modules():
        inside = {
            f"{name}.core": child.core
            for name, child in module.named_children()
            if isinstance(child, Projection)
        }
        cores = {n: m for n, m in mixers_of(module).items() if m.info.tier != "exact"}
        if cores or inside:
            prefix = f"{path}." if path else ""
            owners[path] = {prefix + name: core for name, core in {**cores, **inside}.items()}
    return owners


def learning_names(student: nn.Module) -> dict[str, list[str]]:
    """Names of the new parameters by the module that learns, those with none left out."""
    found = {
        path: [f"{at}.{n}" for at, core in cores.items() for n, _ in core.named_parameters()]
        for path, cores in learning_owners(student).items()
    }
    return {path: names for path, names in found.items() if names}


def core_names(student: nn.Module) -> list[str]:
    """Names of the new parameters, in module order."""
    return list(core_rates(student))


def core_rates(student: nn.Module) -> dict[str, float]:
    """Learning rate of every new parameter over the stage's, by its name in the student.

    1 unless a module inside the mixer says otherwise in `rates`, by the names of its parameters.
    """
    rates = {}
    for path, core in _learning(student):
        for inner, module in core.named_modules(prefix=path):
            given: Mapping[str, float] = getattr(module, "rates", {})
            for name, _ in module.named_parameters(inner, recurse=False):
                rates[name] = given.get(name.rpartition(".")[2], 1.0)
    return rates


def _learning(student: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for cores in learning_owners(student).values():
        yield from cores.items()


def private_copy(
    module: nn.Module,
    dtype: torch.dtype,
    tensors: dict[int, torch.Tensor],
    master: Iterable[str] = (),
    own: Iterable[str] = (),
) -> nn.Module:
    """A frozen copy of `module` that computes in `dtype`.

    Args:
        dtype: of the copied floating parameters; one that has it already shares its storage.
            Buffers are shared as they are: rotary frequencies lose too much in bfloat16.
        tensors: copies by id of the original, so that the copies of a teacher and of a student
            share the parameters that the originals share. It is extended.
        master: names of parameters that are copied to float32 instead and stay private.
        own: names of parameters that are copied to `dtype` and stay private.

    Returns:
        The copy, in evaluation mode, with no parameter that requires a gradient.
    """
    _copy_parameters(module, dtype, tensors, set(master), set(own))
    out = copy.deepcopy(module, dict[int, object](tensors))
    config = getattr(out, "config", None)
    if config is not None and hasattr(config, "use_cache"):
        config.use_cache = False
    return out.eval()


def private_owners(
    student: nn.Module,
    paths: Iterable[str],
    dtype: torch.dtype,
    tensors: dict[int, torch.Tensor],
    master: Iterable[str],
) -> nn.Module:
    """Frozen copies of some modules of a student alone, at their paths in an otherwise empty model.

    They are copied one after another, since what a deep copy remembers takes memory; configs and
    the descriptions of sites, which nobody changes, are shared.

    Args:
        paths: of the modules; one inside another is copied with it.
        dtype, tensors: as in `private_copy`.
        master: names of parameters in the student that are copied to float32 instead.
    """
    root, names, owners = nn.Module(), tuple(master), dict[str, nn.Module]()
    for path in paths:
        if any(not outer or path.startswith(f"{outer}.") for outer in owners):
            continue
        prefix = f"{path}." if path else ""
        inside = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
        owners[path] = student.get_submodule(path)
        _copy_parameters(owners[path], dtype, tensors, inside, set())
    for path, owner in owners.items():
        memo = dict[int, object](tensors)
        for module in owner.modules():
            for key in ("config", "site", "options"):
                if key in module.__dict__:
                    memo[id(module.__dict__[key])] = module.__dict__[key]
        _place(root, path, copy.deepcopy(owner, memo))
    return (root if "" not in owners else root.get_submodule("root")).eval()


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    for name in path.split(".")[:-1]:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(path.rpartition(".")[2] or "root", module)


def _copy_parameters(
    module: nn.Module,
    dtype: torch.dtype,
    tensors: dict[int, torch.Tensor],
    masters: set[str],
    owned: set[str],
) -> None:
    """Extend `tensors` by the copies of a module's parameters, and its buffers as they are."""
    for name, parameter in module.named_parameters():
        if name in masters:
            data = parameter.detach().to(torch.float32, copy=True)
        elif id(parameter) in tensors and name not in owned:
            continue
        elif parameter.is_floating_point():
            data = parameter.detach().to(dtype, copy=name in owned)
        else:
            data = parameter.detach()
        tensors[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for buffer in module.buffers():
        tensors.setdefault(id(buffer), buffer)


def computes_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether every floating parameter has this dtype, so that no copy is needed to compute."""
    return all(p.dtype == dtype for p in model.parameters() if p.is_floating_point())


def hash_values(hasher: Any, model: nn.Module) -> None:
    """Feed a hash with names, shapes and the first values of all parameters."""
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:256].double().cpu().numpy()
        hasher.update(f"{name} {tuple(parameter.shape)}".encode())
        hasher.update(head.tobytes())


def unshare_modules(student: nn.Module, teacher: nn.Module) -> None:
    """Replace modules that student and teacher both hold by clones with the same parameters.

    After this a parameter can be assigned in the student without the teacher seeing it.
    """
    shared = {id(module) for module in teacher.modules()}
    clones: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            if id(child) in shared:
                module._modules[name] = child = _clone(child, clones)
            visit(child)

    if id(student) in shared:
        raise UsageError("The student is the teacher itself: rewrite the model before distilling.")
    visit(student)


def _clone(module: nn.Module, clones: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in clones:
        twin = copy.copy(module)
        twin.__dict__ = dict(module.__dict__)
        for field in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[field] = dict(module.__dict__[field])
        clones[id(module)] = twin
    return clones[id(module)]


def write_core(student: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
    """Copy trained new parameters into the student, in the student's dtypes."""
    with torch.no_grad():
        for name, value in trained.items():
            student.get_parameter(name).copy_(value)


def replacer(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """An update of `write_body` that sets a value."""
    return lambda old: value


def write_body(
    student: nn.Module, teacher: nn.Module, update: Mapping[str, Callable[[torch.Tensor], object]]
) -> None:
    """Give the student its own values of parameters it shares with the teacher.

    Args:
        update: parameter name -> function from the old float32 value to the new one. A parameter
            that is tied to others in the student stays tied.
    """
    unshare_modules(student, teacher)
    fresh: dict[int, nn.Parameter] = {}
    for name, compute in update.items():
        old = student.get_parameter(name)
        new = torch.as_tensor(compute(old.detach().float()))
        fresh[id(old)] = nn.Parameter(
            new.detach().to(device=old.device, dtype=old.dtype, copy=True), old.requires_grad
        )
    for module in student.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in fresh:
                module._parameters[key] = fresh[id(parameter)]
