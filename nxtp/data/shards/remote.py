"""Remote files through fsspec: listing, and transfers that resume after a fault."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

from nxtp.errors import UserError, one_line

for driver in ("aiobotocore", "botocore"):
    logging.getLogger(driver).setLevel(logging.WARNING)  # they log where credentials come from
PART = 1 << 22  # bytes of a range
_CHUNK = 1 << 20  # bytes of a stream under one timeout
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
Chunks = Iterator[tuple[int | None, bytes]]  # size of the whole file, if known, and the next bytes


class RemoteError(OSError):
    """A remote file is not available; ``kind`` is counted: "unreachable shard" or "stalled shard"."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple:
        return RemoteError, (self.kind, self.detail)


class Pace:
    """The timeout for a part of a file: ten times the usual time, at most ``limit`` seconds.

    So a stalled connection is replaced after seconds, and a slow network does not time out.
    """

    def __init__(self, limit: float):
        self.limit, self._usual = limit, limit / 300

    def patience(self, failures: int) -> float:
        """Seconds for the next part after ``failures`` in a row."""
        return min(self.limit, max(1.0, 10 * self._usual) * 4**failures)

    def took(self, seconds: float) -> None:
        self._usual = max(seconds, 0.95 * self._usual)


def open_store(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the file's path in it.

    Raises:
        UserError: no such file system is installed.
    """
    from fsspec.core import url_to_fs  # imported here: local shards need neither

    scheme, options = url.split("://", 1)[0], {}
    if scheme in ("http", "https"):  # the environment's proxies; transfers of any length
        import aiohttp

        options["client_kwargs"] = {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None)}
    try:
        return url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        extra = _EXTRAS.get(scheme)
        advice = f"pip install 'nxtp[{extra}]'" if extra else "a command can be used: 'pipe:COMMAND'"
        raise UserError(f"{url} cannot be opened ({error}): {advice}.") from error


def find_files(url: str, *, matching: bool = False) -> list[dict[str, Any]]:
    """Entries of a remote directory (a file is its own entry), or with ``matching`` those that a glob finds.

    Each has ``url``, ``type`` ("file" or "directory") and ``size``.

    Raises:
        UserError: it cannot be listed.
    """
    store, path = open_store(url)
    try:
        found = list(store.glob(path, detail=True).values()) if matching else store.ls(path, detail=True)
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has errors of its own
        reason = one_line(error)[:200] or type(error).__name__
        raise UserError(f"{url} cannot be listed: {reason.rstrip('.')}. Check address and credentials.") from error
    before = url.removesuffix("/").removesuffix(path)  # what comes before a path in this store
    return [entry | {"url": before + store._strip_protocol(entry["name"])} for entry in found]


def read_file(url: str, pace: Pace, retries: int) -> bytes:
    """The content of a small file; raises as :func:`transfer`."""
    file = io.BytesIO()
    transfer(url, file, pace, retries, lambda total, size: None)
    return file.getvalue()


def transfer(url: str, file: Any, pace: Pace, retries: int, arrived: Callable[[int | None, int], None]) -> None:
    """Write a remote file, or the output of a ``pipe:`` command, to an empty file.

    Args:
        arrived: called after every write with the size of the whole file, if known, and the bytes written.

    Raises:
        RemoteError, UserError: as :func:`received`.
        OSError: the local file cannot be written.
    """
    for total, begin, data in received(url, 0, pace, retries):
        if begin == 0 and file.tell():  # a command starts over
            file.seek(0)
            file.truncate()
        _write(file, data)
        arrived(total, len(data))


def received(url: str, start: int, pace: Pace, retries: int) -> Iterator[tuple[int | None, int, bytes]]:
    """Yield a remote file from byte ``start`` on: size of the whole file, if known; offset of the next bytes; these.

    After a fault the transfer resumes at the same offset (a command starts over), after a longer pause each time.

    Args:
        retries: faults in a row that are allowed.

    Raises:
        RemoteError: the file is not available.
        UserError: no file system for this kind of URL is installed.
    """
    have, total, failures, failed_at = start, None, 0, start
    while True:
        try:
            for total, data in _chunks(url, have, pace, failures):
                yield total, have, data
                have += len(data)
                if total is not None and have - failed_at >= _CHUNK:
                    failures = 0
            if total is not None and have < total:
                raise OSError(f"it ended after {have:,} of {total:,} bytes")
            return
        except UserError:
            raise
        except Exception as error:  # each store has errors of its own
            failures, failed_at = failures + 1, have
            if have == total:
                return
            if failures > retries or _permanent(error):
                if isinstance(error, RemoteError):
                    raise
                kind = "stalled shard" if isinstance(error, TimeoutError) else "unreachable shard"
                reason = "not found" if isinstance(error, FileNotFoundError) else one_line(error)
                raise RemoteError(kind, reason[:200] or type(error).__name__) from error
            if url.startswith("pipe:"):
                have = 0
            time.sleep(pace.limit / 240 * 2 ** (failures - 1) * random.uniform(0.5, 1.5))


class ForwardFile:
    """A remote file for reading forwards, as :class:`~nxtp.data.shards.tar_index.LocalFile`.

    Gaps longer than :data:`PART` are not transferred. Every method raises as :func:`received`.
    """

    arrived = True
    _begin: int  # offset of the data in memory
    _data: bytes
    _chunks: Iterator[tuple[int | None, int, bytes]]

    def __init__(self, url: str, pace: Pace, retries: int):
        self._url, self._pace, self._retries = url, pace, retries
        self._start(0)
        self._total, *_ = first = next(self._chunks, (0, 0, b""))
        self._data = first[2]

    @property
    def stamp(self) -> tuple[int, int]:
        """Its size, -1 if the server does not report it, and 0: there is no mtime."""
        return -1 if self._total is None else self._total, 0

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on; fewer only at the end of the file."""
        if not self._begin <= offset <= self._begin + len(self._data) + PART:
            if offset >= self.stamp[0]:
                return b""
            self._start(offset)
        while self._begin + len(self._data) < offset + size and (chunk := next(self._chunks, None)):
            kept = self._data[max(offset - self._begin, 0) :]
            self._begin, self._data = chunk[1] - len(kept), kept + chunk[2]
        begin = max(offset - self._begin, 0)
        return self._data[begin : begin + size]

    def _start(self, offset: int) -> None:
        self._begin, self._data = offset, b""
        self._chunks = received(self._url, offset, self._pace, self._retries)


def _permanent(error: Exception) -> bool:
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return refused or isinstance(error, FileNotFoundError | PermissionError)


def _write(file: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _chunks(url: str, start: int, pace: Pace, failures: int) -> Chunks:
    """The bytes of a file from ``start`` on."""
    if url.startswith("pipe:"):
        yield from _of_command(url.removeprefix("pipe:"), pace.limit)
        return
    store, path = open_store(url)
    patience = pace.patience(failures)

    def wait(work: Coroutine, since: float | None = None) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, store.loop)
        try:
            return future.result(patience if since is None else max(0, since + patience - time.monotonic()))
        except TimeoutError:
            raise RemoteError("stalled shard", f"too little data for {patience:g} s") from None
        finally:
            future.cancel()

    if url.startswith(("http://", "https://")):
        yield from _streamed(store, path, start, wait, pace)
        return
    # A store without coroutines has its own timeouts.
    size = (wait(store._info(path)) if store.async_impl else store.info(path))["size"]
    for begin in range(start, size, PART):
        end, clock = min(begin + PART, size), time.monotonic()
        part = {"start": begin, "end": end}
        data = wait(store._cat_file(path, **part)) if store.async_impl else store.cat_file(path, **part)
        if len(data) != end - begin:
            raise OSError(f"{len(data):,} bytes at {begin:,} in place of {end - begin:,}")
        pace.took(time.monotonic() - clock)
        yield size, data


def _streamed(store: Any, url: str, start: int, wait: Callable[..., Any], pace: Pace) -> Chunks:
    """One response of a web server, which may ignore the range."""

    async def get() -> Any:
        session = await store.set_session()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        response = await session.get(store.encode_url(url), headers=headers)
        store._raise_not_found_for_status(response, url)
        if response.content_type == "text/html":
            raise OSError("a web page came in its place: check the address, and proxies")
        return response

    response = wait(get())
    try:
        before = start if response.status == 206 else 0
        length, ranges = response.content_length, response.headers.get("Content-Range", "")
        total = int(ranges.rpartition("/")[2]) if ranges[-1:].isdigit() else length and length + before
        skip, size, begin = start - before, 0, time.monotonic()
        while data := wait(response.content.readany(), begin):
            if kept := data[skip:]:
                yield total, kept
            skip, size = max(skip - len(data), 0), size + len(data)
            if size >= _CHUNK:
                pace.took(time.monotonic() - begin)
                size, begin = 0, time.monotonic()
    finally:
        store.loop.call_soon_threadsafe(response.close)


def _of_command(command: str, limit: float) -> Chunks:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            ready = select.poll()
            ready.register(process.stdout, select.POLLIN)
            while True:
                if not ready.poll(1000 * limit):
                    raise RemoteError("stalled shard", f"no data for {limit:g} s")
                if not (data := os.read(process.stdout.fileno(), _CHUNK)):
                    break
                yield None, data
            if code := process.wait(limit):
                raise OSError(f"exit code {code}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the shell and its children
