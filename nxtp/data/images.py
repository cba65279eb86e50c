"""Where an image file becomes RGB pixels, for shards, training and prediction alike."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from nxtp.errors import UserError, one_line, printable

MAX_PIXELS = 100_000_000  # of an RGB image: about 1 GB while it is decoded
_LARGE = 16_000_000  # pixels; such images are decoded one at a time: threads must not multiply their memory
_LONGEST = 8  # times the short side
_MANY = 64  # times the side that it is resized to
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "avif", "gif"),
        *("bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "ico"),
    )
)
# Bitmaps only: Pillow would also run Ghostscript on an EPS file. AVIF is part of Pillow from 11.3 on.
_FORMATS = ("PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO") + (
    ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()
)
_BYTES = (bytes, bytearray, memoryview)
_one_large_image = threading.Lock()
# EXIF orientation → what undoes it. Not ImageOps.exif_transpose: it also rewrites all tags, and fails on damaged ones.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """An image that cannot be used: '<name>: <reason>', on one line whatever the name contains.

    ``name`` is the image's name, unescaped: a path can be opened by it. ``kind`` is what a skipped sample counts as.
    """

    kind = "bad image"

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


class _Refused(Exception):
    """Why an image is refused; :func:`load_image` adds its name."""


def load_image(
    source: str | Path | bytes | bytearray | memoryview | Image.Image,
    *,
    near: int | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Any bitmap → RGB, upright by its EXIF orientation, transparency on white.

    Animations give their first frame. 16-bit grey is scaled to 8 bits. 32-bit integers and floats have no range: they
    count as 0–1 (floats only), 0–255 or 0–65535, the first that fits, else as lowest to highest. CMYK is converted as
    Pillow does, without its colour profile. The result never shares memory with ``source``.

    Args:
        source: a path, a file's bytes, or an opened image (of an animation: its current frame).
        near: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size where that divides both sides and leaves them
            ≥ 2¼·near: two to five times faster from 1,000 pixels on, and after resizing to ``near`` hardly different
            (tested: < 1 of 255 levels on average).
        max_pixels: larger images are refused before they are decoded, with transparency or another fourth channel
            from ¾ of it on; a baseline JPEG is instead decoded at the largest of 1/2, 1/4, 1/8 that fits. For other
            formats Pillow's own limit applies too.
        name: of the image in error messages; its path by default.

    Raises:
        ImageError: missing, not an image, truncated, or too large.
    """
    name = name or _name_of(source)
    try:
        with _quiet_pillow:
            if isinstance(source, Image.Image):
                _check_size(source, max_pixels)
                return _upright_rgb(source)
            with io.BytesIO(source) if isinstance(source, _BYTES) else open(source, "rb") as file:
                return _upright_rgb(_opened(file, near, max_pixels))
    except _Refused as refused:
        raise ImageError(name, str(refused)) from None
    except Exception as error:  # on damaged files Pillow's decoders raise nearly any type
        raise ImageError(name, _reason(error)) from error


def placed(image: Image.Image, size: int, resize_mode: str) -> tuple[Image.Image, tuple[int, int], tuple[int, int]]:
    """How an image becomes square (``resize_mode`` of :class:`nxtp.model.encoder.EncoderConfig`), before it is resized.

    Returns:
        The image to be resized; its height and width after that; in these pixels the top and left of the square, which
        is ``size`` wide: negative where it begins outside.
    """
    sides, short, long = (image.height, image.width), min(image.size), max(image.size)
    if resize_mode == "shortest":
        image = middle_of_strip(image)
        height, width = (int(size * side / short) for side in (image.height, image.width))
        return image, (height, width), (round((height - size) / 2), round((width - size) / 2))
    # A side of millions would need gigabytes of weights.
    across, down = (max(1, side // (_MANY * size)) for side in image.size)
    image = image.reduce((across, down)) if (across, down) != (1, 1) else image
    if resize_mode == "squash":
        return image, (size, size), (0, 0)
    height, width = (max(1, round(size * side / long)) for side in sides)
    return image, (height, width), (-((size - height) // 2), -((size - width) // 2))


def middle_of_strip(image: Image.Image) -> Image.Image:
    """The middle of an image longer than eight times its short side: all that a square crop of its centre needs."""
    longest = _LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def walk(
    path: str | Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` in sorted order that follows links to directories, and enters each directory once."""
    entered = set()
    for folder, folders, files in os.walk(path, onerror=onerror, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:  # a link to where it is, or to a place that another leads to
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort()
        yield folder, folders, sorted(files)


def find_images(paths: Iterable[str | Path]) -> tuple[list[Path], list[ImageError]]:
    """(images, problems): files as they are, directories expanded to the images anywhere below them, sorted.

    Hidden files and directories are skipped, links followed, and each path is returned once. A missing path, and a
    directory that cannot be read or contains no image, is a problem; the other images are returned all the same.
    """
    images: dict[Path, None] = {}
    problems: list[ImageError] = []

    def unreadable(error: OSError) -> None:
        problems.append(ImageError(str(error.filename), _reason(error)))

    for path in map(Path, paths):
        if path.is_dir():
            found = []
            for folder, folders, files in walk(path, unreadable):
                folders[:] = [f for f in folders if not f.startswith(".")]
                found += [Path(folder, f) for f in files if f[0] != "." and Path(f).suffix.lower() in SUFFIXES]
            if not found:
                known = ".jpg, .png, .webp, .avif, .gif, .tif, .bmp, .jp2 and others"
                reason = f"the directory '{printable(path)}' contains no file with an image's name ({known})"
                problems.append(ImageError(str(path), reason))
            images.update(dict.fromkeys(sorted(found)))
        elif path.exists():
            images[path] = None
        else:
            problems.append(ImageError(str(path), "no such file"))
    return list(images), problems


def _opened(file: BinaryIO, near: int | None, max_pixels: int) -> Image.Image:
    """The image, opened but not decoded, after a check of its size."""
    head = file.read(3)
    file.seek(0)
    if not head:
        raise _Refused("the file is empty")
    if head != b"\xff\xd8\xff":
        image = Image.open(file, formats=_FORMATS)
        _check_size(image, max_pixels)
        return image
    # Not through Image.open, which refuses by size before a reduced decoding can be asked for.
    image = JpegImageFile(file)
    width, height = image.size
    reduction = 1
    if near is not None:
        fitting = (s for s in (8, 4, 2) if min(width, height) // s >= 2.25 * near and width % s == height % s == 0)
        reduction = next(fitting, 1)
    if "progressive" in image.info:
        _check_size(image, max_pixels)  # all of it is in memory before it is reduced
    while (width // reduction) * (height // reduction) > max_pixels and reduction < 8:
        reduction *= 2
    if reduction > 1:
        image.draft(None, (max(width // reduction, 1), max(height // reduction, 1)))
    _check_size(image, max_pixels)
    return image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    most = max_pixels * 3 // 4 if image.mode in ("CMYK", "I", "F") or image.has_transparency_data else max_pixels
    if width * height > most:
        raise _Refused(f"{width}×{height} pixels are too many (at most {most:,}); make it smaller first")


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The decoded image, as a new RGB image."""
    with _one_large_image if image.width * image.height > _LARGE else nullcontext():
        image.load()
        rgb = _to_rgb(image)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata says nothing about the pixels
        orientation = None
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(np.asarray(image), 65535)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_unknown_range_to_8_bits(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image  # not a copy of it: four bytes per pixel
    if image.mode != "RGBA":
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _to_8_bits(values: np.ndarray, highest: float, lowest: float = 0) -> np.ndarray:
    """lowest…highest → uint8 0…255, rounded."""
    scale = 255 / (highest - lowest) if highest > lowest else 0.0
    scaled = values.astype(np.float32)  # then in place: images may be large
    scaled -= lowest
    scaled *= scale
    scaled += 0.5
    return scaled.clip(0, 255, out=scaled).astype(np.uint8)


def _unknown_range_to_8_bits(values: np.ndarray) -> np.ndarray:
    """See :func:`load_image`. What is not finite becomes the lowest (NaN, -inf) or highest (+inf) value."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise _Refused("no pixel has a finite value")
    lowest, highest = float(finite.min()), float(finite.max())
    values = np.nan_to_num(values, nan=lowest, neginf=lowest, posinf=highest)
    known = (1, 255, 65535) if np.issubdtype(values.dtype, np.floating) else (255, 65535)
    for full in known:
        if lowest >= 0 and highest <= full:
            return _to_8_bits(values, full)
    return _to_8_bits(values, highest, lowest)


def _name_of(source: str | Path | bytes | bytearray | memoryview | Image.Image) -> str:
    if isinstance(source, _BYTES):
        return f"image of {len(source):,} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"image {source.width}×{source.height} {source.mode}")
    return str(source)


def _reason(error: Exception) -> str:
    """One line, without the path or an object's address."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels; make it smaller first"
    if isinstance(error, MemoryError):
        return "too large for the memory"
    if isinstance(error, OSError) and error.strerror:  # from the operating system
        return error.strerror[0].lower() + error.strerror[1:]
    detail = one_line(error) or type(error).__name__
    return f"cannot be decoded ({detail})"


class _QuietPillow:
    """Ignores Pillow's warnings (sizes, metadata): what matters is raised. Thread-safe, unlike catch_warnings."""

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._filters.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._inside += 1

    def __exit__(self, *_) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.close()


_quiet_pillow = _QuietPillow()
