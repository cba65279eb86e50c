"""Pictures of images with their labels: prediction grids, attention maps, contact sheets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len

from nxtp.data.labels.cleaning import normalise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIT, MISS, PLAIN = "#0072b2", "#d55e00", "#56789a"  # distinct for colour-blind eyes (Okabe and Ito)
HEAT = 0.6  # how much of an overlay is attention, the rest is the image
COARSE = 7  # fewer rows of image tokens than this do not show where an object is
_CAPTION: dict[str, Any] = {"size": 8.5}
_LABELS: dict[str, Any] = {"size": 9, "weight": "bold"}
_TITLE: dict[str, Any] = {"size": 14, "weight": "bold"}
_GRID_TITLE: dict[str, Any] = {"size": 15, "weight": "bold"}
_LEGEND: dict[str, Any] = {"size": 11}
_IMAGE_TITLE: dict[str, Any] = {"color": "#333333", "pad": 3, "size": 9.5}


class GridItem(NamedTuple):
    """An image, its true labels (empty: unknown), its predictions as (label, probability), the attention map
    [rows, columns] of the first of them, if it is to be shown, and the name to show in place of true labels."""

    image: Image.Image
    truth: Sequence[str]
    predictions: Sequence[tuple[str, float]]
    weights: np.ndarray | None = None
    name: str = ""


class AttentionItem(NamedTuple):
    """A square image, the attention map of each label as (label, probability, [rows, columns]), and its name."""

    image: Image.Image
    maps: Sequence[tuple[str, float, np.ndarray]]
    name: str = ""


class SheetItem(NamedTuple):
    """An image with its key, caption and labels."""

    image: Image.Image
    key: str
    caption: str
    labels: Sequence[str]


def save_grid(
    path: Path | str | BinaryIO, items: Sequence[GridItem], *, top: int = 5, what: str = "predicted labels"
) -> None:
    """A PNG of images, each with its attention map, its true labels and its ``top`` predictions as bars: hits blue,
    misses orange. ``what`` predictions are, for the title."""
    looks = any(item.weights is not None for item in items)
    most = max((len(item.predictions) for item in items), default=top)
    title = f"Top-{min(top, most)} {what} with their probabilities" if most else f"No {what}"
    legend = "blue: among the true labels · orange: not" if any(item.truth for item in items) else ""
    top = max(3, min(top, most))  # bars of fewer labels are as high as an image, too
    panels = [1, 1, 1.25] if looks else [1, 1.25]
    columns, side = (1, max(2.05, 0.2 * top)) if looks else (_columns(len(items), 4), 2.05)  # inches of an image
    rows = -(-len(items) // columns)
    figure = new_figure(0.89 * side * sum(panels) * columns, 1)
    width = _width(figure, title, _GRID_TITLE)
    size = min(15, 15 * 0.97 * figure.bbox.width / width)
    beside = width + _width(figure, legend, _LEGEND) < 0.94 * figure.bbox.width  # else the legend is below the title
    head = 0.62 if beside or not legend else 0.87
    height = side * rows + 0.13 + head  # margins are fractions of it
    figure.set_size_inches(figure.get_figwidth(), height)
    margins = {"left": 0.01, "right": 0.985, "top": 1 - head / height, "bottom": 0.12 / height}
    grid = figure.add_gridspec(rows, columns, **margins, wspace=0.08, hspace=0.45 / side)
    for index, item in enumerate(items):
        cell = grid[index].subgridspec(1, len(panels), width_ratios=panels, wspace=0.04)
        _draw_image(figure.add_subplot(cell[0]), item.image, ", ".join(item.truth) or item.name, is_name=not item.truth)
        if item.weights is not None and item.predictions:
            _draw_image(figure.add_subplot(cell[1]), overlay(item.image, item.weights), item.predictions[0][0])
        _draw_bars(figure.add_subplot(cell[-1], box_aspect=1 / panels[-1]), item, top)
    for axes in figure.axes:
        axes.set_anchor("N")  # names of a row are at one height
    figure.text(0.012, 1 - 0.3 / height, title, **_GRID_TITLE | {"size": size})
    place = {"x": 0.985, "ha": "right"} if beside else {"x": 0.012}
    figure.text(y=1 - (0.3 if beside else 0.55) / height, s=legend, color="#555555", **place, **_LEGEND)
    save_figure(figure, path)


def overlay(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """An image blended with its attention [rows, columns], brightest where it is highest; patches are not smoothed.

    Fewer than ``COARSE`` rows: a line in the picture says that the grid is too coarse.
    """
    heat = heat_map(weights).resize(image.size, Image.Resampling.NEAREST)
    blended = Image.blend(image, heat, HEAT)
    if len(weights) < COARSE:
        size = blended.width / 17
        place, font = (blended.width / 2, blended.height - size / 2), ImageFont.load_default(size)
        text = f"only {len(weights)} by {len(weights[0])} tokens: too coarse"
        options: dict[str, Any] = {"fill": "white", "stroke_width": 2, "stroke_fill": "black"}
        ImageDraw.Draw(blended).text(place, text, anchor="mb", font=font, **options)
    return blended


def heat_map(weights: np.ndarray) -> Image.Image:
    """Attention [rows, columns] as colours, a pixel per patch."""
    from matplotlib import colormaps

    shares = weights / max(float(weights.max()), 1e-12)
    return Image.fromarray((colormaps["inferno"](shares)[..., :3] * 255).astype(np.uint8))


def save_attention(path: Path | str | BinaryIO, items: Sequence[AttentionItem]) -> None:
    """A PNG with one row per image: the image, then the image under the attention of each label."""
    columns = 1 + max(len(item.maps) for item in items)
    height = 2.35 * len(items) + 0.6
    figure = new_figure(2.1 * columns, height)
    margins = {"left": 0.01, "right": 0.99, "top": 1 - 0.75 / height, "bottom": 0.05 / height}
    grid = figure.add_gridspec(len(items), columns, **margins, wspace=0.05, hspace=0.2)
    for row, item in enumerate(items):
        _draw_image(figure.add_subplot(grid[row, 0]), item.image, item.name, is_name=True)
        for column, (label, probability, weights) in enumerate(item.maps, start=1):
            seen = overlay(item.image, weights)
            _draw_image(figure.add_subplot(grid[row, column]), seen, label, f" {probability:.2f}")
    figure.text(0.012, 1 - 0.32 / height, "Where each label is seen", **_TITLE)
    save_figure(figure, path)


def save_contact_sheet(path: Path | str, items: Sequence[SheetItem], *, title: str) -> None:
    """A PNG of images, each with its key, its caption on two lines, and its labels."""
    columns = max(3, _columns(len(items), 6))
    rows = max(1, -(-len(items) // columns))
    missing = "no caption" if any(item.caption for item in items) else ""  # sets of classes have none
    figure = new_figure(2.5 * columns, 1)
    side = 0.98 * 2.5 / (1.08 - 0.08 / columns)  # inches of an image
    texts = [
        [_fitted(figure, text, side * figure.dpi, font) for text, font in ((caption, _CAPTION), (labels, _LABELS))]
        for caption, labels in ((item.caption or missing, " · ".join(item.labels) or "no label") for item in items)
    ]
    below = [6 + 10.5 * (1 + caption.count("\n")) * bool(caption) for caption, _ in texts]  # points: where labels begin
    room = max((y + 12 * (1 + labels.count("\n")) for y, (_, labels) in zip(below, texts, strict=True)), default=0) / 72
    height = 0.75 + rows * (side + room) + 0.3 * (rows - 1) + 0.1
    figure.set_size_inches(2.5 * columns, height)
    margins = {"left": 0.01, "right": 0.99, "top": 1 - 0.75 / height, "bottom": (0.1 + room) / height}
    grid = figure.add_gridspec(rows, columns, **margins, wspace=0.08, hspace=(0.3 + room) / side)
    for index, (item, (caption, labels), y) in enumerate(zip(items, texts, below, strict=True)):
        axes = figure.add_subplot(grid[index])
        _draw_image(axes, item.image, item.key, is_name=True, size=7.5, color="#777777")
        axes.set_anchor("S")  # the captions of a row begin at one height
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "parse_math": False}
        place |= {"ha": "center", "va": "top", "annotation_clip": False}
        colour = "#222222" if item.caption else "#999999"
        axes.annotate(caption, (0.5, 0), (0, -4), color=colour, **_CAPTION, **place)
        axes.annotate(labels, (0.5, 0), (0, -y), color=HIT if item.labels else MISS, **_LABELS, **place)
    while len(title) > 20 and _width(figure, title, _TITLE) > 0.97 * figure.bbox.width:
        title = "…" + title[6:]  # the end of a long path says more
    figure.text(0.012, 1 - 0.32 / height, title, parse_math=False, **_TITLE)
    save_figure(figure, path)


def _columns(count: int, most: int) -> int:
    """One row if that has room, else as many as leave the fewest places of the last row empty."""
    return count if count <= most else min(range(most, most // 2, -1), key=lambda columns: -count % columns)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _fitted(figure: Figure, text: str, room: float, font: dict[str, Any]) -> str:
    """``text`` on two lines, each at most ``room`` pixels wide."""
    for width in range(36, 5, -1):
        lines = _lines(text, 2, width)
        if all(_width(figure, line, font) <= room for line in lines.split("\n")):
            break
    return lines


def _width(figure: Figure, text: str, font: dict[str, Any]) -> float:
    """In pixels."""
    from matplotlib.font_manager import FontProperties

    with _missing_glyphs_are_boxes():
        renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # of the Agg canvas
        return renderer.get_text_width_height_descent(text, FontProperties(**font), False)[0]


def _lines(text: str, count: int, width: int = 36) -> str:
    wide = sum(cell_len(letter) - 1 for letter in text[: width * count] if cell_len(letter) > 1)
    width = max(6, width - -(-wide // count))  # a Chinese letter is as wide as two others
    lines = wrap(text, width)
    if len(lines) > count:
        lines = [*lines[: count - 1], _short(" ".join(lines[count - 1 :]), width)]
    return "\n".join(lines)


def save_figure(figure: Figure, path: Path | str | BinaryIO) -> None:
    with _missing_glyphs_are_boxes():
        figure.savefig(path, format="png")


@contextmanager
def _missing_glyphs_are_boxes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def _draw_image(
    axes: Axes, image: Image.Image, title: str = "", end: str = "", *, is_name: bool = False, **style: Any
) -> None:
    """With a title that is cut to the width there is, before its ``end``; a file's name loses its beginning."""
    axes.imshow(image, interpolation="antialiased")
    axes.set_axis_off()
    style = _IMAGE_TITLE | style
    figure: Any = axes.figure
    room = axes.get_position(original=True).width * figure.bbox.width
    length, shown = min(len(title), 60), ""
    while length > 0:
        shown = (f"…{title[1 - length :]}" if is_name and len(title) > length else _short(title, length)) + end
        if _width(figure, shown, {"size": style["size"]}) <= room:
            break
        length -= 1
    axes.set_title(shown, parse_math=False, **style)


def _draw_bars(axes: Axes, item: GridItem, top: int) -> None:
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
