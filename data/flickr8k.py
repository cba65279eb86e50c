"""Flickr8k as shards: 8,000 photographs with five captions each, one set per split."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from nxtp.errors import UserError
from nxtp.prepare.items import Item, caption_items, write_splits
from nxtp.prepare.options import Script, WriterOptions, writer_options
from nxtp.prepare.writer import Skipped

FOLDERS = ("Flicker8k_Dataset", "Images")


def flickr8k_items(source: Path, split: str, separate: bool = False) -> tuple[list[Item], Skipped]:
    """(items, skipped) of one split; an image's captions joined by spaces, or one item per caption.

    Raises:
        UserError: a file or the folder of images is missing, or a line of the captions is not Flickr8k's.
    """
    folder = next((source / name for name in FOLDERS if (source / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{source} has no folder {' or '.join(FOLDERS)}: unpack Flickr8k_Dataset.zip there.")
    captions: dict[str, list[str]] = {}
    tokens = source / "Flickr8k.token.txt"
    for number, line in enumerate(_lines(tokens), 1):
        name, tab, text = line.partition("\t")
        if not tab or "#" not in name:
            raise UserError(f"{tokens}, line {number}: expected IMAGE#NUMBER, a tab and a caption, got {line[:60]!r}.")
        captions.setdefault(name.partition("#")[0], []).append(" ".join(text.split()))
    names = sorted(_lines(source / f"Flickr_8k.{split}Images.txt"))
    return caption_items(((Path(n).stem, str(folder / n), captions.get(n, [])) for n in names), separate)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: unpack Flickr8k_text.zip there.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


@click.command(cls=Script)
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/shards/flickr8k"), show_default=True)
@click.option("--splits", default="train,dev,test", show_default=True)
@click.option("--separate", is_flag=True, help="One sample per caption; by default an image's captions are joined.")
@writer_options
def main(source: Path, out: Path, splits: str, separate: bool, options: WriterOptions) -> None:
    """Flickr8k in SOURCE → shards in OUT/train, OUT/dev and OUT/test.

    SOURCE is the unpacked download: Flickr8k.token.txt and Flickr_8k.{train,dev,test}Images.txt beside the folder
    Flicker8k_Dataset, or Images.

    \b
    nxtp prepare flickr8k /datasets/flickr8k --out data/shards/flickr8k
    """
    write_splits("flickr8k", partial(flickr8k_items, source), out, splits, separate, options)


if __name__ == "__main__":
    main()
