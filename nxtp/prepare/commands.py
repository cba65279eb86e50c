"""`nxtp data show|verify`: look at shards, and check them."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nxtp.data.config import DataConfig
from nxtp.data.labels.nouns import noun_backend
from nxtp.data.mixture import open_set
from nxtp.errors import UserError, by_kind, counted, printable
from nxtp.inference.figures import bar, save_contact_sheet
from nxtp.prepare.statistics import Survey, quartiles, sheet_items, survey
from nxtp.prepare.verification import verify


@click.group()
def data() -> None:
    """Look at shards, and check them."""


@data.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="contact_sheet.png", show_default=True)
@click.option("--images", type=click.IntRange(0), default=24, show_default=True, help="On the contact sheet.")
@click.option("--samples", type=click.IntRange(0), default=10_000, show_default=True, help="To look at; 0: all.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Most frequent labels to print.")
@click.option("--nouns", default="textblob", show_default=True, help="What makes labels of captions.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of images.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Where remote shards are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def show(shards, out, images, samples, top, nouns, seed, cache_dir, as_json):
    """Counts, sizes, labels and a contact sheet of SHARDS: directories, globs or brace expressions.

    nxtp data show data/shards/demo/train --out sheet.png
    """
    if images and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}.")  # told before a long look, not after it
    backend = noun_backend(nouns)
    opened = open_set("shards", list(shards), DataConfig(cache_dir=cache_dir))
    found = survey(opened, backend, samples or None)
    if as_json:
        click.echo(json.dumps(found.as_json(top), ensure_ascii=False))
    else:
        print_survey(Console(), found, top)
    if images:
        save_contact_sheet(out, list(sheet_items(opened, backend, images, seed)), title=_title(shards, found))
        click.echo(f"Contact sheet: {out}", err=True)


def _title(shards: Sequence[str], found: Survey) -> str:
    average = statistics.fmean(found.counts.elements()) if found.counts else 0
    return f"{printable(', '.join(shards))}: {counted(found.samples, 'sample')}, {average:.1f} labels an image"


@data.command(name="verify")
@click.argument("sets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--images", is_flag=True, help="Also decode every image and compare it with its checksum.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="all cores")
def verify_command(sets, images, workers):
    """Check SETS of shards (directories, or single shards) against their manifests: files, bytes, hashes, samples.

    Exit code 1 if anything differs.

    nxtp data verify data/shards/demo/train
    """
    bad = 0
    for path in sets:
        problems, rows = verify(path, workers, images, Console(stderr=True))
        for problem in problems:
            click.secho(f"{path}: {problem}", fg="red", err=True)
        bad += bool(problems)
        if not problems:
            samples, size = (sum(row[what] for row in rows) for what in ("samples", "bytes"))
            total = f"{counted(samples, 'sample')} in {counted(len(rows), 'shard')}, {size / 1e9:.2f} GB"
            click.echo(f"{path}: {total}: all as the manifest says.")
    sys.exit(1 if bad else 0)


def print_survey(console: Console, found: Survey, top: int) -> None:
    sizes = Table(
        title=f"{counted(found.samples, 'sample')}, {found.looked_at:,} of them looked at", title_justify="left"
    )
    for column in ("", "min", "25 %", "median", "75 %", "max"):
        sizes.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows = {
        "width": found.widths,
        "height": found.heights,
        "bytes an image": found.bytes,
        "words a caption": found.words,
        "labels an image": list(found.counts.elements()),
    }
    for name, values in rows.items():
        if numbers := quartiles(values):
            sizes.add_row(name, *(f"{value:,.0f}" for value in numbers.values()))
    console.print(sizes)
    kinds = ", ".join(f"{kind} × {n:,}" for kind, n in found.formats.most_common())
    console.print(f"Formats: {kinds or 'none could be read'}. Labels of their own: {found.given:,}.", highlight=False)
    if found.skipped:
        console.print(f"Cannot be used: {by_kind(found.skipped)}.", style="red", highlight=False)
    _print_bars(console, "Labels an image", [(str(n), count) for n, count in sorted(found.counts.items())])
    title = f"Most frequent of {len(found.labels):,} labels"
    _print_bars(console, title, found.most_frequent(top))


def _print_bars(console: Console, title: str, rows: Sequence[tuple[str, int]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(style="cyan", no_wrap=True)
    most = max(count for _, count in rows)
    for name, count in rows:
        table.add_row(escape(printable(name)), f"{count:,}", bar(count / most, 40))
    console.print(table)
