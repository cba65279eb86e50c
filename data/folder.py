"""A folder of your own images as shards: NAME.jpg with its caption in NAME.txt and/or {"labels": […]} in NAME.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from nxtp.data.images import find_images
from nxtp.data.labels.cleaning import clean_labels
from nxtp.data.shards.reader import decode_text
from nxtp.errors import UserError, some_of
from nxtp.prepare.items import Item, readable_key, write_items
from nxtp.prepare.options import Script, WriterOptions, writer_options
from nxtp.prepare.writer import Skip, Skipped

SPLITS = {"train", "val", "valid", "validation", "test"}  # names of folders that contain class folders


def folder_items(source: Path, classes: bool = False) -> tuple[list[Item], Skipped]:
    """(items, skipped) of all images below ``source``.

    Args:
        classes: the label of an image is the name of its folder, with spaces for underscores; no other file is read.

    Raises:
        UserError: no image there, or none with a caption or labels; with ``classes``, several splits.
    """
    images, problems = find_images([source])
    if not images:
        raise problems[0]
    below = {folder for image in images for folder in image.relative_to(source).parents}
    splits = [folder for folder in below if folder.name.lower() in SPLITS and folder.name != folder.parent.name]
    if classes and len(splits) > 1:
        each = some_of([str(source / folder) for folder in sorted(splits)])
        raise UserError(f"{source} has several splits: prepare each as a set of its own: {each}.")
    items, skipped, keys = [], Skipped(), set[str]()
    for image in images:
        name = str(image.relative_to(source))
        try:
            caption, record = (None, _class(image.parent, source)) if classes else _texts(image)
        except Skip as skip:
            skipped.add(str(skip), name)
            continue
        key = plain = readable_key("_".join(image.relative_to(source).with_suffix("").parts))
        number = 1
        while key in keys:  # 1.jpg and 1.png
            number += 1
            key = f"{plain}_{number}"
        keys.add(key)
        items.append(Item(key, str(image), caption, record))
    if not items and classes:
        raise UserError(
            f"{source}: --classes needs a folder for each class, as in {source / 'dog' / 'NAME.jpg'}.{skipped}"
        )
    if not items:
        needed = 'beside NAME.jpg, training needs its caption in NAME.txt or {"labels": ["…"]} in NAME.json'
        if any(image.parent != source for image in images):
            needed += "; if the folders' names are the labels, add --classes"
        raise UserError(f"{source}: no image has a usable caption or label: {needed}.{skipped}")
    return items, skipped


def _class(folder: Path, source: Path) -> dict[str, Any]:
    """The JSON of an image in ``folder``.

    Raises:
        Skip: its name gives no label.
        UserError: its name is a number of WordNet.
    """
    if folder == source:
        raise Skip("not in a class folder")
    if re.fullmatch(r"n\d{8}", folder.name):
        raise UserError(f"{folder} is named by a number of WordNet: nxtp prepare imagenet knows the names of these.")
    name = re.sub(r"^(n\d{8}-|\d{3}\.)", "", folder.name)  # numbers of Stanford Dogs, CUB-200 and Caltech-256
    labels = clean_labels([name.replace("_", " ")])
    if not labels:
        raise Skip("folder name without a label")
    return {"labels": labels}


def _texts(image: Path) -> tuple[str | None, dict[str, Any]]:
    """The caption and the JSON beside an image.

    Raises:
        Skip: training could not use them.
    """
    text, record = image.with_suffix(".txt"), image.with_suffix(".json")
    try:
        caption = decode_text(text.read_bytes()) if text.is_file() else None
        values = json.loads(record.read_bytes()) if record.is_file() else {}
    except OSError:
        raise Skip("unreadable caption or json") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Skip("bad json")
    labels = values.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise Skip("labels not a list of strings")
    if not clean_labels(labels or []):
        values.pop("labels", None)  # an empty list would win over the caption
    other = values.get("caption")
    if not caption and "labels" not in values and not (isinstance(other, str) and other.strip()):
        raise Skip("no caption")
    return caption or None, values


@click.command(cls=Script)
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--classes", is_flag=True, help="The name of an image's folder is its label: mine/hot_dog/1.jpg.")
@writer_options
def main(source: Path, out: Path, classes: bool, options: WriterOptions) -> None:
    """Images below SOURCE, each with a .txt caption and/or a .json of labels beside it → shards in OUT.

    Any bitmap format, any depth of subfolders. NAME.txt is the caption of NAME.jpg, NAME.json contains {"labels": […]}.
    With --classes an image needs neither: its label is the name of the folder that it is in.

    \b
    nxtp prepare folder /datasets/mine --out data/shards/mine
    nxtp prepare folder /datasets/mine --classes --out data/shards/mine
    """
    items, skipped = folder_items(source, classes)
    made_by = {"script": "folder"} | ({"classes": True} if classes else {})
    write_items(out, items, made_by=made_by, skipped=skipped, options=options)


if __name__ == "__main__":
    main()
