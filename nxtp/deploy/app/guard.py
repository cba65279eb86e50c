"""Limits that apply before gradio sees a request: size and number of uploads; gradio fetches no URL."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = "/gradio_api/upload"
_ELSEWHERE = re.compile(r"/(file=\s*https?:|proxy=)", re.IGNORECASE)  # gradio would fetch it for any client
_OVERHEAD = 1 << 16  # of a form around a file


class UploadGuard:
    """ASGI middleware.

    Args:
        directory: where gradio stores uploads, a directory each.
        max_bytes: size of an upload; a larger one is refused (413), by its announced or its actual length.
        kept: uploads that are kept; the oldest are deleted.
        at_once: concurrent uploads; further ones are refused (429).
    """

    def __init__(self, app: ASGIApp, directory: Path, max_bytes: int, kept: int, at_once: int = 16):
        self.app, self.directory, self.max_bytes, self.kept = app, directory, max_bytes, kept
        self._examples = set(directory.iterdir())
        self._free = asyncio.Semaphore(at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _ELSEWHERE.search(scope["path"]):
            return await _refusal(403, "nothing from elsewhere")(scope, receive, send)
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith(UPLOAD):
            return await self.app(scope, receive, send)
        limit = self.max_bytes + _OVERHEAD
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            return await _refusal(413, f"too large: at most {self.max_bytes >> 20} MB")(scope, receive, send)
        if self._free.locked():
            return await _refusal(429, "too many uploads at a time: try again")(scope, receive, send)
        received, responded = 0, False

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:  # its length was not announced, or was wrong
                return {"type": "http.disconnect"}
            return message

        async def noted(message: Message) -> None:
            nonlocal responded
            responded = True
            await send(message)

        async with self._free:
            self._tidy()
            try:
                await self.app(scope, bounded, noted)
            except Exception:
                if received <= limit or responded:
                    raise
                await _refusal(413, f"too large: at most {self.max_bytes >> 20} MB")(scope, receive, send)

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


def _refusal(status: int, why: str) -> PlainTextResponse:
    return PlainTextResponse(why, status_code=status, headers={"connection": "close"})
