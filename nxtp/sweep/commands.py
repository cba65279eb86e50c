"""`nxtp sweep status STUDY`: the runs of a sweep, their state, progress and best metric."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nxtp.errors import UserError, nearest
from nxtp.runs.record import FILE, is_alive, read_record
from nxtp.sweep.sweep import Sweep

STYLES = {"finished": "green", "running": "cyan", "failed": "bold red", "killed": "red", "interrupted": "yellow"}


@dataclass
class RunState:
    """One run: ``state`` is that of its record, or killed, or planned; ``done`` a share; ``metric`` of ``monitor``."""

    name: str
    state: str
    done: float | None = None
    monitor: str | None = None
    metric: float | None = None
    wall_time_s: float | None = None
    error: str | None = None


def states(directory: Path) -> list[RunState]:
    """Of all runs in a sweep's directory, and of those that its last command planned.

    Raises:
        UserError: no sweep has run there.
    """
    found = {p.parent.name: read_record(p.parent) for p in sorted(directory.glob(f"*/{FILE}"))}
    planned: list[str] = []
    multirun = directory / "multirun.yaml"
    if multirun.is_file():
        planned = Sweep.of(OmegaConf.load(multirun)).runs
    if not found and not planned:
        near = nearest(directory.name, (d.name for d in directory.parent.glob("*") if d.is_dir()))
        raise UserError(f"No sweep in '{directory}'.{near} A sweep named NAME lies in runs/NAME.")
    names = dict.fromkeys([*planned, *found])
    return [_state(name, found.get(name), (directory / name / FILE).exists()) for name in names]


def _state(name: str, record: dict[str, Any] | None, is_there: bool) -> RunState:
    if record is None:
        return RunState(name, "unreadable" if is_there else "planned")
    state = record["status"]
    if state == "running" and not is_alive(record):
        state = "killed"
    steps, monitor = record.get("steps") or 0, record.get("monitor")
    return RunState(
        name,
        state,
        record.get("step", 0) / steps if steps else None,
        monitor,
        record.get("metrics", {}).get(monitor),
        record.get("wall_time_s"),
        record.get("error"),
    )


def print_states(runs: list[RunState], console: Console) -> None:
    table = Table(title=", ".join(f"{n} {state}" for state, n in Counter(r.state for r in runs).items()))
    monitor = next((r.monitor for r in runs if r.monitor), "metric")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for title in ("done", "time", monitor):
        table.add_column(title, justify="right", no_wrap=True)
    known = [r.metric for r in runs if r.metric is not None]
    for run in runs:
        name = Text(run.name)
        if run.error:
            name.append(f"\n{run.error}", "dim")
        metric = "" if run.metric is None else f"{run.metric:.4f}"
        best = run.metric is not None and run.metric == max(known)
        table.add_row(
            name,
            Text(run.state, STYLES.get(run.state, "dim")),
            "" if run.done is None else f"{run.done:.0%}",
            "" if run.wall_time_s is None else duration(run.wall_time_s),
            Text(metric, "bold" if best else ""),
        )
    console.print(table)


def duration(seconds: float) -> str:
    """
    >>> duration(75), duration(7300)
    ('1:15', '2:01:40')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Sweeps(click.Group):
    """`search` is imported when it is called: it needs Optuna."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["search", "status"]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "search":
            return importlib.import_module("nxtp.sweep.search.command").search
        return super().get_command(ctx, name)


@click.group(cls=Sweeps)
def sweep() -> None:
    """See how a sweep stands. One is started by nxtp train -m … or nxtp train study=…"""


@sweep.command()
@click.argument("study")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where runs lie."
)
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of runs.")
def status(study: str, runs: Path, as_json: bool) -> None:
    """The runs of STUDY (a sweep's name, or the directory of its runs): state, progress, best metric.

    Exit code 1 if a run has failed or was killed.
    """
    directory = Path(study) if Path(study, "multirun.yaml").is_file() else runs / study
    found = states(directory)
    if as_json:
        click.echo(json.dumps([asdict(run) for run in found], indent=1))
    else:
        print_states(found, Console())
    sys.exit(any(run.state in ("failed", "killed", "unreadable") for run in found))
