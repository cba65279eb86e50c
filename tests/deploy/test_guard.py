"""Requests that never arrive whole are closed, and do not keep others out."""

import socket
import threading
import time
from contextlib import closing, suppress

import pytest
import uvicorn
from helpers import free_port
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from nxtp.deploy import guard

HALVES = {
    "nothing": b"",
    "half a head": b"POST / HTTP/1.1\r\nHost: x\r\n",
    "half a body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc",
}
WHOLE = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"


async def echo(request: Request) -> Response:
    with suppress(ClientDisconnect):
        return Response(await request.body())
    return Response()


@pytest.fixture(scope="module", params=[guard.TimedProtocol, type("H11", (guard.Deadline, H11Protocol), {})])
def address(request):
    """Of a server in a thread."""
    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    config = uvicorn.Config(app, port=free_port(), http=request.param, log_level="warning", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield "127.0.0.1", config.port
    with closing(connect(("127.0.0.1", config.port), HALVES["half a body"])):
        time.sleep(0.1)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "it waits for a half request when it ends"


def connect(address, data: bytes) -> socket.socket:
    opened = socket.create_connection(address, timeout=20)
    opened.sendall(data)
    return opened


def is_closed(connection: socket.socket) -> bool:
    """Waits for it, within the timeout of the connection."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize("half", HALVES)
def test_a_half_request_has_a_deadline(address, monkeypatch, half):
    monkeypatch.setattr(guard, "RECEIVE_SECONDS", 0.2)
    with closing(connect(address, HALVES[half])) as connection:
        assert is_closed(connection)


def test_a_whole_request_has_none_but_the_next_on_its_connection(address, monkeypatch):
    with closing(connect(address, WHOLE)) as connection:
        assert connection.recv(1000).endswith(b"abc")
        monkeypatch.setattr(guard, "RECEIVE_SECONDS", 0.2)
        connection.settimeout(0.5)
        assert not is_closed(connection), "an idle connection is uvicorn's to close"
        connection.sendall(WHOLE)
        assert connection.recv(1000).endswith(b"abc")
        connection.sendall(HALVES["half a head"])
        assert is_closed(connection)


def test_stalled_requests_keep_nobody_out(address, monkeypatch):
    monkeypatch.setattr(guard, "MAX_INCOMPLETE", 8)
    stalled = [connect(address, half) for _ in range(3) for half in HALVES.values()]
    assert is_closed(stalled[0]), "the oldest of nine"
    with closing(connect(address, WHOLE)) as connection:
        assert connection.recv(1000).endswith(b"abc")
    stalled[-1].settimeout(0.1)
    assert not is_closed(stalled[-1])
    for each in stalled:
        each.close()
