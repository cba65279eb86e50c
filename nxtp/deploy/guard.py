"""Limits of both servers, which apply before LitServe or gradio sees a request: its time, its host."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from nxtp.deploy.ports import LOOPBACK

RECEIVE_SECONDS = 60  # in which a request must arrive
MAX_INCOMPLETE = 64  # connections on which a request is expected or has begun; one more closes the oldest of them


class Deadline(asyncio.Protocol):
    """A mixin of uvicorn's protocols, which wait forever for the rest of a request."""

    connections: set[Any]
    cycle: Any  # of request and response
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.more_body and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Of uvicorn, when it ends; it would wait for the rest."""
        if self._timer:
            self._end()
        else:
            super().shutdown()  # type: ignore[misc]

    def _start(self) -> None:
        incomplete = [each for each in self.connections if getattr(each, "_timer", None)]  # a web socket has none
        if len(incomplete) >= MAX_INCOMPLETE:
            min(incomplete, key=lambda each: each._began)._end()
        self._began = time.monotonic()  # the loop's time may be the same for several
        self._timer = self.loop.call_later(RECEIVE_SECONDS, self._end)

    def _stop(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._stop()
        self.transport.abort()


TimedProtocol = type("TimedProtocol", (Deadline, AutoHTTPProtocol), {})


def trusted_hosts(host: str) -> Middleware:
    """On this machine only its own names are allowed as Host, so that DNS rebinding does not open it to other sites."""
    allowed = ["localhost", "127.0.0.1", "[::1]"] if host in LOOPBACK else ["*"]
    return Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)
