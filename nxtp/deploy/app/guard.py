"""Limits that apply before gradio sees a request: size of a body, number of uploads; no URL is fetched for a client."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = "/gradio_api/upload"
_ELSEWHERE = re.compile(r"/(file=\s*https?:|proxy=)", re.IGNORECASE)  # gradio would fetch it for any client
_OVERHEAD = 1 << 16  # of a form around a file
MAX_QUESTION = 1 << 20  # bytes of any other body: a list of classes is the largest
HEADERS = {
    # gradio's page has inline scripts and styles, and compiles click.js; nothing is loaded from or sent elsewhere.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


class PageGuard:
    """ASGI middleware.

    Args:
        directory: where gradio stores uploads, a directory each.
        max_bytes: size of an upload; a larger one is refused (413), by its announced or its actual length.
        kept: uploads that are kept; the oldest are deleted.
    """

    def __init__(self, app: ASGIApp, directory: Path, max_bytes: int, kept: int):
        self.directory, self.kept = directory, kept
        self.uploads = RequestBodyLimitMiddleware(app, max_bytes + _OVERHEAD)
        self.others = RequestBodyLimitMiddleware(app, MAX_QUESTION)
        self._examples = set(directory.iterdir())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app: ASGIApp = self.others
        if scope["type"] == "http" and _ELSEWHERE.search(scope["path"]):
            app = PlainTextResponse("nothing from elsewhere", status_code=403)
        elif scope["type"] == "http" and scope["path"].rstrip("/").endswith(UPLOAD):
            app = self.uploads
            self._tidy()
        with suppress(ClientDisconnect):  # gradio would log a traceback
            await app(scope, receive, send_with_headers)

    def _tidy(self) -> None:
        """Delete the oldest uploads: with the next one there are ``kept``."""
        found = sorted((path for path in self.directory.iterdir() if path not in self._examples), key=_age)
        for path in found[: max(0, len(found) - self.kept + 1)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:  # of an aborted upload
                path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
