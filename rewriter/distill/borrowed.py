"""Modules of a student with the parameters of its teacher: the teacher's own functions, re-emitted.

A rewrite proved that the module it emits, with the exact core, is the original. So a copy of the
student's module that reads the teacher's parameters tells what the original's mixer is given, and
with an exact core on generated kernels it is the original, computed faster.
"""

from __future__ import annotations

import torch
from torch import nn

from rewriter.distill.copies import private_copy
from rewriter.distill.data import Rows
from rewriter.distill.originals import Originals, hidden_states
from rewriter.errors import RewriterError, UsageError
from rewriter.mixers.base import Mixer
from rewriter.mixers.exact.fused import Fused, FusedOptions
from rewriter.mixers.exact.keep import Keep
from rewriter.mixers.placed import mixers_of, place

NEAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_TOKENS = 256  # of the comparison


def borrowed(given: nn.Module, teacher: nn.Module, path: str) -> nn.Module:
    """The student's module at a path, with the teacher's parameters; its mixers keep their own.

    Args:
        given: the student without low-rank updates.
        teacher: whose parameters are read, not copied.

    Raises:
        UsageError: it has a parameter that the teacher has not.
    """
    source = teacher.get_submodule(path)
    theirs = dict(source.named_parameters())
    dtype = next((p.dtype for p in source.parameters()), torch.float32)
    module = private_copy(given.get_submodule(path), dtype, {})
    new = {id(p) for m in module.modules() if isinstance(m, Mixer) for p in m.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in new:
            continue
        found = theirs.get(name)
        if found is None or found.shape != parameter.shape:
            raise UsageError(
                f"'{path}.{name}' is not a parameter of the teacher, so its queries, keys and "
                "values cannot be read there: leave out 'relations' of the stage 'logits'."
            )
        parameter.data = found.detach()
    return module


def fuse(owner: nn.Module, all_of_them: bool) -> bool:
    """Give a module its exact cores on generated kernels, in place of kept ones or of all.

    Returns:
        Whether every mixer in it is exact now.
    """
    for mixer in list(mixers_of(owner).values()):
        if type(mixer) is Keep or (all_of_them and not isinstance(mixer, Fused)):
            options = FusedOptions()
            if Fused.refuse(mixer.site, options) is None:
                place(owner, mixer.site, Fused(mixer.site, options, mixer.layer).eval())
    return all(isinstance(mixer, Keep) for mixer in mixers_of(owner).values())


def quicken(teacher: nn.Module, student: nn.Module, given: nn.Module, rows: Rows) -> None:
    """Put attention on generated kernels: the teacher's, and what of it the student has kept.

    A module of the teacher is exchanged where the new one gives the same on some text, within the
    rounding of the dtype. CPU only.

    Args:
        teacher, student: private copies, changed in place.
        given: the student without low-rank updates.
        rows: of the text that is trained on.
    """
    if rows.ids.device.type != "cpu":
        return
    found: dict[str, nn.Module] = {}
    for path, module in list(student.named_modules()):
        if not path or not mixers_of(module):
            continue
        if any(mixer.site.runs > 1 or mixer.site.cross for mixer in mixers_of(module).values()):
            continue
        fuse(module, all_of_them=False)
        try:
            new = borrowed(given, teacher, path)
        except (UsageError, AttributeError):
            continue
        if fuse(new, all_of_them=True):
            found[path] = new
    for path in _same(teacher, found, rows):
        parent, _, name = path.rpartition(".")
        setattr(teacher.get_submodule(parent), name, found[path])


def _same(teacher: nn.Module, found: dict[str, nn.Module], rows: Rows) -> list[str]:
    """Paths at which the new modules give what the old ones do."""
    few = Rows(rows.ids[:1, :_TOKENS], None if rows.mask is None else rows.mask[:1, :_TOKENS])
    same: dict[str, bool] = {}

    def look(path: str, args: object, kwargs: dict[str, object], output: torch.Tensor) -> None:
        assert isinstance(args, tuple)
        new = hidden_states(found[path](*args, **kwargs)).float()
        gap = (new - output.float()).norm() / output.float().norm().clamp_min(1e-30)
        near = float(gap) <= NEAR.get(output.dtype, 0.0)
        same[path] = same.get(path, True) and near

    if not found:
        return []
    try:
        Originals(teacher, found).visit(few, look)
    except (RewriterError, RuntimeError, TypeError, ValueError):
        return []
    return [path for path, near in same.items() if near]
