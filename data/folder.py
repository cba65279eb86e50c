"""A folder of your own images as shards: NAME.jpg with its caption in NAME.txt and/or {"labels": […]} in NAME.json.

    python data/folder.py /datasets/mine --out data/shards/mine

Any bitmap format, any depth of subfolders.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from nxtp.errors import UserError
from nxtp.images import find_images
from nxtp.prepare import Item, write_items
from nxtp.shard_set import decode_text
from nxtp.writing_options import Writing, writing_options


def folder_items(source: Path) -> tuple[list[Item], Counter]:
    """(items, left out by kind) of all images below ``source``.

    Raises:
        UserError: no image there.
    """
    images, problems = find_images([source])
    if not images:
        raise UserError(str(problems[0]) if problems else f"{source}: no image in this directory")
    items, skipped = [], Counter()
    for image in images:
        text, record = image.with_suffix(".txt"), image.with_suffix(".json")
        caption = decode_text(text.read_bytes()) if text.is_file() else None
        try:
            values = json.loads(record.read_bytes()) if record.is_file() else {}
        except ValueError:
            values = None
        if not isinstance(values, dict):
            skipped["bad json"] += 1
        elif not caption and not values.get("labels") and not values.get("caption"):
            skipped["no caption"] += 1
        else:
            key = "_".join(image.relative_to(source).with_suffix("").parts).replace(".", "_")
            items.append(Item(key, str(image), caption, values))
    return items, skipped


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@writing_options
def main(source: Path, out: Path, writing: Writing) -> None:
    """Images below SOURCE, each with a .txt caption and/or a .json of labels beside it → shards in OUT.

    Any bitmap format, any depth of subfolders. NAME.txt is the caption of NAME.jpg, NAME.json holds {"labels": […]}.

    \b
    python data/folder.py /datasets/mine --out data/shards/mine
    """
    items, skipped = folder_items(source)
    write_items(out, items, made_by={"script": "folder"}, skipped=skipped, writing=writing)


if __name__ == "__main__":
    main()
