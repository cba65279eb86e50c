"""Ports of this machine: a free one, and whether an address can be served at."""

from __future__ import annotations

import socket

from nxtp.errors import UserError


def check_free(host: str, port: int) -> None:
    """
    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(where)
    except OSError as error:
        advice = "choose another --port or --host"
        raise UserError(f"{host}:{port} cannot be served at ({error.strerror}): {advice}.") from error


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
