"""A plan as a table, and as JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill.files import write_json
from distill.inspect.plan import unit_of
from distill.inspect.plan.spread import KINDS

HEADS = {"averages": "EMA", "masters": "master", "gradients": "grads", "activations": "activ.", "temporary": "buffers"}


WIDTH = 120
_END = re.compile(r"(?: |\x1b\[[0-9;]*m)+$")  # blanks at the end of a line, between codes of style


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the table and the sentences."""
    console = console or Console()
    console.width = max(console.width, WIDTH)
    rows, machine = found["rows"], found["machine"]
    unit, name = unit_of(rows)
    title = f"{found['name']}: {name} per rank, {machine['gpus']} x {machine['memory'] / 1e9:g} GB"
    table = Table(
        title=f"{title}, batch {found['batch']} per rank",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    kinds = [k for k in KINDS if any(r[k] for r in rows)]
    host, most = any(r["host"] for r in rows), "batch" in rows[0]
    table.add_column("strategy", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    for head in (
        *(HEADS.get(k, k) for k in kinds),
        "total",
        *(["host"] if host else []),
        "",
        *(["batch"] if most else []),
    ):
        table.add_column(head, justify="right")
    size = lambda value: f"{value / unit:.1f}" if value >= unit / 20 else f"{value / unit:.2f}" if value else ""
    for row in rows:
        cells = [*(size(row[k]) for k in kinds), size(row["total"]), *([size(row["host"])] if host else [])]
        cells += ["fits" if row["fits"] else "too big", *([str(row["batch"])] if most else [])]
        table.add_row(
            row["strategy"], row["layout"].removesuffix("_base"), *cells, style=None if row["fits"] else "dim"
        )
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.file.write(_END.sub(lambda end: end[0].replace(" ", ""), line) + "\n")
    for line in sentences(found):
        console.print(line, highlight=False, soft_wrap=True)


def sentences(found: dict[str, Any]) -> list[str]:
    """The lines below the table."""
    machine, disk = found["machine"], found["disk"]
    networks = ", ".join(f"{k} {_count(v)}" for k, v in found["parameters"].items() if v)
    rate = f"{machine['utilisation']:.0%} of {machine['flops'] / 1e12:.4g} TFLOP/s"
    texts = [
        f"{found['method']} {found['advice']}",
        f"Parameters: {networks}.",
        f"{_flops(found['flops'])} per rank and step; {found['steps']} steps take {_duration(found['hours'])} at {rate}, "
        "without data, optimizer and communication.",
        f"Disk: {disk['count']} checkpoints of {_bytes(disk['checkpoint'])}: {_bytes(disk['checkpoints'])}"
        + (f"; the data has {_bytes(disk['data'])}." if disk["data"] else "."),
    ]
    return [*texts, *(f"Note: {note}" for note in found["notes"])]


def write(found: dict[str, Any], path: Path) -> None:
    """All of the plan as JSON, in bytes and operations."""
    write_json(path, found, indent=1)


def _scaled(value: float, unit: str) -> str:
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _count(value: int) -> str:
    return _scaled(value, "").replace("G", "B").strip()


def _flops(value: float) -> str:
    return _scaled(value, "FLOP")


def _bytes(value: float) -> str:
    return _scaled(value, "B")


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{60 * hours:.3g} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"
