"""Open Images V7 as shards: localized narratives as captions, or the verified image-level labels."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import click

from nxtp.errors import UserError
from nxtp.prepare.items import Item, write_items
from nxtp.prepare.options import Script, WriterOptions, writer_options
from nxtp.prepare.writer import Skipped


def narratives(files: Sequence[Path]) -> dict[str, str]:
    """Image → its narratives, those of several annotators joined by spaces.

    Raises:
        UserError: a line is not a localized narrative.
    """
    texts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    texts[Path(row["image_id"]).name].append(
                        (int(row["annotator_id"]), " ".join(row["caption"].split()))
                    )
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    problem = f"{file}, line {number}: not a localized narrative ({type(error).__name__}: {error})."
                    raise UserError(problem) from error
    return {image: " ".join(text for _, text in sorted(rows)) for image, rows in texts.items()}


def image_labels(labels: Path, classes: Path) -> dict[str, list[str]]:
    """Image → names of the classes that people verified to be in it.

    Raises:
        UserError: a file lacks the columns of Open Images.
    """
    try:
        with open(classes, encoding="utf-8", newline="") as file:
            names = {row["LabelName"]: row["DisplayName"] for row in csv.DictReader(file)}
        found: dict[str, list[str]] = defaultdict(list)
        with open(labels, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                verified = found[Path(row["ImageID"]).name]
                if float(row["Confidence"]) == 1:
                    verified.append(names[row["LabelName"]])
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{labels} and {classes}: not Open Images' tables ({type(error).__name__}: {error})."
        ) from error
    return {image: list(dict.fromkeys(sorted(texts))) for image, texts in found.items()}


@click.command(cls=Script)
@click.option("--images", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--narratives", "stories", type=click.Path(path_type=Path, exists=True), multiple=True)
@click.option("--labels", type=click.Path(path_type=Path, exists=True), help="…-human-imagelabels.csv")
@click.option("--classes", type=click.Path(path_type=Path, exists=True), help="oidv7-class-descriptions.csv")
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/shards/openimages/val"), show_default=True)
@writer_options
def main(images: Path, stories, labels: Path | None, classes: Path | None, out: Path, options: WriterOptions) -> None:
    """Open Images V7 → shards with captions (--narratives) and/or labels (--labels and --classes).

    Images and files: https://storage.googleapis.com/openimages/web/download_v7.html. Give each
    part of the narratives with its own --narratives.

    \b
    nxtp prepare openimages --images /datasets/openimages/validation \\
        --narratives open_images_validation_localized_narratives.jsonl --out data/shards/openimages/val
    """
    if not stories and not labels:
        raise click.UsageError("Give --narratives, or --labels with --classes, or both.")
    if (labels is None) != (classes is None):
        raise click.UsageError("--labels and --classes go together.")
    captions = narratives(stories)
    verified = image_labels(labels, classes) if labels else {}
    items, skipped = [], Skipped()
    for image in sorted({*captions, *verified}):
        if labels and not verified.get(image):
            skipped.add("no label", image)
        elif stories and image not in captions:
            skipped.add("no caption", image)
        else:
            record = {"labels": verified[image]} if labels else None
            items.append(Item(image, str(images / f"{image}.jpg"), captions.get(image), record))
    made_by = {"script": "openimages", "narratives": bool(stories), "labels": bool(labels)}
    write_items(out, items, made_by=made_by, skipped=skipped, options=options)


if __name__ == "__main__":
    main()
