"""What every benchmark prints: a table, whose caption describes the machine."""

from __future__ import annotations

import json as json_module
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nxtp.inference.pretrained import usable_device
from nxtp.runs.record import cpu_name


def show(measure: Callable[..., dict[str, Any]], table: Callable[[dict[str, Any]], Any], *, json: bool, **options: Any):
    """Measure and print the table; with ``json`` print the result as one JSON object on the last line.

    Raises:
        UserError: of ``measure``, or there is no such device.
    """
    if "device" in options:
        options["device"] = usable_device(options["device"]).type
    with Console(stderr=True).status("measuring …"):
        result = measure(**options)
    Console().print(table(result))
    if json:
        print(json_module.dumps(result), flush=True)


def machine_description(device: str = "cpu") -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return gpu | {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def machine_line(machine: dict[str, Any]) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{device}, torch {machine['torch']}, {machine['date']}"


def caption(result: dict[str, Any], text: str) -> str:
    """``text``, then the model's size, the precision, the largest difference of the compared results, the machine."""
    return (
        f"{text}. {result['parameters'] / 1e6:,.0f} M parameters, {result['precision']}; results equal to "
        f"{result['difference']:.0e} relative{'' if result['precision'] == '32-true' else ' in float32'}. "
        f"{machine_line(result['machine'])}"
    )


def memory_caption(machine: dict[str, Any]) -> str:
    return "memory is " + ("allocated on the GPU" if "gpu" in machine else "the largest resident set of a process")


def build_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Table:
    """The first column is left-aligned, the others hold numbers."""
    table = Table(title=title, caption=caption, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    return table


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over the rounds of the ratio of two times of the same round."""
    return median(n / d for n, d in zip(numerators, denominators, strict=True))
