"""`rewriter bench`: the kernels beside what a person would use instead, on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.session import Json, Traceback, session
from rewriter.errors import UsageError

if TYPE_CHECKING:
    from rewriter.bench.run import Options


def bench(
    only: Annotated[
        str, typer.Option(help="Kernels to time, separated by commas; default all.")
    ] = "",
    lengths: Annotated[
        str, typer.Option(help="Tokens, separated by commas; the context of a step.")
    ] = "512,1024,2048,4096",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    train: Annotated[bool, typer.Option("--train", help="Time forward and backward.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads to use.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time spent on each point.")] = 2.0,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for a busy machine and one thread.")
    ] = "wall",
    compiled: Annotated[
        bool, typer.Option(help="Also time what torch.compile makes of the stock forms.")
    ] = True,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of time over length here (.svg, .png).")
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Time each kernel against the stock ways to do the same.

    All contenders of a point run in turn in one process; the figures are medians. A ratio above 1
    means that ours is faster than the best stock way.
    """
    with session(as_json, None) as output:
        from rewriter.atomic import write_file
        from rewriter.bench.plot import draw
        from rewriter.bench.run import Options, run
        from rewriter.cli.show_bench import bench_view, point_line

        options = Options(
            only=tuple(name.strip() for name in only.split(",") if name.strip()),
            lengths=_lengths(lengths),
            dtype=_one_of("dtype", dtype, ("float32", "bfloat16")),
            train=train,
            threads=threads,
            seconds=seconds,
            clock="cpu" if _one_of("clock", clock, ("wall", "cpu")) == "cpu" else "wall",
            compiled=compiled,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
        )
        _check(options)
        table = run(options, lambda point: output.note(point_line(point)))
        output.show(*bench_view(table))
        if out is not None:
            write_file(out, table.to_json().encode())
        if plot is not None:
            draw(table, plot)
        output.result(json.loads(table.to_json()))


def _check(options: Options) -> None:
    if options.heads % options.kv_heads:
        raise UsageError(
            f"{options.heads} query heads cannot share {options.kv_heads} key/value heads evenly; "
            "choose --kv-heads that divides --heads"
        )
    if options.clock == "cpu" and options.threads > 1:
        raise UsageError("--clock cpu adds the time of all threads up; use it with --threads 1")


def _lengths(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise UsageError(f"--lengths takes positive numbers separated by commas, not '{text}'")
    return values


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UsageError(f"--{option} is one of {', '.join(allowed)}, not '{value}'")
    return value
