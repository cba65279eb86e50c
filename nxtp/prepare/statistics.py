"""Statistics of a set of shards: sizes, formats, labels, what cannot be used; and samples to look at."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from nxtp.data.images import ImageError, load_image
from nxtp.data.labels.from_samples import labels_of
from nxtp.data.labels.nouns import NounBackend
from nxtp.data.mixture import OpenedSet
from nxtp.data.shards.reader import RawSample, SampleFault
from nxtp.errors import by_kind, counted, printable
from nxtp.inference.figures import SheetItem, bar

_SHEET_PIXELS = 224


@dataclass
class SetStatistics:
    """Statistics of the ``samples_read`` samples that were read, of all ``samples`` of a set."""

    samples: int = 0
    samples_read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    labels_per_image: Counter[int] = field(default_factory=Counter)  # number of labels → images
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)  # of each image
    words: list[int] = field(default_factory=list)  # of each caption
    formats: Counter[str] = field(default_factory=Counter)
    given: int = 0  # samples with labels of their own

    def as_json(self, top: int) -> dict[str, Any]:
        labels = {"distinct": len(self.labels), "given": self.given, "most_frequent": self.most_frequent(top)}
        return {
            "samples": self.samples,
            "samples_read": self.samples_read,
            "skipped": dict(self.skipped),
            "labels": labels,
            "labels_per_image": dict(sorted(self.labels_per_image.items())),
            "formats": dict(self.formats),
            **{name: quartiles(getattr(self, name)) for name in ("widths", "heights", "bytes", "words")},
        }

    def most_frequent(self, top: int) -> list[tuple[str, int]]:
        return sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))[:top]


def compute_statistics(opened: OpenedSet, nouns: NounBackend, limit: int | None = None) -> SetStatistics:
    """Read the headers and texts of up to ``limit`` samples spread evenly over the set; images are not decoded."""
    shards = opened.shards
    result = SetStatistics(samples=len(shards), skipped=Counter(shards.skipped))
    count = min(limit or len(shards), len(shards))
    positions = np.unique(np.linspace(0, len(shards) - 1, count, dtype=np.int64))
    for position in track(positions.tolist(), "reading", console=Console(stderr=True), transient=True):
        result.samples_read += 1
        try:
            raw = shards.read(position)
            with Image.open(io.BytesIO(raw.image)) as header:
                width, height, kind = *header.size, header.format
        except Exception as error:  # Pillow raises nearly any type on damaged files
            result.skipped[error.kind if isinstance(error, SampleFault) else "bad image"] += 1
            continue
        result.widths.append(width)
        result.heights.append(height)
        result.bytes.append(len(raw.image))
        result.formats[kind] += 1
        result.given += raw.labels is not None
        if raw.caption is not None:
            result.words.append(len(raw.caption.split()))
        labels = _labels(raw, nouns, result.skipped)
        result.labels.update(labels)
        result.labels_per_image[len(labels)] += 1
    return result


def _labels(raw: RawSample, nouns: NounBackend, skipped: Counter[str]) -> list[str]:
    try:
        return labels_of(raw, nouns)
    except SampleFault as fault:
        skipped[fault.kind] += 1
        return []


def sheet_items(opened: OpenedSet, nouns: NounBackend, images: int, seed: int) -> Iterator[SheetItem]:
    """Up to ``images`` randomly chosen samples that can be shown."""
    for position in np.random.default_rng(seed).permutation(len(opened)):
        if images == 0:
            return
        try:
            raw = opened.shards.read(int(position))
            picture = load_image(raw.image, near=_SHEET_PIXELS)
        except (SampleFault, ImageError):
            continue
        images -= 1
        picture.thumbnail((2 * _SHEET_PIXELS, 2 * _SHEET_PIXELS))
        yield SheetItem(picture, raw.key, raw.caption or "", _labels(raw, nouns, Counter()))


def quartiles(values: Sequence[int]) -> dict[str, float] | None:
    """Smallest, quartiles and largest; None without values."""
    if not values:
        return None
    quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return dict(zip(("min", "lower", "median", "upper", "max"), quantiles, strict=True))


def print_statistics(console: Console, found: SetStatistics, top: int) -> None:
    """Tables of sizes, of the number of labels per image, and of the ``top`` most frequent labels."""
    sizes = Table(
        title=f"{counted(found.samples, 'sample')}, {found.samples_read:,} of them read", title_justify="left"
    )
    for column in ("", "min", "25 %", "median", "75 %", "max"):
        sizes.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, values in (
        ("width", found.widths),
        ("height", found.heights),
        ("bytes per image", found.bytes),
        ("words per caption", found.words),
        ("labels per image", list(found.labels_per_image.elements())),
    ):
        if numbers := quartiles(values):
            sizes.add_row(name, *(f"{value:,.0f}" for value in numbers.values()))
    console.print(sizes)
    formats = ", ".join(f"{kind} × {n:,}" for kind, n in found.formats.most_common())
    console.print(f"Formats: {formats or 'no image can be read'}. Given labels: {found.given:,}.", highlight=False)
    if found.skipped:
        console.print(f"Cannot be used: {by_kind(found.skipped)}.", style="red", highlight=False)
    _print_bars(console, "Labels per image", [(str(n), count) for n, count in sorted(found.labels_per_image.items())])
    _print_bars(console, f"Most frequent of {len(found.labels):,} labels", found.most_frequent(top))


def _print_bars(console: Console, title: str, rows: Sequence[tuple[str, int]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    for justify, style in (("right", None), ("right", None), ("left", "cyan")):
        table.add_column(justify=justify, style=style, no_wrap=style is not None)
    most = max(count for _, count in rows)
    for name, count in rows:
        table.add_row(escape(printable(name)), f"{count:,}", bar(count / most, 40))
    console.print(table)
