"""All that wants a GPU: training, prediction, static shapes and the memory forecast, in nine minutes.

    python experiments/benchmarks/gpu.py

Each part is a command of its own, in bounded time. Prints a Markdown table, as in docs/performance.md, then one JSON
object.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from nxtp.bench.command import choice, number, seed
from nxtp.bench.models import SIZES
from nxtp.bench.predict import COUNTS
from nxtp.bench.reporting import machine_description, machine_line
from nxtp.cost.memory import Step, memory
from nxtp.inference.pretrained import usable_device

STATIC = Path(__file__).with_name("static_shapes.py")
NEEDS_GPU = "needs a GPU"
ROW = "| {} | {} | {} | {} | {} |"


def commands(size: str, device: str, batch_size: int, seed: int) -> dict[str, list[str]]:
    common = [f"--size={size}", f"--device={device}", f"--seed={seed}", "--json"]
    compiled = ["--compile"] if device == "cuda" else []  # minutes on a CPU
    nxtp, single = [sys.executable, "-m", "nxtp", "bench"], ["--precision=bf16-true", *common]
    return {
        "train": [
            *nxtp,
            "train",
            f"--batch-size={batch_size}",
            "--precision=bf16-mixed",
            "--repeats=2",
            *compiled,
            *common,
        ],
        "predict": [*nxtp, "predict", f"--batch-size={4 * batch_size}", *single],
        "static": [sys.executable, str(STATIC), "--ends=0", "--tokens=4", *single],
    }


def bounded(command: list[str], seconds: float) -> dict[str, Any]:
    """The object on the last line that the command prints, or ``error``. Its processes end with it."""
    with (
        TemporaryDirectory() as temporary,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": temporary},
        ) as process,
    ):
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished in {seconds:.0f} s"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        return {"error": (error.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    return json.loads(out.splitlines()[-1])


def measure_gpu(*, size: str, device: str, batch_size: int, budget: int, seed: int) -> dict[str, Any]:
    """Memory forecast, training, prediction and static shapes at one size.

    Args:
        batch_size: images per training step; prediction in batches takes four times as many.
        budget: seconds. Training gets half, the others equal shares of what is left.

    Returns:
        ``forecast_bytes``; ``train``, ``predict`` and ``static``: what their commands print, or ``error``; the machine.

    Raises:
        UserError: there is no such device.
    """
    deadline, device = time.monotonic() + budget, usable_device(device).type
    model = SIZES[size]()
    step = Step(batch=batch_size, precision="bf16-mixed", on_gpu=device == "cuda")
    result: dict[str, Any] = {"size": size, "device": device, "batch_size": batch_size}
    result["forecast_bytes"] = memory(model.config, None, model.optim, step).total
    parts = commands(size, device, batch_size, seed)
    if device == "cpu":
        del parts["static"]
        result["static"] = {"error": NEEDS_GPU}
    for left, (name, command) in zip(range(len(parts), 0, -1), parts.items(), strict=True):
        seconds = max((deadline - time.monotonic()) / (2 if name == "train" else left), 1)
        click.echo(f"{name}: {seconds:.0f} s at most", err=True)
        result[name] = bounded(command, seconds)
    machines = (result[name].get("machine") for name in parts)
    result["machine"] = next(filter(None, machines), None) or machine_description()
    return result


def markdown(result: dict[str, Any]) -> str:
    """A table for docs/performance.md."""
    rows = [*train_rows(result), *predict_rows(result["predict"]), *static_rows(result["static"])]
    line = f"{result['size']}, {result['batch_size']} images per step; {machine_line(result['machine'])}"
    head = ROW.format("", "ours", "published way", "ratio", "aim"), "| --- | ---: | ---: | ---: | ---: |"
    return "\n".join([line, "", *head, *(ROW.format(*row) for row in rows)])


def train_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    train, forecast = result["train"], result["forecast_bytes"] / 1e9
    predicted = "memory forecast GB", f"{forecast:.2f}", ""
    if "error" in train:
        return [("training", train["error"], "", "", ""), (*predicted, "", "")]
    ways = [train["rows"][way] for way in ("ours", "published")]
    mfu = (NEEDS_GPU if way["mfu"] is None else f"{way['mfu']:.1%}" for way in ways)
    peaks: tuple[str, ...] = NEEDS_GPU, NEEDS_GPU, ""
    fits = NEEDS_GPU
    if result["device"] == "cuda":
        peaks = *(f"{way['peak_bytes'] / 1e9:.2f}" for way in ways), f"{train['peak_memory_ratio']:.2f}×"
        fits = f"{forecast * 1e9 / ways[0]['peak_bytes']:.2f}× measured"
    images = [f"{way['images_per_s']:.1f}" for way in ways]
    compiled = []
    if row := train["rows"].get("ours, compiled"):
        gain = f"{row['images_per_s'] / ways[1]['images_per_s']:.1f}×"
        compiled = [
            ("compiled: images/s", f"{row['images_per_s']:.1f}", "", gain, ""),
            ("compiled: MFU", f"{row['mfu']:.1%}", "", "", ""),
        ]
    return [
        ("training, images/s", *images, f"{train['images_per_s_ratio']:.1f}×", "≥ 3.5×"),
        ("MFU", *mfu, "", "≥ 45 %"),
        *compiled,
        ("data wait", f"{ways[0]['data_wait']:.1%}", "", "", ""),
        ("peak memory GB", *peaks, ""),
        (*predicted, fits, ""),
    ]


def predict_rows(predict: dict[str, Any]) -> list[tuple[str, ...]]:
    if "error" in predict:
        return [("prediction", predict["error"], "", "", "")]
    rows = []
    for k in COUNTS:
        ours, published = (predict["rows"][f"{way}@{k}"]["seconds"] for way in ("ours", "published"))
        aim = "≤ 15 for 10 labels" if k == 20 else ""
        rows.append((f"{k} labels, ms", f"{1e3 * ours:.1f}", f"{1e3 * published:.1f}", f"{published / ours:.1f}×", aim))
    for k in COUNTS:
        speed = f"{predict['rows'][f'ours@{k}']['images_per_s']:.1f}"
        rows.append((f"{k} labels, batches of {predict['batch_size']}, images/s", speed, "", "", ""))
    return [*rows, ("time of 100 labels / of 1", f"{predict['top100_over_top1']:.2f}×", "", "", "≤ 2×")]


def static_rows(static: dict[str, Any]) -> list[tuple[str, ...]]:
    if "error" in static:
        return [("static shapes with CUDA graphs", static["error"], "", "", "")]
    of_k = ((k, static["rows"][f"compiled@{k}"]) for k in COUNTS)
    name = "static shapes with CUDA graphs, {} labels, ms"
    return [(name.format(k), f"{1e3 * r['seconds']:.1f}", "", f"{r['ratio']:.2f}× as it is", "") for k, r in of_k]


@click.command()
@seed
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True, help="cpu: to try it.")
@choice("--size", ("g3m", "full", "tiny"), "Of the model; g3m is the published one, 1.78 B parameters.")
@number("--batch-size", 16, "Images per training step.")
@number("--budget", 540, "Seconds in all.")
def main(**options: Any) -> None:
    """Training, prediction, static shapes and the memory forecast: a Markdown table, then one JSON object."""
    result = measure_gpu(**options)
    click.echo(markdown(result))
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
