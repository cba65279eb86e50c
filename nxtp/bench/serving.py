"""`nxtp bench serve`: a server that gathers requests into batches, beside one that answers one by one."""

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
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from nxtp.bench.measure import ratio
from nxtp.bench.processes import machine_description, machine_line
from nxtp.data.images import ImageError
from nxtp.deploy.ports import free_port
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.inference.streaming import Source

START, TOP_K = 180, 5  # seconds a server may take to start; labels asked for


def measure_serving(
    model: str, data: str, batch: int = 16, clients: int = 32, requests: int = 256, repeats: int = 3
) -> dict[str, Any]:
    """Both servers run for the whole time and are asked in turn, by clients that each send the next request at once.

    Args:
        model: a model directory.
        data: images: a folder, or shards; taken again from the start when there are fewer than requests.
        batch: requests that the first server labels together.
        clients: requests that are under way at a time.

    Returns:
        ``ratio`` of requests a second, batched / one by one; of each server ``per_s``, and ``p50`` and ``p95`` in
        milliseconds.

    Raises:
        UserError: no images, or a server does not start or answers otherwise than the model.
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
            "batched": stack.enter_context(_server(model, batch)),
        }
        for name, port in ports.items():
            found = _ask(port, bodies[0])[1]["labels"]
            if [each["label"] for each in found] != [label for label, _ in expected]:
                raise UserError(f"The server ({name}) answers otherwise than the model: nothing was measured.")
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        for turn in range(repeats + 1):
            for name, port in ports.items():
                begin = time.perf_counter()
                took = [wait for wait, _ in pool.map(lambda body, port=port: _ask(port, body), bodies)]
                if turn:  # the first is not counted
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
        "batch": batch,
        "clients": clients,
        "requests": requests,
        "repeats": repeats,
        "parameters": sum(parameter.numel() for parameter in recognizer.model.parameters()),
        "machine": machine_description("cpu"),
    }


def _images(data: str) -> Iterator[bytes]:
    for item in Source.of(data).items:
        try:
            found = item.read()
            yield found if isinstance(found, bytes) else found.read_bytes()
        except (ImageError, OSError):
            continue


@contextmanager
def _server(model: str, batch: int) -> Iterator[int]:
    """Its port; it is stopped at the end."""
    port = free_port()
    options = ("--port", str(port), "--batch", str(batch), "--device", "cpu")
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
        UserError: it ended, or does not answer.
    """
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            told = (process.stderr.read().strip().splitlines() or ["no reason"])[-1]
            raise UserError(f"The server did not start: {told}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"The server did not start within {START} seconds.")


def _ask(port: int, body: bytes) -> tuple[float, dict[str, Any]]:
    """Seconds waited, and the answer."""
    begin = time.perf_counter()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.load(answer)
    return time.perf_counter() - begin, found


def serving_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"A server under {result['clients']} clients", caption_justify="left")
    for column in ("requests", "images/s", "", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right")
    for name, row in result["rows"].items():
        gain = "1.0×" if name == "one by one" else f"{result['ratio']:.1f}×"
        table.add_row(name, f"{row['per_s']:,.1f}", gain, f"{row['p50']:,.0f}", f"{row['p95']:,.0f}")
    table.caption = (
        f"Batches of up to {result['batch']}, {result['parameters'] / 1e6:,.1f} M parameters; server and clients share "
        f"the machine; medians of {result['repeats']} rounds of {result['requests']} requests. "
        f"{machine_line(result['machine'])}"
    )
    return table
