"""Limits on uploads, before gradio sees them: size, number at a time, and how many are kept."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

UPLOAD = "/gradio_api/upload"
_OVERHEAD = 1 << 16  # of a form around a file


class UploadGuard:
    """An ASGI application in front of another.

    Args:
        directory: where uploads are kept, one folder each; the oldest beyond ``kept`` are deleted.
        max_bytes: of an upload; a longer one is refused (413), by its announced length or when it has become too long.
        at_once: uploads that may run at a time; others are refused (429).
    """

    def __init__(self, app: ASGIApp, directory: Path, max_bytes: int, at_once: int = 16, kept: int = 200):
        self.app, self.directory, self.max_bytes, self.kept = app, directory, max_bytes, kept
        self._free = asyncio.Semaphore(at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith(UPLOAD):
            return await self.app(scope, receive, send)
        limit = self.max_bytes + _OVERHEAD
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            return await _refusal(413, f"too large: at most {self.max_bytes >> 20} MB")(scope, receive, send)
        if self._free.locked():
            return await _refusal(429, "too many uploads at a time: try again")(scope, receive, send)
        received = 0

        async def bounded() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:  # a length that was not announced, or a lie
                return {"type": "http.disconnect"}
            return message

        async with self._free:
            await self.app(scope, bounded, send)
            self._tidy()

    def _tidy(self) -> None:
        """Delete the oldest uploads beyond ``kept``."""
        folders = sorted((path for path in self.directory.iterdir() if path.is_dir()), key=_age)
        for folder in folders[: -self.kept]:
            shutil.rmtree(folder, ignore_errors=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _refusal(status: int, why: str) -> PlainTextResponse:
    return PlainTextResponse(why, status_code=status, headers={"connection": "close"})
