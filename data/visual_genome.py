"""Visual Genome as shards: names of the objects as labels, or the region descriptions as one caption."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import click

from nxtp.errors import UserError
from nxtp.prepare.items import Item, write_items
from nxtp.prepare.options import Script, WriterOptions, writer_options
from nxtp.prepare.writer import Skipped


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Download and unpack Visual Genome (see --help).") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}).") from error


def visual_genome_items(source: Path, text: str) -> tuple[list[Item], Skipped]:
    """(items, skipped); ``text`` is "objects" or "regions".

    Raises:
        UserError: a file is missing or has other keys.
    """
    texts: dict[int, list[str]] = {}
    try:
        if text == "objects":
            for row in _rows(source / "objects.json"):
                texts[row["image_id"]] = [name for thing in row["objects"] for name in thing["names"]]
        else:
            for row in _rows(source / "region_descriptions.json"):
                texts[row["id"]] = [region["phrase"] for region in row["regions"]]
        urls = {row["image_id"]: row["url"] for row in _rows(source / "image_data.json")}
        items, skipped = [], Skipped()
        for image in sorted(urls):
            # the image's folder is the one in its URL
            folder, name = PurePosixPath(urls[image]).parts[-2:]
            given = list(dict.fromkeys(t for t in (" ".join(t.split()) for t in texts.get(image, [])) if t))
            file = str(source / folder / name)
            if not given:
                skipped.add("no text", file)
            elif text == "objects":
                items.append(Item(str(image), file, None, {"labels": given}))
            else:
                items.append(Item(str(image), file, ". ".join(t.rstrip(".") for t in given)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{source}: not Visual Genome's files ({type(error).__name__}: {error}).") from error
    return items, skipped


@click.command(cls=Script)
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/shards/visual_genome"), show_default=True)
@click.option("--text", type=click.Choice(["objects", "regions"]), default="objects", show_default=True)
@writer_options
def main(source: Path, out: Path, text: str, options: WriterOptions) -> None:
    """Visual Genome in SOURCE → shards in OUT: object names as labels, or region descriptions as a caption.

    SOURCE is the unpacked download of https://homes.cs.washington.edu/~ranjay/visualgenome: image_data.json and
    objects.json or region_descriptions.json, beside the image folders VG_100K/ and VG_100K_2/.

    \b
    nxtp prepare visual_genome /datasets/visual_genome --text objects
    """
    items, skipped = visual_genome_items(source, text)
    write_items(out, items, made_by={"script": "visual_genome", "text": text}, skipped=skipped, options=options)


if __name__ == "__main__":
    main()
