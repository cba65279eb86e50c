"""ImageNet-1k and its variants as shards; labels are the names of an image's class.

Class names and ReaL's labels are timm's.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import click

from nxtp.data.images import walk
from nxtp.data.labels.imagenet import NAMES, SUBSETS, ImageNetClass, by_wnid, imagenet_classes, real_labels, subset
from nxtp.errors import UserError
from nxtp.prepare.items import Item, Span, write_items
from nxtp.prepare.options import Script, WriterOptions, writer_options
from nxtp.prepare.writer import Skipped

SETS = ("1k", "v2", "real", "a", "r", "sketch", "objectnet")
_IMAGE = re.compile(r"\.(jpe?g|png|webp|bmp)$", re.IGNORECASE)
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")


class Found(NamedTuple):
    """An image of a source: its class folder ("" if there is none), its name without extension, its bytes."""

    folder: str
    stem: str
    image: str | Span


def find(source: Path) -> Iterator[Found]:
    """All images of a directory of class folders or of flat images, or of an official tar (of tars), sorted.

    Raises:
        UserError: a tar is compressed or damaged.
    """
    if source.is_dir():
        splits = [str(source / name) for name in ("train", "val", "test") if (source / name).is_dir()]
        if len(splits) > 1:
            raise UserError(f"{source} has several splits: prepare each as a set of its own: {', '.join(splits)}.")
        for folder, _, files in walk(source):
            name = Path(folder).name if Path(folder) != source else ""
            for file in files:
                if _IMAGE.search(file) and not file.startswith("."):
                    yield Found(name, Path(file).stem, os.path.join(folder, file))
        return
    try:
        with tarfile.open(source, "r:") as outer:
            for member in sorted(outer.getmembers(), key=lambda m: m.name):
                path = PurePosixPath(member.name)
                if member.isfile() and path.suffix == ".tar":  # a class: its tar is stored uncompressed in this one
                    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                        for image in sorted(inner.getmembers(), key=lambda m: m.name):
                            if image.isfile() and _IMAGE.search(image.name):
                                offset = member.offset_data + image.offset_data
                                span = Span(str(source), offset, image.size)
                                yield Found(path.stem, PurePosixPath(image.name).stem, span)
                elif member.isfile() and _IMAGE.search(member.name):
                    folder = path.parent.name if by_wnid().get(path.parent.name) else ""
                    yield Found(folder, path.stem, Span(str(source), member.offset_data, member.size))
    except tarfile.TarError as error:
        raise UserError(
            f"{source} cannot be read as an uncompressed tar ({error}). Unpack it, or download it again."
        ) from None


def validation_truth(path: Path) -> dict[int, ImageNetClass]:
    """Number of a validation image (from 1) → its class.

    ``path`` is the development kit (a .tar.gz, or unpacked), Kaggle's LOC_val_solution.csv, or a text file with one
    WordNet id per line in the order of the images.

    Raises:
        UserError: it is none of these.
    """
    try:
        if path.is_dir() or path.name.endswith((".tar.gz", ".tgz")):
            wnids = _development_kit(path)
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                rows = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
            return {int(_VALIDATION.search(image)[1]): by_wnid()[wnid] for image, wnid in rows.items()}
        else:
            wnids = path.read_text().split()
        return {number: by_wnid()[wnid] for number, wnid in enumerate(wnids, start=1)}
    except (OSError, EOFError, LookupError, ValueError, TypeError, tarfile.TarError) as error:
        raise UserError(
            f"{path} does not contain the classes of validation images ({type(error).__name__}: {error})."
        ) from error


def _development_kit(path: Path) -> list[str]:
    """WordNet ids in the order of the validation images: its ground truth counts by its own table of synsets."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("Reading the development kit needs SciPy: pip install scipy") from None
    names = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    if path.is_dir():
        files = {file.name: file for file in path.rglob("*")}
        meta, truth = (files[name].read_bytes() for name in names)
    else:
        with tarfile.open(path, "r:*") as tar:
            members = {PurePosixPath(member.name).name: member for member in tar if member.isfile()}
            meta, truth = (tar.extractfile(members[name]).read() for name in names)
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return [wnid_of[int(line)] for line in truth.split()]


def objectnet_labels(source: Path) -> Callable[[str], str]:
    """Folder → label: by ObjectNet's own table if it is beside the images, else the folder's name in words.

    Raises:
        UserError: the table is damaged.
    """
    table = source.parent / "mappings" / "folder_to_objectnet_label.json"
    try:
        names = json.loads(table.read_bytes()) if table.is_file() else {}
        if not isinstance(names, dict) or not all(isinstance(label, str) and label.strip() for label in names.values()):
            raise ValueError("not a label for each folder")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{table} is not ObjectNet's table of labels ({error}): download it again.") from error
    return lambda folder: str(names.get(folder, re.sub(r"[_\s]+", " ", folder).strip())).lower()


def imagenet_items(source: Path, kind: str, *, truth: Path | None, names: str) -> tuple[list[Item], Skipped]:
    """(items, skipped). The record of an item has ``labels`` and, except for ObjectNet, the class's index
    (``class``; ReaL: ``classes``) and ``wnid``.

    Raises:
        UserError: folders that are not classes, or flat images without ``truth``.
    """
    classes = imagenet_classes()
    allowed = subset(f"imagenet_{kind}") if f"imagenet_{kind}" in SUBSETS else None
    number_of = validation_truth(truth) if truth else {}
    objectnet = objectnet_labels(source) if kind == "objectnet" else None
    items: list[Item] = []
    skipped = Skipped()
    for folder, stem, image in find(source):
        number = int(match[1]) if (match := _VALIDATION.fullmatch(stem)) else None
        if objectnet is not None:
            items.append(Item(_key(folder, stem), image, None, {"labels": [objectnet(folder)]}))
            continue
        if kind == "real":
            if number is None:
                raise UserError(f"{source}: ReaL's labels belong to images named ILSVRC2012_val_…, not to '{stem}'.")
            true = [classes[i] for i in real_labels()[number - 1]]
            labels = list(dict.fromkeys(label for c in true for label in c.labels(names)))
            if not true:
                skipped.add("no ReaL label", stem)
            else:
                items.append(Item(stem, image, None, {"labels": labels, "classes": [c.index for c in true]}))
            continue
        if kind == "v2" and folder.isdecimal() and int(folder) < len(classes):
            found = classes[int(folder)]
        else:
            found = by_wnid().get(folder) or number_of.get(number)
        if found is None and folder:
            advice = " (add --set v2)" * folder.isdecimal()
            raise UserError(f"{source}: the folder '{folder}' is not a class of ImageNet-1k{advice}.")
        if found is None:
            raise UserError(f"{source}: '{stem}' is not in a class folder: add --truth, see --help.")
        if allowed is not None and found.index not in allowed:
            raise UserError(f"{source}: class '{folder}' is not among the {len(allowed)} of ImageNet-{kind.upper()}.")
        record = {"labels": found.labels(names), "class": found.index, "wnid": found.wnid}
        items.append(Item(_key(folder, stem), image, None, record))
    return items, skipped


def _key(folder: str, stem: str) -> str:
    key = stem if not folder or stem.startswith(f"{folder}_") else f"{folder}_{stem}"
    return re.sub(r"[^\w-]+", "_", key)


@click.command(cls=Script)
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--set", "kind", type=click.Choice(SETS), default="1k", show_default=True)
@click.option(
    "--names", type=click.Choice(NAMES), default="synonyms", show_default=True, help="Which names are labels."
)
@click.option("--truth", type=click.Path(path_type=Path, exists=True), help="Classes of flat validation images.")
@click.option("--crop-border", type=click.IntRange(0), default=0, help="Pixels to cut off; ObjectNet needs 2.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@writer_options
def main(
    source: Path, kind: str, names: str, truth: Path | None, crop_border: int, out: Path, options: WriterOptions
) -> None:
    """ImageNet-1k, V2, ReaL, A, R, Sketch or ObjectNet in SOURCE → shards in OUT.

    SOURCE is a directory of class folders, a directory of flat images, or an official tar. Flat validation images need
    --truth: the development kit, Kaggle's LOC_val_solution.csv, or one WordNet id per line in the order of the images.

    \b
    1k, real   https://image-net.org
    v2         https://github.com/modestyachts/ImageNetV2
    a          https://github.com/hendrycks/natural-adv-examples
    r          https://github.com/hendrycks/imagenet-r
    sketch     https://github.com/HaohanWang/ImageNet-Sketch
    objectnet  https://objectnet.dev

    \b
    nxtp prepare imagenet /datasets/ILSVRC2012_img_train.tar --out data/shards/imagenet1k/train
    nxtp prepare imagenet /datasets/ILSVRC2012_img_val.tar --truth ILSVRC2012_devkit_t12.tar.gz \\
        --out data/shards/imagenet1k/val
    nxtp prepare imagenet /datasets/imagenet/val --set real --out data/shards/imagenet_real
    nxtp prepare imagenet /datasets/objectnet-1.0/images --set objectnet --crop-border 2 --out data/shards/objectnet
    """
    items, skipped = imagenet_items(source, kind, truth=truth, names=names)
    made_by = {"script": "imagenet", "set": kind, "names": names}
    write_items(out, items, made_by=made_by, skipped=skipped, options=options, crop_border=crop_border)


if __name__ == "__main__":
    main()
