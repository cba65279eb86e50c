"""Does it pay that a server gathers requests into batches?

    python experiments/benchmarks/server.py --model runs/demo/model --data data/shards/studies/val

2026-11-25, two threads of an AMD EPYC, shared by server and clients; 6.2 M parameters; 32 clients that each send the
next request at once; both servers in one run:

                         images/s          p50 ms   p95 ms
    one by one               36.5   1.0×      793    1,002
    batches of up to 16     141.8   3.7×      216      275
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from rich.table import Table

from nxtp.bench.command import as_json, number, repeats
from nxtp.bench.reporting import build_table, machine_description, machine_line, ratio, show
from nxtp.data.images import ImageError
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.inference.streaming import ImageSource

START, TOP_K = 180, 5  # seconds that a server may take to start; labels per request


def measure(*, model: str, data: str, batch_size: int, clients: int, requests: int, repeats: int) -> dict[str, Any]:
    """Both servers run all the time and are measured in turn, by clients that each send the next request at once.

    Args:
        model: a model directory.
        data: images: a folder, or shards; repeated from the start if there are fewer than requests.
        batch_size: requests that one of the servers labels together.
        clients: requests in flight at a time.

    Returns:
        ``ratio`` of requests per second, batched / one by one; of each server ``per_s``, and ``p50`` and ``p95`` in
        milliseconds.

    Raises:
        UserError: no images, or a server does not start or its labels are not those of the model.
    """
    recognizer = Recognizer.from_pretrained(model, device="cpu")
    images = list(islice(_images(data), requests))
    if not images:
        raise UserError(f"No image in '{data}'.")
    bodies = [json.dumps({"image": base64.b64encode(each).decode(), "top_k": TOP_K}).encode() for each in images]
    bodies = [bodies[i % len(bodies)] for i in range(requests)]
    expected = recognizer.predict(images[0], TOP_K)
    seconds: dict[str, list[float]] = {"one by one": [], "batched": []}
    waits: dict[str, list[float]] = {name: [] for name in seconds}
    with ExitStack() as stack:
        ports = {
            "one by one": stack.enter_context(_server(model, 1)),
            "batched": stack.enter_context(_server(model, batch_size)),
        }
        for name, port in ports.items():
            found = _ask(port, bodies[0])[1]["labels"]
            if [each["label"] for each in found] != [label for label, _ in expected]:
                raise UserError(f"The labels of the server ({name}) are not those of the model: nothing was measured.")
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        for turn in range(repeats + 1):
            for name, port in ports.items():
                begin = time.perf_counter()
                took = [wait for wait, _ in pool.map(lambda body, port=port: _ask(port, body), bodies)]
                if turn:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - begin)
                    waits[name] += took
    rows = {
        name: {
            "per_s": requests / median(seconds[name]),
            "p50": 1e3 * float(np.percentile(waits[name], 50)),
            "p95": 1e3 * float(np.percentile(waits[name], 95)),
        }
        for name in seconds
    }
    return {
        "ratio": ratio(seconds["one by one"], seconds["batched"]),
        "rows": rows,
        "batch_size": batch_size,
        "clients": clients,
        "requests": requests,
        "repeats": repeats,
        "parameters": sum(parameter.numel() for parameter in recognizer.model.parameters()),
        "machine": machine_description("cpu"),
    }


def _images(data: str) -> Iterator[bytes]:
    for item in ImageSource.open(data).items:
        try:
            found = item.read()
            yield found if isinstance(found, bytes) else Path(found).read_bytes()
        except (ImageError, OSError):
            continue


@contextmanager
def _server(model: str, batch_size: int) -> Iterator[int]:
    """A running server's port."""
    port = find_free_network_port()
    options = ("--port", str(port), "--batch-size", str(batch_size), "--device", "cpu")
    command = [sys.executable, "-m", "nxtp", "serve", model, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait(process, port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen, port: int) -> None:
    """
    Raises:
        UserError: the server ended, or does not respond.
    """
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = process.stderr.read().strip().splitlines() if process.stderr else []
            raise UserError(f"The server did not start: {lines[-1] if lines else 'it printed nothing'}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"The server did not start within {START} seconds.")


def _ask(port: int, body: bytes) -> tuple[float, dict[str, Any]]:
    """Seconds of waiting, and the response."""
    begin = time.perf_counter()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        found = json.load(response)
    return time.perf_counter() - begin, found


def table(result: dict[str, Any]) -> Table:
    gains = {"one by one": 1.0, "batched": result["ratio"]}
    rows = [
        (name, f"{row['per_s']:,.1f}", f"{gains[name]:.1f}×", f"{row['p50']:,.0f}", f"{row['p95']:,.0f}")
        for name, row in result["rows"].items()
    ]
    caption = (
        f"Batches of up to {result['batch_size']}, {result['parameters'] / 1e6:,.1f} M parameters; server and clients "
        f"share the machine; medians of {result['repeats']} rounds of {result['requests']} requests. "
        f"{machine_line(result['machine'])}"
    )
    columns = ("requests", "images/s", "", "p50 ms", "p95 ms")
    return build_table(f"A server under {result['clients']} clients", columns, rows, caption)


@click.command()
@as_json
@repeats
@click.option("--model", required=True, help="A model directory.")
@click.option("--data", required=True, help="Images: a folder, or shards.")
@click.option("--batch-size", type=click.IntRange(2), default=16, show_default=True, help="Requests labelled together.")
@number("--clients", 32, "Requests in flight at a time.")
@number("--requests", 256, "Per round.")
def server(**options: Any) -> None:
    """A server that gathers requests into batches, and one that labels them one by one."""
    if find_spec("litserve") is None:
        raise UserError("The server needs litserve: pip install 'nxtp[serve]'.")
    show(measure, table, **options)


if __name__ == "__main__":
    server()
