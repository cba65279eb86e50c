"""`nxtp predict`, `nxtp classify`: images, directories, shards, names on a pipe → labels in a table, or as rows."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nxtp.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from nxtp.inference.figures import AttentionItem, GridItem
    from nxtp.inference.recognizer import Recognizer
    from nxtp.inference.streaming import Prediction, Source
    from nxtp.sampling.ranking import Labels

_GRID_PIXELS = 256  # a picture's shorter side in the grid, at least
_MOST_BYTES = 1 << 28  # of an image on standard input; what is longer is cut off, and told as such
_AS_IT_IS = {"markup": False, "highlight": False, "soft_wrap": True}  # how rich prints names and messages
_A_PATH = click.Path(path_type=Path, dir_okay=False)
_COMMON = (
    click.argument("images", nargs=-1),
    click.option("--model", required=True, help="A model directory or hub name."),
    click.option("--top-k", type=click.IntRange(min=1), default=10, show_default=True, help="Labels an image."),
    click.option("--out", type=_A_PATH, help="Write a .jsonl or .parquet file; stopped, the same command goes on."),
    click.option("--overwrite", is_flag=True, help="Replace what --out left or made before."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object an image, a line each, on standard output."),
    click.option("--stdin", is_flag=True, help="Names of images and directories come on standard input, a line each."),
    click.option("--null", is_flag=True, help="With --stdin: names end with a NUL byte (find -print0)."),
    click.option("--grid", type=_A_PATH, help="Also save a picture of the first 12."),
    click.option("--attention", type=_A_PATH, help="Save where the first 6's labels look."),
    click.option("--block", type=int, help="Attention of this decoder block; else the mean over all."),
    click.option("--head", type=int, help="Attention of this head; else the mean over all."),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Images at once."),
    click.option("--workers", type=click.IntRange(min=1), help="Threads that read and decode; by default one a core."),
    click.option("--cache-dir", type=click.Path(file_okay=False), help="Where remote shards are kept."),
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
def predict(images, model, top_k, device, sampler, ranking, allowed, **given):
    """Labels of IMAGES, most probable first: files, directories, shards, or - for one image on standard input.

    \b
    nxtp predict photo.jpg pictures/ --model DIR
    nxtp predict 'data/shards/cc3m/{00000..00331}.tar' --model DIR --out labels.parquet
    find . -name '*.jpg' | nxtp predict --stdin --model DIR --json

    An image that cannot be used is told in a line, the others are done, and the exit code is 1.
    """
    from nxtp.inference.recognizer import Recognizer
    from nxtp.sampling.closed_vocabulary import read_classes
    from nxtp.sampling.ranking import ranking_config
    from nxtp.sampling.samplers import sampler_config

    how = sampler_config(sampler), ranking_config(ranking)
    classes = read_classes(allowed) if allowed else None
    settings = {"command": "predict", "top_k": top_k, "allowed": _hash_of(classes)}
    settings |= {"sampler": asdict(how[0]), "ranking": asdict(how[1])}
    recognizer = Recognizer.from_pretrained(model, device=device)
    only = recognizer.vocabulary(classes) if classes else None
    score = "probability" if ranking == "prob" else "score"

    def label(pixels: Tensor) -> list[Labels]:
        return recognizer.predict_pixels(pixels, top_k, *how, only)

    _answer(images, recognizer, label, score, settings | {"model": _identity(model)}, **given)


@click.command()
@_of_images
@click.option("--labels", required=True, help="A file, a class a line, its names separated by commas; or imagenet1k.")
def classify(images, model, top_k, device, labels, **given):
    """The given labels' probabilities for each of IMAGES, most probable first.

    \b
    nxtp classify photo.jpg --model DIR --labels animals.txt
    nxtp classify pictures/ --model DIR --labels imagenet1k --top-k 5 --out labels.jsonl

    imagenet1k takes all names of its 1,000 classes, imagenet1k:first their first, imagenet1k:clip CLIP's. IMAGES are
    files, directories, shards, or - for one image on standard input; one that cannot be used is told in a line, the
    others are done, and the exit code is 1.
    """
    from nxtp.inference.recognizer import Recognizer
    from nxtp.sampling.closed_vocabulary import read_classes

    classes = read_classes(labels)
    settings = {"command": "classify", "top_k": top_k, "labels": _hash_of(classes)}
    recognizer = Recognizer.from_pretrained(model, device=device)
    known = recognizer.vocabulary(classes)

    def label(pixels: Tensor) -> list[Labels]:
        return recognizer.classify_pixels(pixels, known, top_k)

    _answer(images, recognizer, label, "probability", settings | {"model": _identity(model)}, **given)


def _identity(model: str) -> str:
    """The fingerprint of a model's weights: the same model under another name is the same."""
    from nxtp.inference import model_directory as model_dir

    files = model_dir.read_config(model_dir.locate(model)).get("files") or {}
    return f"sha256:{(files.get(model_dir.WEIGHTS) or {}).get('sha256', model)[:16]}"


def _hash_of(classes: Sequence[Sequence[str]] | None) -> str | None:
    return classes and f"sha256:{hashlib.sha256(json.dumps(classes).encode()).hexdigest()[:16]}"


def _answer(
    images: Sequence[str],
    recognizer: Recognizer,
    label: Callable[[Tensor], list[Labels]],
    score: str,
    settings: dict[str, Any],
    *,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    stdin: bool,
    null: bool,
    batch_size: int,
    workers: int | None,
    cache_dir: str | None,
    **pictures,
) -> None:
    """Print or write ``label``'s answers, and end the process with the exit code."""
    from rich.console import Console

    from nxtp.errors import printable
    from nxtp.inference.figures import print_labels
    from nxtp.inference.streaming import WORKERS, answers
    from nxtp.inference.writer import AnswerFile, json_line, row_of

    drawn = _Pictures(recognizer, **pictures)
    source = _source(images, stdin, null, cache_dir)
    file = AnswerFile(out, settings, score, overwrite) if out else None
    if file:
        source = replace(source, items=file.left(iter(source.items)))
    console, err = Console(), Console(stderr=True)
    done = file.count if file else 0
    failed = bool(file and file.failed)
    ahead = batch_size if stdin else None  # one who writes a name and waits for the answer gets it
    try:
        with _progress(err, source.count, done, shown=bool(file)) as advance:
            for answer in answers(source, label, recognizer.transform, batch_size, workers or WORKERS, ahead):
                advance()
                if answer.error is not None:
                    failed = True
                    err.print(f"error: {printable(answer.item.name)}: {answer.error}", style="red", **_AS_IT_IS)
                if file:
                    file.add(answer)
                elif as_json:
                    click.echo(json_line(row_of(answer, score)))
                elif answer.error is None:
                    print_labels(console, printable(answer.item.name), answer.labels)
                if answer.error is None:
                    drawn.add(answer)
        if file:
            file.finish()
            err.print(file.summary(), **_AS_IT_IS)
    except KeyboardInterrupt:
        if file:
            err.print(f"Stopped after {file.count:,}; the same command goes on from {file.partial}.", **_AS_IT_IS)
        raise
    finally:
        if file:
            file.close()
    drawn.save()
    sys.exit(1 if failed else 0)


def _source(images: Sequence[str], stdin: bool, null: bool, cache_dir: str | None) -> Source:
    from nxtp.inference.streaming import Item, Source

    pipe = click.get_binary_stream("stdin")
    if stdin:
        if images:
            raise UserError("--stdin: the names come on standard input; leave IMAGES out.")
        return Source.named_on(pipe, b"\0" if null else b"\n")
    if null:
        raise UserError("--null goes with --stdin.")
    if not images:
        raise UserError("No images: name files, directories or shards, - for an image on standard input, or --stdin.")
    if "-" not in images:
        return Source.all_of(images, cache_dir)
    if len(images) > 1:
        raise UserError("'-' is one image on standard input; it cannot be mixed with others.")
    content = pipe.read(_MOST_BYTES)
    return Source([Item("-", lambda: content)], 1)


@contextmanager
def _progress(console: Console, total: int | None, done: int, shown: bool) -> Iterator[Callable[[], None]]:
    """What is to be called after each image. Nothing is shown where standard error is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("Images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda: progress.advance(task)


class _Pictures:
    """What --grid and --attention show, gathered on the way."""

    def __init__(
        self, recognizer: Recognizer, grid: Path | None, attention: Path | None, block: int | None, head: int | None
    ):
        for option, path in (("--grid", grid), ("--attention", attention)):
            if path and not path.parent.is_dir():
                raise UserError(f"{option} {path}: there is no directory {path.parent}.")
        self.recognizer, self.grid, self.attention, self.block, self.head = recognizer, grid, attention, block, head
        self.shown: list[GridItem] = []
        self.looked: list[AttentionItem] = []

    def add(self, answer: Prediction) -> None:
        from nxtp.inference.figures import GridItem

        if self.grid and len(self.shown) < 12:
            picture = self._image(answer)
            picture.thumbnail((2 * _GRID_PIXELS, 2 * _GRID_PIXELS))
            self.shown.append(GridItem(picture, [], answer.labels))
        if self.attention and len(self.looked) < 6:
            self.looked.append(self._look(answer))

    def save(self) -> None:
        from nxtp.inference.figures import save_attention, save_grid

        for path, save, items in ((self.grid, save_grid, self.shown), (self.attention, save_attention, self.looked)):
            if path and items:
                save(path, items)
                click.echo(f"Picture: {path}", err=True)

    def _image(self, answer: Prediction):
        from nxtp.data.images import load_image

        return load_image(answer.item.read(), near=_GRID_PIXELS)

    def _look(self, answer: Prediction) -> AttentionItem:
        """The part of a picture that the model sees, and where its first labels look."""
        from PIL import Image

        from nxtp.data.transforms import to_pixels
        from nxtp.inference.figures import AttentionItem
        from nxtp.model.attention import average

        shown = to_pixels(self._image(answer), _GRID_PIXELS)
        pixels = self.recognizer.transform(answer.item.read())
        labels = [label for label, _ in answer.labels[:5]]
        maps = [(name, average(self.recognizer.attention(pixels, name), self.block, self.head)) for name in labels]
        return AttentionItem(Image.fromarray(shown.permute(1, 2, 0).numpy()), [(n, m.numpy()) for n, m in maps])
