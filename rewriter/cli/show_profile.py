"""A device profile as tables."""

from __future__ import annotations

from rich.console import RenderableType

from rewriter.cli.tables import Column, facts, heading, number, size, table
from rewriter.planner.device import Device


def profile_view(device: Device) -> list[RenderableType]:
    """Rates, then measured products and cores."""
    peaks = ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in device.peak.items())
    rows = [
        ("device", device.name),
        ("source", device.source),
        ("GFLOP/s", peaks),
        ("bandwidth", f"{device.bandwidth / 1e9:.4g} GB/s"),
    ]
    if device.memory:
        rows.append(("memory", size(device.memory)))
    if device.link:
        rows.append(("link to the host", f"{device.link / 1e9:.4g} GB/s"))
    parts: list[RenderableType] = [facts(rows)]
    if device.products:
        parts += [heading("products with weights, GFLOP/s by rows"), _products(device)]
    for phase, title in (("prefill", "cores, ms over all tokens"), ("decode", "cores, ms a token")):
        if any(c.phase == phase for c in device.cores):
            parts += [heading(title), _cores(device, phase)]
    return parts


def _products(device: Device) -> RenderableType:
    counts = sorted({p.rows for p in device.products})
    rates = {
        (p.inputs, p.outputs, p.rows): 2e-9 * p.rows * p.inputs * p.outputs / p.seconds
        for p in device.products
    }
    shapes = dict.fromkeys((p.inputs, p.outputs) for p in device.products)
    columns: list[Column] = ["weight", *((str(n), "right") for n in counts)]
    rows = [
        (f"{k} x {n}", *(number(rates.get((k, n, rows))) for rows in counts)) for k, n in shapes
    ]
    return table(columns, rows)


def _cores(device: Device, phase: str) -> RenderableType:
    found = [c for c in device.cores if c.phase == phase]
    lengths = sorted({c.tokens for c in found})
    times = {(c.mixer, c.heads, c.tokens): 1e3 * c.seconds for c in found}
    series = dict.fromkeys((c.mixer, c.heads) for c in found)
    columns: list[Column] = ["mixer", "heads", *((f"{n:,}", "right") for n in lengths)]
    rows = [
        (mixer, f"{heads[0]}/{heads[1]} x {heads[2]}",
         *(number(times.get((mixer, heads, n))) for n in lengths))
        for mixer, heads in series
    ]  # fmt: skip
    return table(columns, rows)
