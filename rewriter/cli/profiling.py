"""`rewriter profile`: measure this machine once, for predictions and budgets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.checkpoints import open_original
from rewriter.cli.session import Json, Session, Traceback, session
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.planner.device import Device
    from rewriter.planner.profiling import ProfileOptions


def profile(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Measure the shapes of this model instead of usual ones.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Threads to use.")] = 1,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for a busy machine and one thread.")
    ] = "wall",
    mixers: Annotated[
        str, typer.Option(help="Mixers whose cores are timed, separated by commas.")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.0, help="Spent on each group of timings.")] = 0.5,
    device: Annotated[
        str | None, typer.Option(help="Show a device by name, 'here' or a file; measure nothing.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write here instead of the user's cache directory.")
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Measure products, pointwise operations and attention cores, and keep the times.

    Plans under a budget are predicted from them. Takes about a minute; measure again after a change
    of machine, threads or version.
    """
    with session(as_json, None) as output:
        from rewriter.planner.device import Device, profile_path
        from rewriter.planner.profiling import profile as run

        if device is not None:
            found = Device.load(device)
        else:
            options = _options(dtype, threads, clock, mixers, seconds, checkpoint)
            found = run(options, output.note)
            path = out if out is not None else profile_path(dtype=dtype, threads=threads)
            found.save(path)
            output.note(f"written to {path}")
        _show(output, found)
        output.result(json.loads(found.model_dump_json()))


def _options(
    dtype: str, threads: int, clock: str, mixers: str, seconds: float, checkpoint: Path | None
) -> ProfileOptions:
    from rewriter.planner.profiling import ProfileOptions, for_model

    for option, value, allowed in (
        ("dtype", dtype, ("float32", "bfloat16")),
        ("clock", clock, ("wall", "cpu")),
    ):
        if value not in allowed:
            raise UsageError(f"--{option} is one of {', '.join(allowed)}, not '{value}'")
    options = ProfileOptions(
        dtype=dtype, threads=threads, clock="cpu" if clock == "cpu" else "wall", seconds=seconds
    )
    names = tuple(name.strip() for name in mixers.split(",") if name.strip())
    if names:
        options = replace(options, mixers=tuple((name, {}) for name in names))
    if checkpoint is not None:
        from rewriter.api import inspect

        model = open_original(checkpoint).model
        options = for_model(options, model, inspect(model).sites)
    return options


def _show(output: Session, device: Device) -> None:
    from rewriter.cli.show_profile import profile_view

    output.show(*profile_view(device))
