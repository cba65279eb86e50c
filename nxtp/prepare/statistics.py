"""What a set of shards holds: sizes, formats, labels, what cannot be used, and samples to look at."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from nxtp.data.images import ImageError, load_image
from nxtp.data.labels.from_samples import labels_of
from nxtp.data.labels.nouns import NounBackend
from nxtp.data.mixture import OpenedSet
from nxtp.data.shards.reader import SampleError
from nxtp.inference.figures import SheetItem

SHEET_PIXELS = 224


@dataclass
class Survey:
    """What was found in the samples that were looked at."""

    samples: int = 0
    looked_at: int = 0
    skipped: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)  # number of labels an image → images
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)  # of each caption
    formats: Counter = field(default_factory=Counter)
    given: int = 0  # samples with labels of their own

    def as_json(self, top: int) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "looked_at": self.looked_at,
            "skipped": dict(self.skipped),
            "labels": {"distinct": len(self.labels), "given": self.given, "most_frequent": self.most_frequent(top)},
            "labels_an_image": dict(sorted(self.counts.items())),
            "formats": dict(self.formats),
            **{name: quartiles(getattr(self, name)) for name in ("widths", "heights", "bytes", "words")},
        }

    def most_frequent(self, top: int) -> list[tuple[str, int]]:
        return sorted(self.labels.items(), key=lambda item: (-item[1], item[0]))[:top]


def survey(opened: OpenedSet, nouns: NounBackend, limit: int | None = 10_000) -> Survey:
    """Read the headers and texts of up to ``limit`` samples spread evenly over the set; images are not decoded."""
    shards = opened.shards
    found = Survey(samples=len(shards), skipped=Counter(shards.skipped))
    count = min(limit or len(shards), len(shards))
    positions = np.unique(np.linspace(0, len(shards) - 1, count, dtype=np.int64))
    for position in track(positions.tolist(), "looking", console=Console(stderr=True), transient=True):
        found.looked_at += 1
        try:
            raw = shards.read(position)
            with Image.open(io.BytesIO(raw.image)) as header:
                width, height, kind = *header.size, header.format
        except SampleError as fault:
            found.skipped[fault.kind] += 1
            continue
        except Exception:  # Pillow raises nearly any type on damaged files
            found.skipped["bad image"] += 1
            continue
        found.widths.append(width)
        found.heights.append(height)
        found.bytes.append(len(raw.image))
        found.formats[kind] += 1
        found.given += raw.labels is not None
        if raw.caption is not None:
            found.words.append(len(raw.caption.split()))
        try:
            labels = labels_of(raw, nouns)
        except SampleError as fault:
            found.skipped[fault.kind] += 1
            found.counts[0] += 1
            continue
        found.labels.update(labels)
        found.counts[len(labels)] += 1
    return found


def sheet_items(opened: OpenedSet, nouns: NounBackend, images: int, seed: int) -> Iterator[SheetItem]:
    """Randomly chosen samples that can be shown."""
    shown = 0
    for position in np.random.default_rng(seed).permutation(len(opened)):
        if shown == images:
            return
        try:
            raw = opened.shards.read(int(position))
            picture = load_image(raw.image, near=SHEET_PIXELS)
        except (SampleError, ImageError):
            continue
        try:
            labels = labels_of(raw, nouns)
        except SampleError:
            labels = []
        picture.thumbnail((2 * SHEET_PIXELS, 2 * SHEET_PIXELS))
        shown += 1
        yield SheetItem(picture, raw.key, raw.caption or "", labels)


def quartiles(values: Sequence[int]) -> dict[str, float] | None:
    """Smallest, quartiles and largest; None of nothing."""
    if not values:
        return None
    names = ("min", "lower", "median", "upper", "max")
    return {name: float(np.quantile(values, share)) for name, share in zip(names, (0, 0.25, 0.5, 0.75, 1), strict=True)}
