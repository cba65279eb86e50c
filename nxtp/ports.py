"""Whether an address of this machine can be served at."""

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
