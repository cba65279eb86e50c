"""`nxtp bench WHAT`: ours beside the published way, the same inputs, in one run.

For models each way lives in a fresh process that builds the same seeded model. The parent first has both compute the
same thing and compares the results, then asks them for one measurement each in turn (A B A B …); ratios are medians
over the rounds. The published way is :mod:`nxtp.paper.reference`. Other work on the machine falsifies the numbers:
threads that wait for each other slow short steps far more than long ones.
"""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import click
from rich.console import Console

from nxtp.bench.closed import closed_table, measure_closed
from nxtp.bench.data import data_table, measure_data
from nxtp.bench.measure import measure_predict, measure_train, predict_table, train_table
from nxtp.bench.metric import measure_metric, metric_table
from nxtp.bench.padding import measure_padding, padding_table
from nxtp.bench.static import measure_static, static_table
from nxtp.bench.workers import SIZES
from nxtp.cost.plan import H100, measure_plan, plan_table
from nxtp.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def _report(measure, table, *, json: bool, **options: Any) -> None:
    """Measure, print the table, and with ``json`` one JSON object as the last line."""
    with Console(stderr=True).status("measuring; the published way takes its time …"):
        result = measure(**options)
    Console().print(table(result))
    if json:
        print(json_module.dumps(result), flush=True)


@click.group()
def bench() -> None:
    """Ours against the published way of doing it, side by side in one run."""


def _common(command):
    for option in (
        click.option("--json", is_flag=True, help="Print one JSON object as the last line."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of weights, images and labels."),
        click.option(
            "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are shown."
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default="32-true",
            show_default=True,
            help="Of what is measured; results are compared in float32.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto: a GPU.",
        ),
        click.option(
            "--size",
            type=click.Choice(list(SIZES)),
            default="full",
            show_default=True,
            help="Of the model; g3m is the published one, 1.78 B parameters.",
        ),
    ):
        command = option(command)
    return command


@bench.command()
@_common
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Images a step.")
def train(**options: Any) -> None:
    """Training steps a second, MFU and peak memory, ours and published."""
    _report(measure_train, train_table, **options)


_steps = click.option(
    "--steps", type=click.IntRange(1), default=3, show_default=True, help="Decoding steps after a label's first token."
)


@bench.command()
@_common
@_steps
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images, for the throughput.")
def predict(**options: Any) -> None:
    """Seconds an image for 1, 20 and 100 labels, ours and published, and our images/s in batches."""
    _report(measure_predict, predict_table, **options)


@bench.command()
@_common
@click.option("--labels", default="imagenet1k:first", show_default=True, help="As of nxtp classify.")
@_steps
def closed(**options: Any) -> None:
    """The probability of a thousand given labels, beside a top-20 prediction."""
    _report(measure_closed, closed_table, **options)


@bench.command()
@_common
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images a call.")
@click.option("--tokens", type=click.IntRange(2), default=19, show_default=True, help="Of a label, at most.")
@click.option(
    "--ends",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="The delimiter's weight; 0: no label ends.",
)
def static(**options: Any) -> None:
    """Whether fixed shapes and a compiled step pay in one-shot prediction."""
    _report(measure_static, static_table, **options)


@bench.command()
@click.option("--json", is_flag=True, help="Print one JSON object as the last line.")
@click.option("--shards", help="Real ones: a directory, glob or brace expression; synthetic photographs by default.")
@click.option("--images", type=click.IntRange(1), default=512, show_default=True, help="Synthetic photographs.")
@click.option("--width", type=click.IntRange(16), default=640, show_default=True, help="Of a photograph, in pixels.")
@click.option("--height", type=click.IntRange(16), default=480, show_default=True, help="Of a photograph, in pixels.")
@click.option("--size", type=click.IntRange(1), default=224, show_default=True, help="Of the model's input, in pixels.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images a batch.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are shown.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the photographs.")
def data(**options: Any) -> None:
    """Images a second and core, ours, plain WebDataset and open_clip's pipeline."""
    _report(measure_data, data_table, **options)


@bench.command()
@click.option("--json", is_flag=True, help="Print one JSON object as the last line.")
@click.option("--images", type=click.IntRange(1), default=10_000, show_default=True, help="In the stream.")
@click.option("--plain-images", type=click.IntRange(1), default=40, show_default=True, help="Of them the plain way's.")
@click.option("--semantic", default="packaged", show_default=True, help="packaged, a directory, or clip:ARCH/TAG.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stream.")
def metric(**options: Any) -> None:
    """Labels a second of the semantic metric, ours and one label at a time."""
    _report(measure_metric, metric_table, **options)


@bench.command()
@click.option("--json", is_flag=True, help="Print one JSON object as the last line.")
@click.option("--shards", help="Real captions: a directory, glob or brace expression; synthetic ones by default.")
@click.option("--experiment", default="g3m", show_default=True, help="Whose model, objective and trained parts.")
@click.option("--images", type=click.IntRange(1), default=20_000, show_default=True, help="At most.")
@click.option("--nouns", type=float, default=3.5, show_default=True, help="Of a synthetic caption, in the mean.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Images a rank and step.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of captions and order.")
def padding(**options: Any) -> None:
    """The share of padding, and what bucketed or packed batches could save."""
    _report(measure_padding, padding_table, **options)


@bench.command(name="export")
@click.option("--json", is_flag=True, help="Print one JSON object as the last line.")
@click.option("--model", required=True, help="A model directory.")
@click.option("--data", required=True, help="Shards with labels or captions: a directory, glob or brace expression.")
@click.option("--images", type=click.IntRange(1), default=500, show_default=True, help="The first of the shards.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are shown.")
@click.option("--aoti", is_flag=True, help="Also AOTInductor; compiles for a minute.")
def exported(**options: Any) -> None:
    """A model as it is, with int8 weights and as ONNX graphs: size, speed, recall."""
    from nxtp.deploy.onnx.export import require_onnx

    require_onnx()
    from nxtp.bench.exported import exported_table, measure_exported

    _report(measure_exported, exported_table, **options)


@bench.command()
@click.option("--json", is_flag=True, help="Print one JSON object as the last line.")
@click.option("--model", required=True, help="A model directory.")
@click.option("--data", required=True, help="Images: a folder, or shards.")
@click.option("--batch", type=click.IntRange(2), default=16, show_default=True, help="Requests labelled together.")
@click.option("--clients", type=click.IntRange(1), default=32, show_default=True, help="Requests under way at a time.")
@click.option("--requests", type=click.IntRange(1), default=256, show_default=True, help="Of a round.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are shown.")
def serve(**options: Any) -> None:
    """A server that gathers requests into batches, beside one that answers one by one."""
    if find_spec("litserve") is None:
        raise UserError("The server needs litserve: pip install 'nxtp[serve]'.")
    from nxtp.bench.serving import measure_serving, serving_table

    _report(measure_serving, serving_table, **options)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"'{value}': numbers above 0 with commas between them, as in 8,32,256.")
    return numbers


@bench.command()
@click.argument("overrides", nargs=-1)
@click.option("--gpus", default="8,32,256", show_default=True, callback=_numbers, help="H100s, eight a node.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), default=0.45, show_default=True, help="Assumed.")
@click.option("--images", type=click.IntRange(1), help="Of the whole run; by default the recipe's samples and epochs.")
@click.option("--global-batch", type=click.IntRange(1), help="Images a step; by default the recipe's images a GPU.")
@click.option("--inside", type=float, default=H100.inside / 1e9, show_default=True, help="GB/s a GPU in a node.")
@click.option("--between", type=float, default=H100.between / 1e9, show_default=True, help="GB/s a GPU between nodes.")
@click.option("--json", is_flag=True, help="Print one JSON object as the last line.")
def plan(overrides: tuple[str, ...], inside: float, between: float, **options: Any) -> None:
    """Hours, bytes sent and memory of a recipe on many GPUs, by formula.

    OVERRIDES are those of nxtp train; experiment=g70m by default.
    """
    cluster = replace(H100, inside=inside * 1e9, between=between * 1e9)
    _report(measure_plan, plan_table, overrides=overrides or ("experiment=g70m",), cluster=cluster, **options)
