"""`nxtp predict`, `nxtp classify`: images and directories → labels with probability bars, or one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from nxtp.images import ImageError
    from nxtp.recognizer import Labels, Recognizer
    from nxtp.show import AttentionItem

_GRID_PIXELS = 256  # a picture's shorter side in the grid, at least
_COMMON = (
    click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path)),
    click.option("--model", required=True, help="A model directory or hub name."),
    click.option("--top-k", type=click.IntRange(min=1), default=10, show_default=True, help="Labels an image."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object an image, a line each, on standard output."),
    click.option(
        "--grid", type=click.Path(path_type=Path, dir_okay=False), help="Also save a picture of the first 12."
    ),
    click.option(
        "--attention", type=click.Path(path_type=Path, dir_okay=False), help="Save where the first 6's labels look."
    ),
    click.option("--block", type=int, help="Attention of this decoder block; else the mean over all."),
    click.option("--head", type=int, help="Attention of this head; else the mean over all."),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Images at once."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …"),
)


def _of_images(command: Callable) -> Callable:
    for decorate in reversed(_COMMON):
        command = decorate(command)
    return command


@click.command()
@_of_images
@click.option("--sampler", default="one_shot", show_default=True, help="one_shot, exact, greedy or beam.")
@click.option("--ranking", default="prob", show_default=True, help="prob, ppl, sim_mean, sim_max, clip or none.")
@click.option("--allowed", help="Only labels of this file (a label a line) or of imagenet1k may come out.")
def predict(images, model, top_k, device, sampler, ranking, allowed, **shown):
    """Labels of IMAGES (files and directories), most probable first.

    A file that cannot be read is told in a line, the others are done, and the exit code is 1.
    """
    from nxtp.ranking import ranking_config
    from nxtp.recognizer import Recognizer
    from nxtp.samplers import sampler_config
    from nxtp.vocabulary import read_classes

    how = sampler_config(sampler), ranking_config(ranking)
    classes = read_classes(allowed) if allowed else None
    recognizer = Recognizer.from_pretrained(model, device=device)
    only = recognizer.vocabulary(classes) if classes else None
    score = "probability" if ranking == "prob" else "score"

    def label(pixels: Tensor) -> list[Labels]:
        return recognizer.predict_pixels(pixels, top_k, *how, only)

    _answer(images, recognizer, label, score, **shown)


@click.command()
@_of_images
@click.option("--labels", required=True, help="A file, a class a line, its names separated by commas; or imagenet1k.")
def classify(images, model, top_k, device, labels, **shown):
    """The given labels' probabilities for each of IMAGES (files and directories), most probable first.

    \b
    nxtp classify photo.jpg --model DIR --labels animals.txt
    nxtp classify pictures/ --model DIR --labels imagenet1k --top-k 5 --json

    imagenet1k takes all names of its 1,000 classes, imagenet1k:first their first, imagenet1k:clip CLIP's. A file that
    cannot be read is told in a line, the others are done, and the exit code is 1.
    """
    from nxtp.recognizer import Recognizer
    from nxtp.vocabulary import read_classes

    classes = read_classes(labels)
    recognizer = Recognizer.from_pretrained(model, device=device)
    known = recognizer.vocabulary(classes)

    def label(pixels: Tensor) -> list[Labels]:
        return recognizer.classify_pixels(pixels, known, top_k)

    _answer(images, recognizer, label, "probability", **shown)


def _answer(
    images: Sequence[Path],
    recognizer: Recognizer,
    label: Callable[[Tensor], list[Labels]],
    score: str,
    *,
    as_json: bool,
    grid: Path | None,
    attention: Path | None,
    block: int | None,
    head: int | None,
    batch_size: int,
) -> None:
    """Print ``label``'s answers, and end the process with the exit code."""
    import torch
    from rich.console import Console

    from nxtp.images import ImageError, find_images, load_image, printable
    from nxtp.pixels import to_pixels
    from nxtp.recognizer import batches
    from nxtp.show import GridItem, print_labels, save_attention, save_grid

    found, problems = find_images(images)
    shown: list[GridItem] = []
    looked: list[AttentionItem] = []
    console = Console()
    failed = 0

    def report(error: ImageError) -> None:
        nonlocal failed
        failed += 1
        if as_json:
            _echo_json({"image": error.name, "error": error.reason})
        click.secho(f"error: {error}", fg="red", err=True)

    def pixels_of(path: Path):
        try:
            return to_pixels(load_image(path, near=recognizer.image_size), recognizer.image_size)
        except ImageError as error:
            return error

    for problem in problems:
        report(problem)
    with ThreadPoolExecutor() as pool:
        for paths in batches(found, batch_size):
            loaded = list(pool.map(pixels_of, paths))
            good = [pixels for pixels in loaded if not isinstance(pixels, ImageError)]
            predicted = iter(label(torch.stack(good)) if good else [])
            for path, pixels in zip(paths, loaded, strict=True):
                if isinstance(pixels, ImageError):
                    report(pixels)
                    continue
                ranked = next(predicted)
                if as_json:
                    rows = [{"label": name, score: value} for name, value in ranked]
                    _echo_json({"image": str(path), "labels": rows})
                else:
                    print_labels(console, printable(path), ranked)
                if grid and len(shown) < 12:
                    picture = load_image(path, near=_GRID_PIXELS)
                    picture.thumbnail((2 * _GRID_PIXELS, 2 * _GRID_PIXELS))
                    shown.append(GridItem(picture, [], ranked))
                if attention and len(looked) < 6:
                    looked.append(_look(recognizer, path, ranked, block, head))
    if grid and shown:
        save_grid(grid, shown)
        click.echo(f"Picture: {grid}", err=True)
    if attention and looked:
        save_attention(attention, looked)
        click.echo(f"Picture: {attention}", err=True)
    sys.exit(1 if failed else 0)


def _look(recognizer: Recognizer, path: Path, ranked: Labels, block: int | None, head: int | None) -> AttentionItem:
    """The part of a picture that the model sees, and where its first labels look."""
    from PIL import Image

    from nxtp.attention import average
    from nxtp.images import load_image
    from nxtp.pixels import to_pixels
    from nxtp.show import AttentionItem

    pixels = to_pixels(load_image(path, near=_GRID_PIXELS), _GRID_PIXELS)
    labels = [label for label, _ in ranked[:5]]
    maps = [(label, average(recognizer.attention(path, label), block, head).numpy()) for label in labels]
    return AttentionItem(Image.fromarray(pixels.permute(1, 2, 0).numpy()), maps)


def _echo_json(row: dict[str, Any]) -> None:
    """One line of JSON; a file name that is not Unicode is written in escapes, which readers turn back into it."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    click.echo(line)
