"""What do minutes of good, bad, slow and broken requests do to a server?

    python experiments/benchmarks/soak.py

Starts `nxtp serve` and then `nxtp app` on this machine, of a tiny model unless --model names one. Prints for each
requests and errors of every kind, the 95th percentile of the good ones' times, and memory and open files of its
processes at the start (once it is warm) and at the end. The table of a run is in docs/serving.md.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import psutil
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from PIL import Image
from rich.table import Table

from nxtp.bench.command import as_json, number
from nxtp.bench.models import tiny
from nxtp.bench.reporting import build_table, machine_description, machine_line, show
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer

START, TIMEOUT = 300, 120  # seconds: that a server may take to start, and a request
WARM = 12  # good requests before the memory at the start is measured
SHARES = {"good": 4, "bad": 3, "slow": 1, "broken": 2}  # of the requests
WORDS = ["rose", "lemon", "leaf", "ocean", "stone", "hot dog", "sunflower", "mirror"]
SECRET = "/etc/passwd"


class Request(NamedTuple):
    """A request, which gives status and text of the response, and what these should be; 0: closed without one."""

    send: Callable[[], tuple[int, str]]
    statuses: tuple[int, ...] = (200,)
    text: str = ""


def ask(port: int, path: str, body: bytes | None = None, pause: float = 0, **headers: str) -> tuple[int, str]:
    """Status and text of the response; the body is sent within ``pause`` seconds."""
    pieces = body if not (body and pause) else slowly(body, pause)
    size = {} if body is None else {"Content-Length": str(len(body)), "Content-Type": "application/json"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    deadline = time.monotonic() + TIMEOUT
    with closing(HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection, suppress(ConnectionError):
        connection.connect()
        with suppress(ConnectionError):  # refused before its end: the response tells why
            connection.request("GET" if body is None else "POST", path, pieces, size | named)
        response = connection.getresponse()
        received = b""
        while (piece := response.read1(1 << 16)) and time.monotonic() < deadline:
            received += piece
        return response.status, received.decode()
    return 0, ""


def slowly(body: bytes, seconds: float) -> Iterator[bytes]:
    size = -(-len(body) // 10)
    for begin in range(0, len(body), size):
        yield body[begin : begin + size]
        time.sleep(seconds / 10)


def abandon(port: int, path: str, left: deque[socket.socket], headers: str, body: bytes) -> tuple[int, str]:
    """Send a part of a request and leave its connection open, with those of the last ones."""
    message = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n".encode() + body
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    connection.sendall(message[: random.randrange(len(message))])
    if len(left) == left.maxlen:
        left.popleft().close()
    left.append(connection)
    return 0, ""


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def to_serve(port: int, max_bytes: int) -> dict[str, list[Request]]:
    """Requests of each kind for `nxtp serve`."""

    def predict(image: bytes, **options: Any) -> tuple[int, str]:
        return ask(port, "/predict", json.dumps({"image": base64.b64encode(image).decode()}).encode(), **options)

    bad = [
        b"\xff\xd8\xff\xe0",
        b'{"image": NaN}',
        b'{"image": "", "top_k": 1e400}',
        b'{"image": "\\ud800"}',
        b"[" * 9999,
    ]
    left: deque[socket.socket] = deque(maxlen=80)
    return {
        "good": [Request(lambda: predict(picture()), text='"probability"')],
        "bad": [
            *(Request(partial(ask, port, "/predict", body), (400, 422), '"error"') for body in bad),
            Request(partial(ask, port, "/predict", bad[0], Content_Type="image/jpeg"), (400, 422), '"error"'),
            Request(lambda: predict(b"no image"), (422,), '"error"'),
            Request(lambda: predict(bytes(max_bytes)), (413, 0)),
            Request(partial(ask, port, "/health", Host="evil.example"), (400,)),
        ],
        "slow": [Request(lambda: predict(picture(), pause=2), text='"probability"')],
        "broken": [Request(partial(abandon, port, "/predict", left, "Content-Length: 5000", bytes(4000)), (0,))],
    }


def to_app(port: int, max_bytes: int) -> dict[str, list[Request]]:
    """Requests of each kind for `nxtp app`: upload a file, ask for its labels, read them from a stream."""
    config = json.loads(ask(port, "/config")[1])
    function = next(i for i, each in enumerate(config["dependencies"]) if len(each["inputs"]) == 4)
    form = 'multipart/form-data; boundary="x"'
    begin = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.jpg"\r\n\r\n'
    left: deque[socket.socket] = deque(maxlen=80)

    def upload(image: bytes, **options: Any) -> tuple[int, str]:
        return ask(port, "/gradio_api/upload", begin + image + b"\r\n--x--\r\n", Content_Type=form, **options)

    def question(path: str, session: str, typed: str = "") -> bytes:
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        asked = {"data": [image, 5, "Any label", typed], "fn_index": function, "session_hash": session}
        return json.dumps(asked).encode()

    def label(image: bytes, **options: Any) -> tuple[int, str]:
        status, text = upload(image, **options)
        if status != 200:
            return status, text
        session = os.urandom(5).hex()
        status, text = ask(port, "/gradio_api/queue/join", question(json.loads(text)[0], session))
        return (status, text) if status != 200 else ask(port, f"/gradio_api/queue/data?session_hash={session}")

    join = partial(ask, port, "/gradio_api/queue/join")
    return {
        "good": [Request(lambda: label(picture()), text="data-label")],
        "bad": [
            Request(lambda: label(b"no image"), text="alert"),
            Request(lambda: upload(bytes(max_bytes + (1 << 20))), (413, 0)),
            Request(partial(join, question("x", "x", "a" * (2 << 20))), (413, 0)),
            Request(partial(join, b'{"data": NaN'), (400, 422)),
            Request(partial(ask, port, f"/gradio_api/file={SECRET}"), (403, 404)),
            Request(partial(ask, port, "/", Host="evil.example"), (400,)),
        ],
        "slow": [Request(lambda: label(picture(), pause=2), text="data-label")],
        "broken": [
            Request(
                partial(
                    abandon, port, "/gradio_api/upload", left, f"Content-Type: {form}\r\nContent-Length: 5000",
                    begin + bytes(4000),
                ),
                (0,),
            )
        ],
    }  # fmt: skip


SERVERS = {"serve": ("/health", to_serve), "app": ("/config", to_app)}


@contextmanager
def running(command: str, model: str, port: int, place: Path, *options: str) -> Iterator[psutil.Process]:
    """A server's process, once it responds; its output is in ``place``/log, its temporary files in ``place``/tmp."""
    (place / "tmp").mkdir()
    # One thread: several that wait for each other would take seconds for an operation on cores that are shared.
    environment = os.environ | {"TMPDIR": str(place / "tmp"), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "nxtp", command, model, "--port", str(port), "--device", "cpu", *options]
    with open(place / "log", "w") as log:
        process = subprocess.Popen(call, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + START
        while True:
            with suppress(OSError):
                if ask(port, SERVERS[command][0])[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"nxtp {command} did not start: {(place / 'log').read_text()[-500:]}")
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(TIMEOUT)
        finally:
            process.kill()


def used(server: psutil.Process) -> tuple[float, int]:
    """Megabytes and open files of the server's processes."""
    tree = [server, *server.children(recursive=True)]
    return sum(each.memory_info().rss for each in tree) / 1e6, sum(each.num_fds() for each in tree)


def load(command: str, model: str, minutes: float, clients: int, max_mb: int = 2) -> dict[str, Any]:
    """One server under ``clients`` that each send the next request, of a random kind, when the last has ended."""
    requests: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    waits: list[float] = []

    def client(end: float) -> None:
        while time.monotonic() < end:
            (kind,) = random.choices([*SHARES], [*SHARES.values()])
            request = random.choice(kinds[kind])
            begin = time.monotonic()
            try:
                status, text = request.send()
            except (OSError, HTTPException) as error:
                status, text = -1, type(error).__name__
            requests[kind] += 1
            if status not in request.statuses or request.text not in text:
                errors[f"{kind}: {text if status < 0 else status}"] += 1
            elif kind == "good":
                waits.append(time.monotonic() - begin)

    with tempfile.TemporaryDirectory() as directory:
        place, port = Path(directory), find_free_network_port()
        with running(command, model, port, place, "--max-mb", str(max_mb)) as server:
            kinds = SERVERS[command][1](port, max_mb << 20)
            for _ in range(WARM):
                kinds["good"][0].send()
            begin = used(server)
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(client, [time.monotonic() + 60 * minutes] * clients))
            end = used(server)
        log = (place / "log").read_text()
        left = sorted(path.name for path in (place / "tmp").iterdir())
    return {
        "requests": dict(requests),
        "errors": dict(errors),
        "p95": 1e3 * float(np.percentile(waits, 95)) if waits else None,
        "memory": (begin[0], end[0]),
        "files": (begin[1], end[1]),
        "tracebacks": log.count("Traceback"),
        "left": left,
    }


def measure(*, model: str | None, server: str, minutes: float, clients: int) -> dict[str, Any]:
    names = [*SERVERS] if server == "both" else [server]
    with tempfile.TemporaryDirectory() as directory:
        if model is None:
            model = directory
            tokenizer, config = train_tokenizer(WORDS, vocab_size=400), tiny().config
            Recognizer(Model(config, len(tokenizer)), tokenizer, config, {}).save_pretrained(model)
        rows = {name: load(name, model, minutes, clients) for name in names}
    return {"rows": rows, "minutes": minutes, "clients": clients, "machine": machine_description("cpu")}


def table(result: dict[str, Any]) -> Table:
    found = result["rows"].values()

    def wrong(row: dict[str, Any], kind: str) -> int:
        return sum(count for name, count in row["errors"].items() if name.startswith(kind))

    rows = [
        (f"{kind} requests, errors", *(f"{row['requests'].get(kind, 0):,}, {wrong(row, kind):,}" for row in found))
        for kind in SHARES
    ]
    rows += [
        ("good: p95 ms", *("" if row["p95"] is None else f"{row['p95']:,.0f}" for row in found)),
        ("memory MB, start → end", *("{:,.0f} → {:,.0f}".format(*row["memory"]) for row in found)),
        ("open files, start → end", *("{:,} → {:,}".format(*row["files"]) for row in found)),
        ("tracebacks", *(str(row["tracebacks"]) for row in found)),
        ("temporary files left", *(str(len(row["left"])) for row in found)),
    ]
    kinds = [f"{name} ({count})" for row in found for name, count in sorted(row["errors"].items())]
    caption = (
        f"Errors: {', '.join(kinds) or 'none'}. {result['minutes']:g} minutes each, {result['clients']} clients, which "
        f"share the machine with the server. {machine_line(result['machine'])}"
    )
    return build_table(
        "Good, bad, slow and broken requests", ["", *(f"nxtp {name}" for name in result["rows"])], rows, caption
    )


@click.command()
@as_json
@click.option("--model", help="A model directory; by default a tiny one of random weights.")
@click.option("--server", type=click.Choice([*SERVERS, "both"]), default="both", show_default=True)
@click.option("--minutes", type=click.FloatRange(0.01, 60), default=5, show_default=True, help="Per server.")
@number("--clients", 12, "Requests in flight at a time.")
def soak(**options: Any) -> None:
    """Good, bad, slow and broken requests against nxtp serve and nxtp app."""
    show(measure, table, **options)


if __name__ == "__main__":
    soak()
