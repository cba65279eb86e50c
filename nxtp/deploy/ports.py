"""Ports of this machine."""

from __future__ import annotations

import socket

from nxtp.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # reached from this machine only


def check_free(host: str, port: int) -> None:
    """
    Raises:
        UserError: the port is in use, or the address is not one of this machine.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        advice = "choose another --port or --host"
        raise UserError(f"Cannot serve at {host}:{port} ({error.strerror}): {advice}.") from error
