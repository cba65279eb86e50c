"""Curves of runs in one picture, from the csv/ that every run writes, whatever its logger."""

from __future__ import annotations

import csv
from pathlib import Path

import click
import matplotlib
from matplotlib.figure import Figure

from nxtp.errors import UserError, nearest
from nxtp.prepare.options import Script
from nxtp.sweep.report.plot import PALETTE, STYLE


def rows_of(run: Path) -> list[dict[str, str]]:
    """What a run logged, in order; a resumed run has a file for each start.

    Raises:
        UserError: it logged nothing.
    """
    files = sorted(run.glob("csv/*/metrics.csv"), key=lambda file: int(file.parent.name.removeprefix("version_")))
    if not files:
        raise UserError(f"'{run}' has no csv/*/metrics.csv: it is no run directory, or nothing was logged yet.")
    return [row for file in files for row in csv.DictReader(file.read_text().splitlines())]


@click.command(cls=Script)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--metrics", default="train/loss,perf/images_per_s", show_default=True, help="A panel each.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="curves.svg", show_default=True)
def curves(runs: tuple[Path, ...], metrics: str, out: Path) -> None:
    """Draw the curves of RUNS (directories of runs/), a panel for each metric and a line for each run.

    python docs/curves.py runs/depth/* --out curves.svg
    """
    logged = {run.name: rows_of(run) for run in runs if not run.is_file()}  # multirun.yaml, in runs/depth/*
    known = {metric for rows in logged.values() for row in rows for metric in row}
    names = metrics.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--metrics: no run logged '{name}'.{nearest(name, known)}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for number, (run, rows) in enumerate(logged.items()):
                points = {int(row["step"]): float(row[name]) for row in rows if row.get(name)}
                colour = PALETTE[number % len(PALETTE)]
                axes.plot(list(points), list(points.values()), marker=".", color=colour, label=run)
            axes.set(title=name, xlabel="step")
            axes.grid(alpha=0.3)
        if len(runs) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    click.echo(f"Picture: {out}")


if __name__ == "__main__":
    curves()
