"""Source items → samples: a script lists the :class:`Item` of its source, :func:`write_items` does the rest."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nxtp.data.images import ImageError, load_image
from nxtp.data.labels.nouns import NounBackend
from nxtp.data.shards.reader import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, MAX_JSON_BYTES, valid_text
from nxtp.errors import UserError, counted
from nxtp.prepare.options import WriterOptions
from nxtp.prepare.writer import Skip, Skipped, write_set

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_LONGEST_JPEG = 65_500  # pixels per side that libjpeg writes


class Span(NamedTuple):
    """Bytes of a file: a member of an uncompressed tar, read in place."""

    path: str
    offset: int
    size: int


class Item(NamedTuple):
    """The source of one sample: its key, where its image is stored, its caption, and its JSON."""

    key: str
    image: str | Span
    caption: str | None = None
    record: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return self.image if isinstance(self.image, str) else self.key

    def identity(self) -> bytes:
        """What makes it this item, wherever the source is stored: of an image file its name and size, or none yet."""
        image: Any = self.image[1:]
        if isinstance(self.image, str):
            image = [os.path.basename(self.image), None]
            with suppress(OSError):
                image[1] = os.path.getsize(self.image)
        text = json.dumps([self.key, image, self.caption, self.record], sort_keys=True)
        return text.encode("utf-8", "backslashreplace") + b"\n"


def write_items(
    out: Path | str,
    items: Iterable[Item],
    *,
    made_by: Mapping[str, Any],
    skipped: Skipped | None = None,
    options: WriterOptions | None = None,
    crop_border: int = 0,
) -> dict[str, Any]:
    """Write ``items`` as a set of shards, in an order that is shuffled once and for all.

    Args:
        out: the set's directory.
        made_by: the script's name and options; stored in the manifest, they tell one set from another.
        skipped: source items that give no :class:`Item`.
        crop_border: pixels to cut off all sides of every image, which makes it a PNG.

    Returns:
        The manifest.

    Raises:
        UserError: no items, two of one key, or ``out`` contains a set made with other options.
    """
    options = options or WriterOptions()
    items = [item._replace(key=readable_key(item.key)) for item in items]
    twice = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    if twice:
        raise UserError(f"The source has {counted(len(twice), 'key')} more than once, the first is '{twice[0]}'.")
    order = np.random.default_rng(0).permutation(len(items))
    nouns, backend = None, options.noun_backend()
    if backend is not None:
        nouns = {"backend": backend.name, "version": backend.version}
        nouns |= {"stop": options.stop_nouns} if options.stop_nouns else {}
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.identity())
    return write_set(
        out,
        [items[i] for i in order],
        partial(_sample, options=options, nouns=backend, crop_border=crop_border),
        made_by={**made_by, **options.made_by(), "crop_border": crop_border, "source": digest.hexdigest()[:16]},
        skipped=skipped,
        nouns=nouns,
        options=options,
    )


def caption_items(images: Iterable[tuple[str, str, Sequence[str]]], separate: bool) -> tuple[list[Item], Skipped]:
    """(items, skipped) of (key, image, captions): an image's captions joined by spaces, or one item per caption."""
    items, skipped = [], Skipped()
    for key, image, captions in images:
        if not captions:
            skipped.add("no caption", image)
        elif separate:
            items += [Item(f"{key}_{n}", image, text) for n, text in enumerate(captions)]
        else:
            items.append(Item(key, image, " ".join(captions)))
    return items, skipped


def write_splits(
    script: str,
    find: Callable[[str, bool], tuple[list[Item], Skipped]],
    out: Path,
    splits: str,
    separate: bool,
    options: WriterOptions,
) -> None:
    """A set of shards per split, in ``out``; all splits are found before any is written.

    Args:
        find: a split's name and ``separate`` → its items, as :func:`caption_items` makes them.
        splits: names, separated by commas.
    """
    found = {name: find(name, separate) for name in map(str.strip, splits.split(","))}
    for split, (items, skipped) in found.items():
        made_by = {"script": script, "split": split, "captions": "separate" if separate else "joined"}
        write_items(out / split, items, made_by=made_by, skipped=skipped, options=options)


def readable_key(key: str) -> str:
    """A key that is read back as it is: a dot would end it, a lone surrogate (an odd byte of a name) has no UTF-8."""
    return re.sub(r"[./\\\x00-\x1f\x7f\ud800-\udfff]", "_", key)


def _sample(item: Item, options: WriterOptions, nouns: NounBackend | None, crop_border: int) -> dict[str, Any]:
    """A shard's sample, or Skip: a bad image, a caption without nouns, or something too large to be read."""
    data, extension = _convert(_read(item.image), options, crop_border)
    sample: dict[str, Any] = {"__key__": item.key, extension: data}
    if item.caption is not None:
        sample["txt"] = valid_text(item.caption)
    record = dict(item.record or {}) | {"crc32": zlib.crc32(data)}
    caption = sample.get("txt", record.get("caption"))
    if nouns is not None and isinstance(caption, str) and "labels" not in record:
        record["labels"] = nouns(caption)
        if not record["labels"]:
            raise Skip("no nouns")
    text = valid_text(json.dumps(record, ensure_ascii=False))
    for what, size, limit in (
        ("image", len(data), MAX_IMAGE_BYTES),
        ("caption", len(sample.get("txt", "").encode()), MAX_CAPTION_BYTES),
        ("json", len(text.encode()), MAX_JSON_BYTES),
    ):
        if size > limit:
            raise Skip(f"oversized {what}")
    return sample | {"json": json.loads(text)}


def _read(image: str | Span) -> bytes:
    try:
        if isinstance(image, str):
            data = Path(image).read_bytes()
        else:
            with open(image.path, "rb") as file:
                file.seek(image.offset)
                data = file.read(image.size)
    except FileNotFoundError:
        raise Skip("missing image") from None
    except OSError:
        raise Skip("unreadable image") from None
    if not data:
        raise Skip("empty image")
    return data


def _convert(data: bytes, options: WriterOptions, border: int) -> tuple[bytes, str]:
    """The image's bytes and its extension by content, not by name. Formats that shards lack become PNG, losslessly."""
    try:
        with Image.open(io.BytesIO(data)) as header:
            extension, size = _EXTENSIONS.get(header.format or ""), header.size
    except Exception:  # Pillow raises nearly any type on damaged files
        raise Skip("bad image") from None
    if min(size) <= 2 * border:
        raise Skip("image smaller than its border")
    resize = options.resize if options.resize is not None and min(size) > options.resize else None
    if extension is not None and not (resize or border or options.check):
        return data, extension
    try:
        image = load_image(data)
    except ImageError:
        raise Skip("bad image") from None
    buffer = io.BytesIO()
    if border:
        image = image.crop((border, border, image.width - border, image.height - border))
    if resize is not None:
        scale = resize / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        if max(width, height) > _LONGEST_JPEG:
            raise Skip(f"longer than {_LONGEST_JPEG:,} pixels after --resize")
        image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=options.quality)
        return buffer.getvalue(), "jpg"
    if extension is not None and not border:
        return data, extension
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"
