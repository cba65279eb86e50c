"""COCO captions 2017 as shards, one set per split."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click

from nxtp.errors import UserError
from nxtp.prepare.items import Item, caption_items, write_splits
from nxtp.prepare.options import Script, WriterOptions, writer_options
from nxtp.prepare.writer import Skipped


def coco_items(source: Path, split: str, separate: bool = False) -> tuple[list[Item], Skipped]:
    """(items, skipped) of one split; an image's captions joined by spaces, or one item per caption.

    Raises:
        UserError: the annotations or the images are missing, or the annotations are not COCO's.
    """
    path = source / "annotations" / f"captions_{split}2017.json"
    try:
        content = json.loads(path.read_bytes())
        files = {int(image["id"]): Path(image["file_name"]) for image in content["images"]}
        captions: dict[int, list[str]] = {image: [] for image in files}
        for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
            text = " ".join(annotation["caption"].split())
            if text and annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(text)
    except FileNotFoundError:
        raise _missing(path, split) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not contain COCO captions ({type(error).__name__}: {error}).") from error
    folder = source / f"{split}2017"
    if not folder.is_dir():
        raise _missing(folder, split)
    images = ((files[image].stem, str(folder / files[image].name), captions[image]) for image in sorted(files))
    return caption_items(images, separate)


def _missing(path: Path, split: str) -> UserError:
    advice = f"unpack it from https://cocodataset.org (COCO 2017), or leave '{split}' out of --splits."
    return UserError(f"{path} is missing: {advice}")


@click.command(cls=Script)
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/shards/coco"), show_default=True)
@click.option("--splits", default="train,val", show_default=True)
@click.option("--separate", is_flag=True, help="One sample per caption; by default an image's captions are joined.")
@writer_options
def main(source: Path, out: Path, splits: str, separate: bool, options: WriterOptions) -> None:
    """COCO captions 2017 in SOURCE → shards in OUT/train and OUT/val.

    SOURCE is the unpacked download of https://cocodataset.org: annotations/captions_{train,val}2017.json beside the
    image folders train2017/ and val2017/.

    \b
    nxtp prepare coco /datasets/coco --out data/shards/coco
    """
    write_splits("coco", partial(coco_items, source), out, splits, separate, options)


if __name__ == "__main__":
    main()
