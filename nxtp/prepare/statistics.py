"""Statistics of a set of shards: sizes, formats, labels, what cannot be used; and samples to look at."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from nxtp.data.images import ImageError, load_image
from nxtp.data.labels.from_samples import labels_of
from nxtp.data.labels.nouns import NounBackend
from nxtp.data.mixture import OpenedSet
from nxtp.data.shards.reader import RawSample, SampleError
from nxtp.errors import by_kind, counted, printable
from nxtp.inference.figures import SheetItem

_SHEET_PIXELS = 224
_SHEET_SAMPLES = 10_000  # from which a sheet's are chosen


def compute_statistics(opened: OpenedSet, nouns: NounBackend, limit: int, top: int) -> dict[str, Any]:
    """What ``nxtp data show --json`` prints. Headers and texts are read, images are not decoded.

    Args:
        limit: samples to read, spread evenly over a bounded number of shards; 0: all.
        top: most frequent labels to list.
    """
    shards = opened.shards
    skipped = Counter(shards.skipped)
    labels: Counter[str] = Counter()
    values: dict[str, list[Any]] = {name: [] for name in ("width", "height", "bytes", "words", "labels", "format")}
    given = 0
    positions = shards.spread(limit or len(shards))
    for position in track(positions, "reading", console=Console(stderr=True), transient=True):
        try:
            raw = shards.read(position)
            with Image.open(io.BytesIO(raw.image)) as header:
                found = {"width": header.width, "height": header.height, "format": header.format}
        except Exception as error:  # Pillow raises nearly any type on damaged files
            skipped[error.kind if isinstance(error, SampleError) else "bad image"] += 1
            continue
        own = _labels(raw, nouns, skipped)
        labels.update(own)
        given += raw.labels is not None
        found |= {"bytes": len(raw.image), "labels": len(own)}
        if raw.caption is not None:
            found["words"] = len(raw.caption.split())
        for name, value in found.items():
            values[name].append(value)
    frequent = sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:top]
    return {
        "samples": len(shards),
        "samples_read": len(positions),
        "skipped": dict(skipped),
        "labels": {"distinct": len(labels), "given": given, "most_frequent": frequent},
        "labels_per_image": dict(sorted(Counter(values["labels"]).items())),
        "formats": dict(Counter(values["format"]).most_common()),
        "widths": _quartiles(values["width"]),
        "heights": _quartiles(values["height"]),
        "bytes": _quartiles(values["bytes"]),
        "words": _quartiles(values["words"]),
    }


def _labels(raw: RawSample, nouns: NounBackend, skipped: Counter[str]) -> list[str]:
    try:
        return labels_of(raw, nouns)
    except SampleError as error:
        skipped[error.kind] += 1
        return []


def _quartiles(values: Sequence[int]) -> dict[str, float] | None:
    """Smallest, quartiles and largest; None without values."""
    if not values:
        return None
    quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return dict(zip(("min", "lower", "median", "upper", "max"), quantiles, strict=True))


def sheet_items(opened: OpenedSet, nouns: NounBackend, images: int, seed: int) -> Iterator[SheetItem]:
    """Up to ``images`` randomly chosen samples that can be shown."""
    for position in np.random.default_rng(seed).permutation(opened.shards.spread(_SHEET_SAMPLES)):
        if images == 0:
            return
        try:
            raw = opened.shards.read(int(position))
            picture = load_image(raw.image, near=_SHEET_PIXELS)
        except (SampleError, ImageError):
            continue
        images -= 1
        picture.thumbnail((2 * _SHEET_PIXELS, 2 * _SHEET_PIXELS))
        yield SheetItem(picture, raw.key, raw.caption or "", _labels(raw, nouns, Counter()))


def print_statistics(console: Console, found: dict[str, Any]) -> None:
    """The result of :func:`compute_statistics` as tables."""
    title = f"{counted(found['samples'], 'sample')}, {found['samples_read']:,} of them read"
    sizes = Table(title=title, title_justify="left")
    for column in ("", "min", "25 %", "median", "75 %", "max"):
        sizes.add_column(column, justify="right" if column else "left", no_wrap=True)
    per_image = found["labels_per_image"]
    for name, numbers in (
        ("width", found["widths"]),
        ("height", found["heights"]),
        ("bytes per image", found["bytes"]),
        ("words per caption", found["words"]),
        ("labels per image", _quartiles(list(Counter(per_image).elements()))),
    ):
        if numbers:
            sizes.add_row(name, *(f"{value:,.0f}" for value in numbers.values()))
    console.print(sizes)
    formats, labels = by_kind(found["formats"]) or "no image can be read", found["labels"]
    console.print(f"Formats: {formats}. Given labels: {labels['given']:,}.", highlight=False)
    if found["skipped"]:
        console.print(f"Not used: {by_kind(found['skipped'])}.", style="red", highlight=False)
    _print_bars(console, "Labels per image", [(str(n), count) for n, count in per_image.items()])
    _print_bars(console, f"Most frequent of {labels['distinct']:,} labels", labels["most_frequent"])


def _print_bars(console: Console, title: str, rows: Sequence[tuple[str, int]]) -> None:
    table = Table("", "", "", title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.columns[0].justify = table.columns[1].justify = "right"
    most = max((count for _, count in rows), default=0)
    for name, count in rows:
        table.add_row(escape(printable(name)), f"{count:,}", Bar(most, 0, count, width=40, color="cyan"))
    if rows:
        console.print(table)
