"""How long do commands take to start, beside the imports that they cannot do without?

    make demo
    python experiments/benchmarks/starting.py

Each command and its imports in turn, after one round that does not count; medians. Training is timed until its first
step has been made. The table is in experiments/benchmarks/README.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from statistics import median
from typing import Any

import click
from rich.table import Table

from nxtp.bench.command import as_json, repeats
from nxtp.bench.reporting import build_table, machine_description, machine_line, ratio, show

RUN = "benchmark_starting"
STEP = f"name={RUN} resume=restart trainer.max_steps=1 trainer.log_every_n_steps=1 trainer.limit_val_batches=0"
COMMANDS = {  # → what it must import, and what it prints when it has started
    "--help": ("", ""),
    "train --help": ("", ""),
    "prepare --help": ("", ""),
    "sweep status --help": ("", ""),
    "report decoder_depth --check": ("", ""),
    "data verify data/shards/demo/val": ("", ""),
    "predict data/shards/demo/examples/scene-2.jpg --model runs/demo/model": ("torch, transformers, open_clip", ""),
    f"train experiment=demo {STEP}": ("torch, transformers, open_clip, lightning", "step 1:"),
}


def seconds(arguments: list[str], until: str = "") -> float:
    """Until Python with ``arguments`` ends, or has printed a line with ``until``."""
    start = time.perf_counter()
    command, started = [sys.executable, *arguments], None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout or []:
        if started is None and until and until in line:
            started = time.perf_counter() - start
    if process.wait() != 0:
        raise click.ClickException(f"{' '.join(arguments)} failed with exit code {process.returncode}.")
    return started or time.perf_counter() - start


def measure(*, repeats: int) -> dict[str, Any]:
    """``rows``: the command, ``s`` seconds, and where it has imports ``imports_s`` and ``ratio``; the machine.

    Raises:
        ClickException: a command failed.
    """
    rows = []
    for command, (imports, until) in COMMANDS.items():
        taken, needed = [], []
        for _ in range(repeats + 1):
            needed += [seconds(["-c", f"import {imports}"])] if imports else []
            taken += [seconds(["-m", "nxtp", *command.split()], until)]
        row = {"command": f"nxtp {command.split(' name=')[0].split(' data/shards')[0]}", "s": median(taken[1:])}
        rows.append(row | ({"imports_s": median(needed[1:]), "ratio": ratio(taken[1:], needed[1:])} if imports else {}))
    shutil.rmtree(f"runs/{RUN}", ignore_errors=True)
    return {"rows": rows, "machine": machine_description()}


def table(result: dict[str, Any]) -> Table:
    figures = ("s", "imports_s", "ratio")
    rows = [(row["command"], *(f"{row[key]:.2f}" if key in row else "" for key in figures)) for row in result["rows"]]
    columns = ("", "s", "its imports, s", "ratio")
    return build_table("Starting", columns, rows, machine_line(result["machine"]))


@click.command()
@as_json
@repeats
def starting(**options: Any) -> None:
    """Seconds until commands have started."""
    show(measure, table, **options)


if __name__ == "__main__":
    starting()
