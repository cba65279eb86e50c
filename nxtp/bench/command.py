"""`nxtp bench WHAT`: our implementation and the published one on the same inputs, in one run.

Models are built in a process per way. The parent compares the results of both, then measures them in turn
(A B A B …); ratios are medians over the rounds. The published way is :mod:`nxtp.paper.reference`. Other
work on the machine falsifies the numbers.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

SIZES = ("full", "tiny", "g3m")  # of nxtp.bench.models, which takes seconds to import
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def run(name: str, **options: Any) -> None:
    from nxtp.bench.reporting import show

    module = importlib.import_module(f"nxtp.bench.{name}")
    show(getattr(module, f"measure_{name}"), getattr(module, f"{name}_table"), **options)


def number(name: str, default: int, text: str) -> Any:
    return click.option(name, type=click.IntRange(1), default=default, show_default=True, help=text)


def choice(name: str, choices: tuple[str, ...], text: str) -> Any:
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=text)


as_json = click.option("--json", is_flag=True, help="Print one JSON object as the last line.")
repeats = number("--repeats", 3, "Rounds; the table shows medians.")
seed = click.option("--seed", type=int, default=0, show_default=True, help="Of random weights, images and labels.")


def of_a_model(command: Any) -> Any:
    """The options of a benchmark of models."""
    for option in (
        as_json,
        seed,
        repeats,
        choice("--precision", PRECISIONS, "Of the measured calls; results are compared in float32."),
        choice("--device", ("auto", "cpu", "cuda"), "auto: a GPU if there is one."),
        choice("--size", SIZES, "Of the model; g3m is the published one, 1.78 B parameters."),
    ):
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Benchmark against the reference implementation, both in one run."""


@bench.command(short_help="Training steps per second, MFU and peak memory.")
@of_a_model
@number("--batch-size", 8, "Images per step.")
@click.option("--compile", "compiled", is_flag=True, help="Also ours with parallel.compile=true.")
@click.option("--profile", metavar="DIR", help="Also a few of our steps with PyTorch's profiler: table and trace.")
def train(**options: Any) -> None:
    """Training images per second, MFU and peak memory: ours as `nxtp train` does it, and published."""
    run("train", **options)


@bench.command(short_help="Seconds per image for 1, 20 and 100 labels.")
@of_a_model
@number("--steps", 3, "Decoding steps after a label's first token.")
@number("--batch-size", 64, "Images per batch, for our throughput.")
def predict(**options: Any) -> None:
    """Seconds per image for 1, 20 and 100 labels, ours and published; our images/s in batches."""
    run("predict", **options)


@bench.command(short_help="Images per second and core of three loaders.")
@as_json
@seed
@repeats
@click.option("--shards", help="A directory, glob or brace expression; default: synthetic photographs.")
@number("--images", 512, "Synthetic photographs.")
@number("--width", 640, "Of a synthetic photograph, in pixels.")
@number("--height", 480, "Of a synthetic photograph, in pixels.")
@number("--size", 224, "Of the model's input, in pixels.")
@number("--batch-size", 64, "Images per batch.")
def data(**options: Any) -> None:
    """Images per second and core: ours, plain WebDataset, open_clip's pipeline."""
    run("data", **options)


@bench.command(short_help="Labels per second of the semantic metric.")
@as_json
@seed
@number("--images", 10_000, "In the stream.")
@number("--plain-images", 40, "The first of them, which one label at a time also gets.")
def metric(**options: Any) -> None:
    """Labels per second of the semantic metric, ours and one label at a time."""
    run("metric", **options)


@bench.command(short_help="Precision, recall and speed of the noun backends.")
@as_json
@repeats
@click.option("--errors", is_flag=True, help="Also what each backend gets wrong in the half for tuning.")
def nouns(**options: Any) -> None:
    """Precision, recall and captions per second of the noun backends, on captions marked by hand."""
    run("nouns", **options)
