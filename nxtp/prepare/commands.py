"""`nxtp data show|verify`: look at shards and check them. `nxtp prepare NAME`: sources → shards."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from collections import Counter
from pathlib import Path

import click

from nxtp.errors import UserError, counted, nearest, printable
from nxtp.prepare import scripts


@click.group()
def data() -> None:
    """Look at shards and check them."""


@data.command(short_help="Counts, sizes, labels and a contact sheet of shards.")
@click.argument("shards", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="contact_sheet.png", show_default=True)
@click.option("--images", type=click.IntRange(0), default=24, show_default=True, help="Images on the contact sheet.")
@click.option("--samples", type=click.IntRange(0), default=10_000, show_default=True, help="Samples to read; 0: all.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Most frequent labels to print.")
@click.option("--nouns", default="hanta", show_default=True, help="Backend that makes labels of captions.")
@click.option("--stop-nouns", default="", metavar="NOUN,…", help="Nouns that are no labels, as nouns.stop of training.")
@click.option("--where", metavar="CONDITION", help="Only samples whose JSON fulfils this, as data.where of training.")
@click.option("--caption-key", metavar="FIELD", help="Field of the JSON that is the caption, as data.caption_key.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses the images.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Directory for copies of remote shards.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def show(shards, out, images, samples, top, nouns, stop_nouns, where, caption_key, seed, cache_dir, as_json):
    """Counts, sizes, labels and a contact sheet of SHARDS: directories, globs or brace expressions.

    nxtp data show data/shards/demo/train --out sheet.png
    """
    from rich.console import Console

    from nxtp.data.config import DataConfig
    from nxtp.data.labels.nouns import noun_backend
    from nxtp.data.mixture import open_set
    from nxtp.inference.figures import save_contact_sheet
    from nxtp.prepare.statistics import compute_statistics, print_statistics, sheet_items

    if images and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}.")  # before reading, which may take long
    backend = noun_backend(nouns, stop_nouns.split(","))
    config = DataConfig(cache_dir=cache_dir, where=where, caption_key=caption_key)
    config.allow_missing_shards, config.max_skip_fraction = True, 1.0
    opened = open_set("shards", list(shards), config)
    found = compute_statistics(opened, backend, samples, top)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_statistics(Console(), found)
    if images:
        per_image = Counter(found["labels_per_image"])
        average = sum(number * count for number, count in per_image.items()) / max(1, per_image.total())
        title = f"{printable(', '.join(shards))}: {counted(found['samples'], 'sample')}, {average:.1f} labels per image"
        save_contact_sheet(out, list(sheet_items(opened, backend, images, seed)), title=title)
        click.echo(f"Contact sheet: {out}", err=True)


@data.command(short_help="Check sets against their manifests.")
@click.argument("sets", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--images", is_flag=True, help="Also decode every image and compare it with its checksum.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="all cores")
def verify(sets, images, workers):
    """Check SETS of shards (directories, or single shards) against their manifests: files, bytes, hashes, samples.

    Exit code 1 if anything differs.

    nxtp data verify data/shards/demo/train
    """
    from nxtp.prepare.verification import verify_set
    from nxtp.prepare.writer import size_of

    bad = False
    for path in sets:
        problems, checked = verify_set(path, workers, images)
        for problem in problems:
            click.secho(f"{path}: {problem}", fg="red", err=True)
        bad |= bool(problems)
        if not problems:
            click.echo(f"{path}: {size_of(checked)}, all as in the manifest.")
    sys.exit(bad)


class Scripts(click.Group):
    """The scripts of data/, each imported when it is called; its first line is its line in the help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [script.name for script in pkgutil.iter_modules(scripts.__path__)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name not in self.list_commands(ctx):
            raise click.UsageError(f"No source '{name}'.{nearest(name, self.list_commands(ctx))}", ctx)
        return importlib.import_module(f"nxtp.prepare.scripts.{name}").main

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        texts = {name: Path(*scripts.__path__, f"{name}.py").read_text() for name in self.list_commands(ctx)}
        with formatter.section("Sources"):
            formatter.write_dl([(name, texts[name].partition("\n")[0].strip('"')) for name in texts])


@click.group(cls=Scripts)
def prepare() -> None:
    """Convert a source of images to shards. `nxtp prepare NAME` is `python data/NAME.py`; see its --help."""
