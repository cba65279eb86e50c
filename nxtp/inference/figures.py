"""What people look at: labels with probability bars in the terminal, and a picture grid of images with labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import BinaryIO, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.gridspec import GridSpecFromSubplotSpec
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nxtp.data.labels.cleaning import normalise

HIT, MISS, PLAIN = "#0072b2", "#d55e00", "#56789a"  # distinct for colour-blind eyes (Okabe and Ito)
_CAPTION = FontProperties(size=8.5)
_LABELS = FontProperties(size=9, weight="bold")
_TITLE = FontProperties(size=14, weight="bold")
_BLOCKS = " ▏▎▍▌▋▊▉█"


class GridItem(NamedTuple):
    """One cell: an image, its true labels (none: not known), its predictions as (label, probability)."""

    image: Image.Image
    truth: Sequence[str]
    predictions: Sequence[tuple[str, float]]


class AttentionItem(NamedTuple):
    """One row: a square image, and for each label its attention [rows, columns] on it."""

    image: Image.Image
    maps: Sequence[tuple[str, np.ndarray]]


class SheetItem(NamedTuple):
    """One cell of a contact sheet: an image with its key, caption and labels."""

    image: Image.Image
    key: str
    caption: str
    labels: Sequence[str]


def bar(share: float, width: int) -> str:
    """A bar of eighths of a character: ``share`` in 0..1 of ``width`` characters."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    return "█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")


def print_labels(console: Console, title: str, labels: Sequence[tuple[str, float]]) -> None:
    """One image's labels as a table with probability bars, as wide as the terminal allows."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right", style="dim")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="cyan", no_wrap=True)
    width = max(10, min(40, console.width - 40))
    for rank, (label, probability) in enumerate(labels, start=1):
        table.add_row(str(rank), escape(label), f"{probability:.4f}", bar(probability, width))
    console.print(table)


def save_grid(
    path: Path | str | BinaryIO, items: Sequence[GridItem], *, columns: int = 4, top: int = 5, title: str = ""
) -> None:
    """A PNG: each image with its true labels and ``top`` predictions as bars: hits and misses in two colours."""
    rows = -(-len(items) // columns)
    figure = Figure(figsize=(4.1 * columns, 2.05 * rows + 0.75), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    # margins in inches, whatever the number of rows
    height = figure.get_figheight()
    outer = figure.add_gridspec(
        rows, columns, left=0.01, right=0.985, top=1 - 0.62 / height, bottom=0.12 / height, wspace=0.08, hspace=0.22
    )
    known = any(item.truth for item in items)
    for index, item in enumerate(items):
        cell = GridSpecFromSubplotSpec(1, 2, outer[index], width_ratios=[1, 1.25], wspace=0.04)
        _draw_image(figure.add_subplot(cell[0]), item)
        _draw_bars(figure.add_subplot(cell[1]), item, top)
    legend = "blue: among the true labels · orange: not" if known else ""
    figure.text(
        0.012,
        1 - 0.3 / height,
        title or f"Top-{top} predicted labels with their probabilities",
        fontsize=15,
        weight="bold",
    )
    figure.text(0.985, 1 - 0.3 / height, legend, fontsize=11, color="#555555", ha="right")
    _save(figure, path)


def overlaid(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """An image under its attention [rows, columns], the highest brightest; patches as they are, not smoothed."""
    shares = weights / max(float(weights.max()), 1e-12)
    heat = Image.fromarray((colormaps["inferno"](shares)[..., :3] * 255).astype(np.uint8))
    return Image.blend(image, heat.resize(image.size, Image.Resampling.NEAREST), 0.6)


def save_attention(path: Path | str | BinaryIO, items: Sequence[AttentionItem], *, title: str = "") -> None:
    """A PNG: a row each image, first as it is, then with each label's attention laid over it."""
    columns = 1 + max(len(item.maps) for item in items)
    figure = Figure(figsize=(2.1 * columns, 2.35 * len(items) + 0.6), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    outer = {"left": 0.01, "right": 0.99, "top": 1 - 0.75 / height, "bottom": 0.05 / height, "wspace": 0.05}
    grid = figure.add_gridspec(len(items), columns, hspace=0.2, **outer)
    for row, item in enumerate(items):
        for column, (label, weights) in enumerate([("", None), *item.maps]):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(item.image if weights is None else overlaid(item.image, weights), interpolation="antialiased")
            axes.set_axis_off()
            axes.set_title(_short(label, 24), fontsize=9.5, color="#333333", pad=3, parse_math=False)
    figure.text(0.012, 1 - 0.32 / height, title or "Where each label looks", fontproperties=_TITLE, parse_math=False)
    _save(figure, path)


def save_contact_sheet(path: Path | str, items: Sequence[SheetItem], *, columns: int = 6, title: str = "") -> None:
    """A PNG: each image with its key, its caption on two lines, and its labels."""
    rows = max(1, -(-len(items) // columns))
    figure = Figure(figsize=(2.5 * columns, 3.25 * rows + 0.6), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        rows, columns, left=0.01, right=0.99, top=1 - 0.75 / height, bottom=0.85 / height, wspace=0.08, hspace=0.48
    )
    for index, item in enumerate(items):
        axes = figure.add_subplot(grid[index])
        axes.imshow(item.image, interpolation="antialiased")
        axes.set_axis_off()
        axes.set_anchor("S")  # captions of a row begin at one height
        room = axes.get_position(original=True).width * figure.bbox.width
        axes.set_title(_short(item.key, 34), fontsize=7.5, color="#777777", pad=3, parse_math=False)
        caption = _fitted(figure, item.caption or "no caption", room, _CAPTION)
        labels = _fitted(figure, " · ".join(item.labels) or "no label", room, _LABELS)
        at = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
        at |= {"parse_math": False, "annotation_clip": False}
        colour = "#222222" if item.caption else "#999999"
        axes.annotate(caption, (0.5, 0), (0, -4), color=colour, fontproperties=_CAPTION, **at)
        under = -6 - 10.5 * (1 + caption.count("\n"))
        axes.annotate(labels, (0.5, 0), (0, under), color=HIT if item.labels else MISS, fontproperties=_LABELS, **at)
    while len(title) > 20 and _width(figure, title, _TITLE) > 0.97 * figure.bbox.width:
        title = "…" + title[6:]  # of a long path the end says more
    figure.text(0.012, 1 - 0.32 / height, title, fontproperties=_TITLE, parse_math=False)
    _save(figure, path)


def _fitted(figure: Figure, text: str, room: float, font: FontProperties) -> str:
    """``text`` on two lines that are at most ``room`` pixels wide."""
    for width in range(36, 5, -1):
        lines = _lines(text, 2, width)
        if all(_width(figure, line, font) <= room for line in lines.split("\n")):
            break
    return lines


def _width(figure: Figure, text: str, font: FontProperties) -> float:
    """In pixels."""
    with _missing_glyphs_are_boxes():
        return figure.canvas.get_renderer().get_text_width_height_descent(text, font, False)[0]


def _lines(text: str, count: int, width: int = 36) -> str:
    wide = sum(cell_len(letter) - 1 for letter in text[: width * count] if cell_len(letter) > 1)
    width = max(6, width - -(-wide // count))  # a Chinese letter is as wide as two others
    lines = wrap(text, width)
    if len(lines) > count:
        lines = [*lines[: count - 1], _short(" ".join(lines[count - 1 :]), width)]
    return "\n".join(lines)


def _save(figure: Figure, path: Path | str | BinaryIO) -> None:
    with _missing_glyphs_are_boxes():
        figure.savefig(path, format="png")


@contextmanager
def _missing_glyphs_are_boxes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def _draw_image(axes, item: GridItem) -> None:
    axes.imshow(item.image, interpolation="antialiased")
    axes.set_axis_off()
    if item.truth:
        axes.set_title(_short(", ".join(item.truth), 30), fontsize=9.5, color="#333333", pad=3, parse_math=False)


def _draw_bars(axes, item: GridItem, top: int) -> None:
    truth = {normalise(label) for label in item.truth}
    shown = list(item.predictions[:top])
    for place, (label, probability) in enumerate(shown):
        colour = (HIT if normalise(label) in truth else MISS) if truth else PLAIN
        axes.barh(place, 1.0, height=0.78, color="#eef1f4")
        axes.barh(place, probability, height=0.78, color=colour, alpha=0.55)
        axes.text(0.02, place, _short(label, 18), va="center", fontsize=10.5, color="#111111", parse_math=False)
        axes.text(0.98, place, f"{probability:.2f}", va="center", ha="right", fontsize=9.5, color="#444444")
    axes.set_xlim(0, 1)
    axes.set_ylim(top - 0.5, -0.5)
    axes.set_axis_off()


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
