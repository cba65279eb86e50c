"""Source items → samples: a script lists what its source holds (:class:`Item`), :func:`write_items` does the rest."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from nxtp.data.images import ImageError, load_image
from nxtp.data.labels.nouns import noun_backend
from nxtp.data.shards.reader import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, MAX_JSON_BYTES, sound_text
from nxtp.errors import UserError
from nxtp.prepare.options import Writing
from nxtp.prepare.set_writer import write_set
from nxtp.prepare.shard_pool import Skip
from nxtp.prepare.skipped import LeftOut

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_LONGEST_JPEG = 65_500  # pixels a side that libjpeg writes


class Span(NamedTuple):
    """Bytes of a file: a member of an uncompressed tar, read where it lies."""

    path: str
    offset: int
    size: int


class Item(NamedTuple):
    """One sample to be: its key, where its image's bytes are, its caption, and what its JSON says beside it."""

    key: str
    image: str | Span
    caption: str | None = None
    record: Mapping[str, Any] | None = None

    def identity(self) -> str:
        """What makes it this item, whatever directory the source lies in."""
        image = os.path.basename(self.image) if isinstance(self.image, str) else self.image[1:]
        return json.dumps([self.key, image, self.caption, self.record], sort_keys=True)


def write_items(
    out: Path | str,
    items: Iterable[Item],
    *,
    made_by: Mapping[str, Any],
    skipped: LeftOut | None = None,
    writing: Writing | None = None,
    crop_border: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write ``items`` as a set of shards, in an order that is shuffled once and for all.

    Args:
        out: the set's directory.
        crop_border: pixels to cut off all sides of every image, which makes it a PNG.
        made_by: the script's name and options; stands in the manifest and tells one set from another.
        skipped: what listing the source left out.

    Returns:
        The manifest.

    Raises:
        UserError: no items, two of one key, or ``out`` holds a set made with other options.
    """
    writing = writing or Writing()
    items = [item._replace(key=_readable_key(item.key)) for item in items]
    keys = Counter(item.key for item in items)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} keys come twice in the source, the first is '{twice[0]}'.")
    order = np.random.default_rng(0).permutation(len(items))
    backend = noun_backend(writing.nouns) if writing.nouns else None
    return write_set(
        out,
        [items[i] for i in order],
        partial(_sample, writing=writing, crop_border=crop_border),
        made_by={
            **made_by,
            **writing.made_by(),
            "crop_border": crop_border,
            "source": _digest(item.identity() for item in items),
        },
        skipped=skipped,
        nouns={"backend": backend.name, "version": backend.version} if backend else None,
        writing=writing,
        console=console,
    )


def _readable_key(key: str) -> str:
    """A key that is read back as it is: a dot would end it, a lone surrogate (an odd byte of a name) has no UTF-8."""
    return re.sub(r"[./\\\x00-\x1f\x7f\ud800-\udfff]", "_", key)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()[:16]


def _sample(item: Item, writing: Writing, crop_border: int) -> dict[str, Any]:
    """
    Raises:
        Skip: the image is missing, empty or none; the caption gives no noun; something is larger than is read.
    """
    try:
        return _sample_or_skip(item, writing, crop_border)
    except Skip as skip:
        raise Skip(skip.kind, item.image if isinstance(item.image, str) else item.key) from None


def _sample_or_skip(item: Item, writing: Writing, crop_border: int) -> dict[str, Any]:
    data = _read(item.image)
    data, extension = _as_wanted(data, writing, crop_border)
    sample: dict[str, Any] = {"__key__": item.key, extension: data}
    if item.caption is not None:
        sample["txt"] = sound_text(item.caption)
    record = dict(item.record or {}) | {"crc32": zlib.crc32(data)}
    if writing.nouns is not None and item.caption is not None and "labels" not in record:
        record["labels"] = noun_backend(writing.nouns)(sample["txt"])
        if not record["labels"]:
            raise Skip("no nouns")
    text = sound_text(json.dumps(record, ensure_ascii=False))
    sizes = {"image": len(data), "caption": len(sample.get("txt", "").encode()), "json": len(text.encode())}
    for what, limit in (("image", MAX_IMAGE_BYTES), ("caption", MAX_CAPTION_BYTES), ("json", MAX_JSON_BYTES)):
        if sizes[what] > limit:
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


def _as_wanted(data: bytes, writing: Writing, border: int) -> tuple[bytes, str]:
    """The image's bytes and its extension by what it is, not by its name. Other formats become PNG, losslessly."""
    try:
        with Image.open(io.BytesIO(data)) as header:
            extension, size = _EXTENSIONS.get(header.format or ""), header.size
    except Exception:  # Pillow raises nearly any type on damaged files
        raise Skip("bad image") from None
    if min(size) <= 2 * border:
        raise Skip("image smaller than its border")
    smaller = writing.resize is not None and min(size) > writing.resize
    if extension is not None and not smaller and not border and not writing.check:
        return data, extension
    try:
        image = load_image(data)
    except ImageError:
        raise Skip("bad image") from None
    buffer = io.BytesIO()
    if border:
        image = image.crop((border, border, image.width - border, image.height - border))
    if smaller:
        scale = writing.resize / min(image.size)
        size = tuple(round(side * scale) for side in image.size)
        if max(size) > _LONGEST_JPEG:
            raise Skip(f"longer than {_LONGEST_JPEG:,} pixels after --resize")
        image = image.resize(size, Image.Resampling.BICUBIC)
        image.save(buffer, "JPEG", quality=writing.quality)
        return buffer.getvalue(), "jpg"
    if extension is not None and not border:
        return data, extension
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"
