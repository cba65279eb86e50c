"""`nxtp predict`, `nxtp classify`: images, directories, shards, names on a pipe → labels in a table, or as rows."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nxtp.errors import UserError, printable

if TYPE_CHECKING:
    from lightning import Fabric
    from rich.console import Console
    from torch import Tensor

    from nxtp.distributed.rendezvous import Ranks
    from nxtp.inference.figures import AttentionItem
    from nxtp.inference.recognizer import Recognizer
    from nxtp.inference.streaming import ImageSource, Prediction
    from nxtp.inference.writer import PredictionWriter
    from nxtp.sampling.closed_vocabulary import Vocabulary
    from nxtp.sampling.ranking import Labels

_GRID, _GRID_PIXELS = 12, 256  # images of --grid, and their shorter side
_ATTENTION, _ATTENTION_LABELS = 6, 5  # images of --attention, and labels of each
_MAX_BYTES = 1 << 28  # of an image on standard input
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}  # how rich prints names and messages
_FILE = click.Path(path_type=Path, dir_okay=False)
_PATIENCE = timedelta(days=30)  # ranks that resume need not have the same left to do
_COMMON = (
    click.argument("images", nargs=-1),
    click.option("--model", required=True, help="A model directory or hub name."),
    click.option("--top-k", type=click.IntRange(min=1), default=10, show_default=True, help="Labels per image."),
    click.option("--threshold", help="Labels of at least this probability; f1: the best F1 of expected counts."),
    click.option("--out", type=_FILE, help="Write a .jsonl or .parquet file. The same command resumes a stopped one."),
    click.option("--overwrite", is_flag=True, help="Replace the file of --out, finished or not."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object per image and line."),
    click.option("--stdin", is_flag=True, help="Read paths from standard input, one per line."),
    click.option("--null", is_flag=True, help="With --stdin: names end with a NUL byte (find -print0)."),
    click.option("--grid", type=_FILE, help=f"Save a picture of {_GRID} of the images with their labels."),
    click.option("--attention", type=_FILE, help=f"Save where each label is seen, in {_ATTENTION} of the images."),
    click.option("--block", type=int, help="Attention of this decoder block. Default: the mean of all."),
    click.option("--head", type=int, help="Attention of this head. Default: the mean of all."),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
    click.option("--workers", type=click.IntRange(min=1), help="Threads that read and decode. Default: one per core."),
    click.option("--cache-dir", type=click.Path(file_okay=False), help="Where remote shards are stored."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …"),
)


def _common_options(command: Callable) -> Callable:
    for decorate in reversed(_COMMON):
        command = decorate(command)
    return command


@click.command()
@_common_options
@click.option("--sampler", default="one_shot", show_default=True, help="one_shot, exact, greedy or beam.")
@click.option("--ranking", default="prob", show_default=True, help="prob, ppl, sim_mean, sim_max, clip or none.")
@click.option("--classes", help="Write only these labels: a file with one class per line, or imagenet1k.")
def predict(images, model, top_k, threshold, device, sampler, ranking, classes, **options):
    """Labels of IMAGES, most probable first. IMAGES are files, directories, shards, or - for standard input.

    \b
    nxtp predict photo.jpg pictures/ --model DIR
    nxtp predict 'data/shards/cc3m/{00000..00331}.tar' --model DIR --out labels.parquet
    find . -name '*.jpg' | nxtp predict --stdin --model DIR --json

    An image that cannot be read is reported and skipped; the exit code is then 1. Started by torchrun, ranks share out
    the images and write one file: torchrun --nproc-per-node 8 -m nxtp predict pictures/ --model DIR --out labels.jsonl
    """
    from nxtp.sampling.closed_vocabulary import read_classes
    from nxtp.sampling.ranking import ranking_config, threshold_of
    from nxtp.sampling.samplers import sampler_config

    config, order = sampler_config(sampler), ranking_config(ranking)
    limit = threshold_of(threshold, order)
    read = None if classes is None else read_classes(classes)
    fabric, recognizer = _load(model, device)
    prepared = recognizer.prepare_classes(read) if read else None
    settings = _settings("predict", images, model, top_k, prepared, limit, recognizer) | {
        "sampler": asdict(config),
        "ranking": asdict(order),
    }
    how = {"top_k": top_k, "sampler": config, "ranking": order, "classes": prepared, "threshold": limit}
    label = partial(recognizer.predict_pixels, **how)
    _run(images, fabric, recognizer, label, "probability" if ranking == "prob" else "score", settings, **options)


@click.command()
@_common_options
@click.option("--classes", required=True, help="A file: one class per line, its names separated by commas; imagenet1k.")
def classify(images, model, top_k, threshold, device, classes, **options):
    """The probability of each class for IMAGES: files, directories, shards, or - for standard input.

    \b
    nxtp classify photo.jpg --model DIR --classes animals.txt
    nxtp classify pictures/ --model DIR --classes imagenet1k --top-k 5 --out labels.jsonl

    imagenet1k takes all names of its 1,000 classes, imagenet1k:first their first, imagenet1k:clip CLIP's. An image
    that cannot be read is reported and skipped; the exit code is then 1.
    """
    from nxtp.sampling.closed_vocabulary import read_classes
    from nxtp.sampling.ranking import RankingConfig, threshold_of

    read, limit = read_classes(classes), threshold_of(threshold, RankingConfig())
    fabric, recognizer = _load(model, device)
    prepared = recognizer.prepare_classes(read)
    label = partial(recognizer.classify_pixels, classes=prepared, top_k=top_k, threshold=limit)
    settings = _settings("classify", images, model, top_k, prepared, limit, recognizer)
    _run(images, fabric, recognizer, label, "probability", settings, **options)


def _load(model: str, device: str) -> tuple[Fabric | None, Recognizer]:
    """The model on this rank's device, and the ranks that torchrun has started, if it has."""
    from nxtp.distributed.ranks import fabric_of, torchrun_ranks
    from nxtp.inference.recognizer import Recognizer

    ranks = torchrun_ranks(device)
    fabric = fabric_of(ranks, "--device", _PATIENCE) if ranks else None
    return fabric, Recognizer.from_pretrained(model, device=fabric.device if fabric else device)


def _settings(
    command: str,
    images: Sequence[str],
    model: str,
    top_k: int,
    classes: Vocabulary | None,
    threshold: str | float | None,
    recognizer: Recognizer,
) -> dict[str, Any]:
    """What rows depend on."""
    from nxtp.inference.model_directory import weights_hash

    source = " ".join(images)
    if len(source) > 100:
        source = f"{source[:60]}… sha256:{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    calibration = {name: [each.temperature, each.offset] for name, each in recognizer.calibrations.items()}
    settings = {"command": command, "input": source, "top_k": top_k, "model": weights_hash(model)}
    settings |= {"classes": classes and classes.fingerprint}
    return settings | {"threshold": threshold, "calibration": calibration or None}


def _run(
    images: Sequence[str],
    fabric: Fabric | None,
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
    grid: Path | None,
    attention: Path | None,
    block: int | None,
    head: int | None,
    batch_size: int,
    workers: int | None,
    cache_dir: str | None,
) -> None:
    """Print or write the predictions, and end the process with the exit code."""
    from rich.console import Console
    from rich.progress import track

    from nxtp.distributed.ranks import together
    from nxtp.inference.streaming import WORKERS, shared_out, stream
    from nxtp.inference.writer import PredictionWriter

    for option, path in (("--grid", grid), ("--attention", attention)):
        if path and not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no directory {path.parent}.")
    if attention:
        _check_attention(recognizer, block, head)
    if fabric and not out:
        raise UserError("Several ranks need --out: they write one file.")
    err = Console(stderr=True)
    shown: dict[int, Prediction] = {}

    def open_data(ranks: Ranks) -> tuple[ImageSource, dict[str, Any]]:
        source = _source(images, stdin, null, cache_dir, ranks)
        return source, settings | {"images": source.count, "shards": source.local}

    with together(fabric, open_data) as (source, share):
        is_first = share[0] == 0
        if fabric:
            settings |= {"ranks": share[1], "batch_size": batch_size, "images": source.count}
        source = shared_out(source, batch_size, share)
        writer, done = None, 0
        if out:
            writer = PredictionWriter(out, settings, score, overwrite, batch_size, share)
            done = writer.count
            if done and is_first:
                of = "" if source.count is None else f" of {source.count:,}"
                err.print(f"{writer.partial}: {done:,}{of} images are done", **_PLAIN)
            source = replace(source, items=writer.remaining(source.items))
        failed = False
        left = (source.count or 0) - done
        in_grid, in_attention = _spread(left, _GRID), _spread(left, _ATTENTION)
        # Whoever writes a name on the pipe and waits for its labels gets them.
        ahead = batch_size if stdin else None
        predictions = stream(source, label, recognizer.transform, batch_size, workers or WORKERS, ahead)
        progress = track(
            predictions, "Images", total=source.count, completed=done, console=err, transient=True,
            disable=not (writer and is_first and err.is_terminal),
        )  # fmt: skip
        try:
            for position, prediction in enumerate(progress):
                failed |= prediction.labels is None
                if prediction.labels is not None and (position in in_grid or position in in_attention):
                    shown[position] = prediction
                _emit(prediction, score, writer, as_json, err)
            if writer:
                failed = _finish(writer, is_first, err)
        except KeyboardInterrupt:
            if writer:
                err.print(f"Stopped after {writer.count:,}; the same command resumes from {writer.partial}.", **_PLAIN)
            raise
        finally:
            if writer:
                writer.close()
    if grid and shown and is_first:
        what = "classes" if settings["command"] == "classify" else "predicted labels"
        _save_grid(grid, [shown[i] for i in in_grid if i in shown], what)
    if attention and shown and is_first:
        _save_attention(attention, [shown[i] for i in in_attention if i in shown], recognizer, block, head)
    sys.exit(1 if failed else 0)


def _emit(prediction: Prediction, score: str, writer: PredictionWriter | None, as_json: bool, err: Console) -> None:
    """Write or print one prediction; print its error too."""
    from nxtp.inference.writer import json_line, to_row

    name = printable(prediction.item.name)
    if prediction.labels is None:
        err.print(f"error: {name}: {prediction.error}", style="red", **_PLAIN)
    if writer:
        writer.write(prediction)
    elif as_json:
        click.echo(json_line(to_row(prediction, score)))
    elif prediction.labels is not None:
        _print_labels(name, prediction.labels)


def _finish(writer: PredictionWriter, is_first: bool, err: Console) -> bool:
    """Complete the file once every rank has written its share. Returns whether an image could not be read."""
    from nxtp.distributed.ranks import gathered

    counts = gathered((writer.count, writer.failed))
    writer.count, writer.failed = (sum(each) for each in zip(*counts, strict=True))
    if is_first:
        writer.finish()
        err.print(writer.summary(), **_PLAIN)
    gathered(None)  # a rank that ended with code 1 before would have the first one killed
    return writer.failed > 0


def _spread(count: int, pictures: int) -> list[int]:
    """The positions to show, over all images: the first ones of class folders are all of one class."""
    return [i * max(count, pictures) // pictures for i in range(pictures)]


def _source(images: Sequence[str], stdin: bool, null: bool, cache_dir: str | None, ranks: Ranks) -> ImageSource:
    from nxtp.inference.streaming import ImageItem, ImageSource

    pipe: Any = sys.stdin.buffer
    if stdin:
        if images:
            raise UserError("--stdin reads the names from standard input: give no IMAGES.")
        return ImageSource.from_pipe(pipe, b"\0" if null else b"\n")
    if null:
        raise UserError("--null needs --stdin.")
    if not images:
        raise UserError("No images: give files, directories or shards, - for an image on standard input, or --stdin.")
    if "-" not in images:
        return ImageSource.from_paths(images, cache_dir, ranks)
    if len(images) > 1:
        raise UserError("'-' is one image on standard input: give no other IMAGES.")
    content = pipe.read(_MAX_BYTES)
    return ImageSource([ImageItem("-", lambda: content)], 1)


def _print_labels(title: str, labels: Labels) -> None:
    """A table with probability bars, as wide as the terminal allows."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column()  # of a narrow terminal's columns the labels wrap
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    width = max(10, min(40, console.width - 40))
    for rank, (label, probability) in enumerate(labels, start=1):
        bar = Bar(1, 0, min(probability, 1), width=width, color="cyan")
        table.add_row(str(rank), escape(label), f"{probability:.4f}", bar)
    console.print(table)


def _names(predictions: Sequence[Prediction]) -> list[str]:
    """Names of files; of several folders with these, as "airplane/0004.jpg"."""
    paths = [Path(prediction.image) for prediction in predictions]
    several = len({path.parent for path in paths}) > 1
    return ["/".join(path.parts[-2:]) if several else path.name for path in paths]


def _save_grid(path: Path, predictions: Sequence[Prediction], what: str) -> None:
    from nxtp.data.images import load_image
    from nxtp.inference.figures import GridItem, save_grid

    items = []
    for prediction, name in zip(predictions, _names(predictions), strict=True):
        image = load_image(prediction.item.read(), near=_GRID_PIXELS)
        image.thumbnail((2 * _GRID_PIXELS, 2 * _GRID_PIXELS))
        items.append(GridItem(image, [], prediction.labels or [], name=name))
    save_grid(path, items, what=what)
    click.echo(f"Picture: {path}", err=True)


def _save_attention(
    path: Path, predictions: Sequence[Prediction], recognizer: Recognizer, block: int | None, head: int | None
) -> None:
    from nxtp.inference.figures import save_attention

    items = [attention_item(each, recognizer, _ATTENTION_LABELS, block, head) for each in predictions]
    named = zip(items, _names(predictions), strict=True)
    save_attention(path, [item._replace(name=name) for item, name in named])
    click.echo(f"Picture: {path}", err=True)


def attention_item(
    prediction: Prediction, recognizer: Recognizer, count: int, block: int | None = None, head: int | None = None
) -> AttentionItem:
    """The part of an image that the model sees, and where its first ``count`` labels are seen."""
    from PIL import Image

    from nxtp.inference.figures import AttentionItem
    from nxtp.model.attention_maps import average

    shown = replace(recognizer.pixels, size=_GRID_PIXELS)(prediction.item.read())
    pixels = recognizer.transform(prediction.item.read())
    maps = [
        (label, probability, average(recognizer.relevance(pixels, label), block, head).numpy())
        for label, probability in (prediction.labels or [])[:count]
    ]
    return AttentionItem(Image.fromarray(shown.permute(1, 2, 0).numpy()), maps)


def _check_attention(recognizer: Recognizer, block: int | None, head: int | None) -> None:
    """
    Raises:
        UserError: the model has no such block or head, or its image tokens form no square grid.
    """
    import torch

    from nxtp.model.attention_maps import average, grid_side

    side, decoder = grid_side(recognizer.model.num_image_tokens), recognizer.model.decoder
    heads = decoder.lm.config.num_attention_heads
    average(torch.empty(len(decoder.blocks), heads, 1, side, side), block, head)
