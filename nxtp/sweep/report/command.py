"""`nxtp report STUDY`: the files of a study that are generated, or the table of any directory of runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nxtp.config import NOT_A_SWEEP, study_dirs
from nxtp.errors import UserError, nearest
from nxtp.sweep.report import comparison, tables
from nxtp.sweep.report import records as rec
from nxtp.sweep.report.plot import svg
from nxtp.sweep.report.spec import Plot, Spec

if TYPE_CHECKING:
    from rich.table import Table

START, END = "<!-- table -->", "<!-- /table -->"


def drawn(rows: list[tables.Row], spec: Spec) -> dict[str, str]:
    """results.csv, and plot.svg where there is something to draw."""
    content = tables.as_csv(rows, spec)
    picture = svg(tables.read_csv(content), spec)
    return {"results.csv": content} | ({"plot.svg": picture} if picture else {})


def generated(
    folder: Path, records: list[rec.Record]
) -> tuple[dict[str, str], list[tables.Row], Spec, comparison.Comparison | None]:
    """The generated files of a study by name, from its records alone; the rows, the specification and the comparison.

    Raises:
        UserError: report.yaml is wrong, README.md lacks the markers, or there is neither record nor published value.
    """
    spec = Spec.read(folder / "report.yaml")
    rows = tables.rows(records, spec)
    if not rows:
        sweep = f"{folder.name}/laptop or {folder.name}/full"
        raise UserError(f"{folder.name}: no finished run of a sweep name={sweep}, and no published value.")
    _warn_of_blanks(records, rows, spec)
    compared = comparison.compare(records, spec)
    table = tables.markdown(rows, spec) + (compared.markdown() if compared else "")
    files = {"README.md": _with_table(folder / "README.md", table)}
    files |= {"records.jsonl": rec.as_lines(records)} if records else {}
    files |= drawn(rows, spec)
    if spec.plot and "plot.svg" not in files:
        rec.note("report.yaml, plot: no run has what it shows; plot.svg is left as it is")
    return files, rows, spec, compared


def _warn_of_blanks(records: list[rec.Record], rows: list[tables.Row], spec: Spec) -> None:
    """Of what report.yaml asks for and no run has, unless runs of another size may have it."""
    keys = {key for record in records for key in rec.settings(record)}
    for title, key in spec.columns.items():
        if key not in keys and (near := nearest(key, keys)) and not any(title in p.where for p in spec.paper):
            rec.note(f"report.yaml, columns: no run has the setting {key}.{near}")
    found = {metric for record in records for metric in tables.measured(record)}
    for metric in spec.metrics:
        if any(row.get(metric) for row in rows):
            continue
        if metric in found:
            rec.note(f"report.yaml, metrics: {metric} was always measured beside other work and is left out")
        elif metric.partition("/")[0] in {name.partition("/")[0] for name in found}:
            rec.note(f"report.yaml, metrics: no run has {metric}.{nearest(metric, found)}")


def differing(folder: Path, files: dict[str, str]) -> list[str]:
    paths = {name: folder / name for name in files}
    return [n for n, p in sorted(paths.items()) if not p.is_file() or p.read_bytes() != files[n].encode()]


def _with_table(readme: Path, table: str) -> str:
    if not readme.is_file():
        raise UserError(f"'{readme}' is missing: create it with the lines {START} and {END}, for the table.")
    content = readme.read_text()
    if content.count(START) != 1 or content.count(END) != 1 or content.index(START) > content.index(END):
        raise UserError(f"'{readme}' needs the lines {START} and {END}, once each: the table goes between them.")
    before, _, rest = content.partition(START)
    return f"{before}{START}\n{table}{END}{rest.partition(END)[2]}"


def differing_settings(records: list[rec.Record]) -> Spec:
    """Of runs without a report.yaml: the settings that differ, and the metrics of the validation.

    Settings in the names of the runs come first; one that follows from them, as a copy does, is skipped.
    """
    known = [rec.settings(r) for r in records]
    names = dict.fromkeys(k for s in known for k in s)
    differ = [k for k in names if len({tables.text(s.get(k)) for s in known}) > 1]
    differ = [k for k in differ if any(s.get(k) != s["seed"] for s in known)]  # not data.seed, which is ${seed}
    axes = {part.partition("=")[0] for r in records for part in r["name"].split(",")}
    swept = [k for k in differ if any(f"{k}.".startswith(f"{axis}.") for axis in axes)]
    points = [tuple(tables.text(s.get(k)) for k in swept) for s in known]
    pairs = {k: {(point, tables.text(s.get(k))) for point, s in zip(points, known, strict=True)} for k in differ}
    differ = [*swept, *(k for k in differ if k not in swept and len(pairs[k]) > len(set(points)))]
    monitors = dict.fromkeys(r["monitor"] for r in records if r.get("monitor"))
    kinds = {m.split("/")[-1] for m in monitors}
    others = [m for r in records for m in r["metrics"] if not m.startswith("train/")]
    found = dict.fromkeys([*monitors, *(m for m in others if not kinds or m.split("/")[-1] in kinds)])
    metrics = {m: m for m in found} | {"run.wall_time_s": "time (s)"}
    if not differ:
        return Spec({}, metrics)
    y = [next((m for m in found if any(m in r["metrics"] for r in records)), "run.wall_time_s")]
    numeric = [k for k in swept or differ if all(rec.is_finite(s.get(k)) for s in known)]
    x = (numeric or differ)[0]
    lines = next((k for k in differ if k != x), None)
    return Spec({k: k for k in differ}, metrics, plot=Plot(x, y, "line" if numeric else "bar", lines))


def show(rows: list[tables.Row], spec: Spec, compared: comparison.Comparison | None) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(*tables.cells(rows, spec)))
    if compared:
        console.print(compared.explanation, highlight=False, markup=False)
        console.print(_table(compared.header, compared.body, compared.start))
        console.print("\n".join([comparison.RANKED, *compared.ranking]), highlight=False, markup=False)


def _table(header: list[str], body: list[list[str]], start: int) -> Table:
    """Columns from ``start`` on are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for i, title in enumerate(header):
        table.add_column(Text(title), justify="left" if i < start else "right", overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    return table


def find(study: str) -> Path | None:
    """The folder of a study, by name or path; None where there is none."""
    if Path(study, "report.yaml").is_file():
        return Path(study).resolve()
    name = Path(study).name
    if not name or study.rstrip("/") not in (name, f"experiments/{name}"):
        return None
    return next((d / name for d in study_dirs() if (d / name).is_dir()), None)


@click.command()
@click.argument("study")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Directory of runs."
)
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 if a generated file differs.")
@click.option("--wandb", metavar="ENTITY/PROJECT", help="Also read records from W&B.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def report(study: str, runs: Path, check: bool, wandb: str | None, as_json: bool) -> None:
    """Make table and plot of STUDY: a folder of experiments/, or runs/NAME or any other directory of runs."""
    folder = find(study)
    remote = rec.from_wandb(wandb) if wandb else []
    if folder is None:
        directory = Path(study) if Path(study).is_dir() else runs / study
        if not directory.is_dir():
            names = [
                p.name for d in (*study_dirs(), *([runs] if runs.is_dir() else ())) for p in d.iterdir() if p.is_dir()
            ]
            searched = " or ".join(os.path.relpath(d) for d in study_dirs()) or "experiments"
            message = f"No study '{study}' in {searched}, and no directory of this name."
            raise UserError(f"{message}{nearest(study, names)} Runs are in {runs}/NAME.")
        records = rec.unique([*rec.collect([directory]), *remote])
        if not records:
            raise UserError(f"'{study}' contains no finished run; nothing to show.")
        spec = differing_settings(records)
        rows = tables.rows(records, spec)
        files, compared = drawn(rows, spec), None
    else:
        directory = folder
        sweeps = [f.stem for f in folder.glob("*.yaml") if f.stem not in NOT_A_SWEEP] or ["laptop", "full"]
        new = rec.unique([*rec.collect(runs / folder.name / sweep for sweep in sweeps), *remote])
        old = rec.of_study(rec.read_lines(folder / "records.jsonl"), folder.name)
        records = rec.merge(old, rec.of_study(new, folder.name))
        if not records:
            rec.note(f"{folder.name}: no finished run")
        files, rows, spec, compared = generated(folder, records)
    changed = differing(directory, files)
    for name in changed if not check else ():
        (directory / name).write_bytes(files[name].encode())
    if as_json:
        lines = [asdict(line) for line in tables.lines(rows, spec)]
        click.echo(json.dumps({"study": directory.name, "metrics": spec.metrics, "lines": lines, "changed": changed}))
    elif not check:
        show(rows, spec, compared)
        click.echo(f"{os.path.relpath(directory)}: {', '.join(files)}")
    elif changed:
        click.echo(f"{directory.name}: would differ: {', '.join(changed)}")
    sys.exit(check and bool(changed))
