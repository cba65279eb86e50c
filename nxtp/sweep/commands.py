"""`nxtp sweep status STUDY`: the runs of a sweep, their state, progress and best metric."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import click
from omegaconf import DictConfig, OmegaConf

from nxtp.errors import UserError, nearest
from nxtp.runs.lock import read_holder
from nxtp.runs.record import FILE, is_alive, read_record
from nxtp.sweep.sweep import Sweep

STYLES = {"finished": "green", "running": "cyan", "failed": "bold red", "killed": "red", "interrupted": "yellow"}


@dataclass
class RunState:
    """``state`` is the record's, or killed, unreadable or planned; ``done`` a fraction of all steps."""

    name: str
    state: str
    done: float | None = None
    monitor: str | None = None
    metric: float | None = None
    wall_time_s: float | None = None
    error: str | None = None


def run_state(directory: Path) -> RunState:
    record = read_record(directory)
    if record is None:
        if (directory / FILE).exists():
            return RunState(directory.name, "unreadable")
        if (holder := read_holder(directory)) is None:
            return RunState(directory.name, "planned")
        if is_alive(holder):
            return RunState(directory.name, "running")
        return RunState(directory.name, "failed", error="ended before its first record")
    is_killed = record["status"] == "running" and not is_alive(record)
    steps, monitor = record.get("steps"), record.get("monitor")
    return RunState(
        name=directory.name,
        state="killed" if is_killed else record["status"],
        done=record.get("step", 0) / steps if steps else None,
        monitor=monitor,
        metric=record.get("metrics", {}).get(monitor),
        wall_time_s=record.get("wall_time_s"),
        error=record.get("error"),
    )


def states(directory: Path) -> list[RunState]:
    """Of all runs in a sweep's directory, and of those that its last command planned.

    Raises:
        UserError: the directory contains no sweep.
    """
    multirun = directory / "multirun.yaml"
    planned = Sweep.of(DictConfig(OmegaConf.load(multirun))).runs if multirun.is_file() else []
    names = dict.fromkeys([*planned, *sorted(file.parent.name for file in directory.glob(f"*/{FILE}"))])
    if not names:
        near = nearest(directory.name, (d.name for d in directory.parent.glob("*") if d.is_dir()))
        raise UserError(f"No sweep in '{directory}'.{near} A sweep named NAME is in runs/NAME.")
    return [run_state(directory / name) for name in names]


def print_states(runs: list[RunState]) -> None:
    """A table, the best value of each metric in bold; below it the errors, whose lines are long."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=", ".join(f"{n} {state}" for state, n in Counter(r.state for r in runs).items()))
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    best: dict[str | None, float] = {}
    for run in runs:
        if run.metric is not None:
            best[run.monitor] = max(run.metric, best.get(run.monitor, run.metric))
    for title in ("done", "time", *(map(str, best) if len(best) == 1 else ["metric"])):
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        value = "" if run.metric is None else f"{run.metric:.4f}"
        table.add_row(
            Text(run.name),
            Text(run.state, STYLES.get(run.state, "dim")),
            "" if run.done is None else f"{run.done:.0%}",
            "" if run.wall_time_s is None else str(timedelta(seconds=round(run.wall_time_s))),
            Text(
                f"{run.monitor} {value}" if value and len(best) > 1 else value,
                "bold" if value and run.metric == best[run.monitor] else "",
            ),
        )
    console = Console()
    console.print(table)
    for run in runs:
        if run.error:
            console.print(Text.assemble(f"{run.name}: ", (run.error, "dim")), soft_wrap=True)


@click.group()
def sweep() -> None:
    """Show the state of a sweep. Start one with nxtp train -m … or nxtp train study=…"""


@sweep.command(short_help="Show the runs of a sweep: state, progress, best metric.")
@click.argument("study")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Directory of runs."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def status(study: str, runs: Path, as_json: bool) -> None:
    """Show the runs of STUDY (a sweep's name, or the directory of its runs): state, progress, best metric.

    Exit code 1 if a run has failed or was killed.
    """
    found = states(Path(study) if Path(study, "multirun.yaml").is_file() else runs / study)
    if as_json:
        click.echo(json.dumps({"runs": [asdict(run) for run in found]}))
    else:
        print_states(found)
    sys.exit(any(run.state in ("failed", "killed", "unreadable") for run in found))
