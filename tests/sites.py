"""A web server on this machine that fails as asked."""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("stall", "reset", "503", "trickle", "truncated")


class Site(SimpleHTTPRequestHandler):
    """Serves a directory, in ranges too.

    ``stall`` names files of which only the beginning is ever sent. ``fault`` is called with a file's name and how often
    it has been asked for, and returns what goes wrong: one of FAULTS, or None. ``bytes_per_s`` of a connection, after
    ``latency`` seconds; ``held`` is an event before which only the first half of a file is sent.
    """

    stall: tuple[str, ...] = ()
    fault: Callable[[str, int], str | None] = staticmethod(lambda name, times: None)
    asked: list[str] = []  # noqa: RUF012
    ranges: list[str] = []  # noqa: RUF012
    stopped = threading.Event()
    held: threading.Event | None = None
    bytes_per_s, latency = 0.0, 0.0

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        self.asked.append(name)
        self.stopped.wait(self.latency)
        fault = "stall" if name in self.stall else self.fault(name, Counter(self.asked)[name])
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        if fault == "503":
            return self.send_error(503)
        body, begin = path.read_bytes(), 0
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(match[1]), min(int(match[2] or len(body) - 1) + 1, len(body))
            self.ranges.append(match[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(body)}")
            body = body[begin:end]
        else:
            self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = 100 if name in self.stall else len(body) // 2
        self.send(body[:half])
        if self.held is not None:
            self.held.wait(20)
        if fault == "stall":
            self.stopped.wait(20)
        elif fault == "trickle":
            for place in range(half, len(body)):
                if self.stopped.wait(0.1):
                    break
                self.wfile.write(body[place : place + 1])
        elif fault == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault is None:
            self.send(body[half:])
        self.close_connection = True

    def send(self, data: bytes) -> None:
        size = 1 << 18 if self.bytes_per_s else len(data) or 1
        for place in range(0, len(data), size):
            self.wfile.write(data[place : place + size])
            if self.bytes_per_s:
                time.sleep(size / self.bytes_per_s)

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # a client that went away


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


@contextmanager
def serving(root: Path | str, stall: tuple[str, ...] = (), **settings) -> Iterator[tuple[str, type[Site]]]:
    """(address, handler) of a server of ``root`` on this machine; ``settings`` are attributes of :class:`Site`."""
    own = {"asked": [], "ranges": [], "stopped": threading.Event(), "stall": stall}
    if "fault" in settings:
        settings["fault"] = staticmethod(settings["fault"])
    handler = type("Handler", (Site,), own | settings)
    server = _Server(("127.0.0.1", 0), partial(handler, directory=os.fspath(root)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        handler.stopped.set()
        server.shutdown()
        server.server_close()
