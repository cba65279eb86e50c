"""Remote shards: fetched whole into a local cache of bounded size, each once per machine."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nxtp.data.shards.manifest import MANIFEST
from nxtp.errors import UserError
from nxtp.runs.atomic import atomic_file

log = logging.getLogger(__name__)

RETRY_AFTER = 300.0  # seconds before a shard that could not be fetched is tried again
_FETCHES = 20  # of one file that other processes delete as soon as it exists


class RemoteError(OSError):
    """A remote file is not available now; ``kind`` is what is counted: "unreachable shard" or "stalled shard"."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class RemoteCache:
    """Fetched shards in ``directory``; above ``limit`` bytes the least recently used are deleted.

    Processes share it: one of them fetches a file while the others wait. An open file stays readable after its
    deletion. A transfer without progress for ``read_timeout`` seconds fails.
    """

    def __init__(self, directory: Path | str, limit: int | None = None, read_timeout: float = 60.0):
        self.directory, self.limit, self.read_timeout = Path(directory), limit, read_timeout
        self._failed: dict[str, tuple[float, RemoteError]] = {}

    def path_of(self, url: str) -> Path:
        """The local file of a remote shard: a hash of its URL, and the URL's end for people."""
        tail = re.sub(r"[^\w.-]+", "_", url.removesuffix(".tar"))[-60:]
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}.tar"

    def fetch(self, url: str) -> Path:
        """The local file of ``url``, fetched if it is missing.

        Raises:
            RemoteError: it is not available; repeated for :data:`RETRY_AFTER` seconds without another attempt.
            UserError: no file system for this kind of URL is installed.
        """
        path = self.path_of(url)
        if path.exists():
            with suppress(OSError):
                os.utime(path)  # the time of use
            return path
        if url in self._failed and time.monotonic() - self._failed[url][0] < RETRY_AFTER:
            raise self._failed[url][1]
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                try:
                    with atomic_file(path) as file:
                        copy(url, file.name, self.read_timeout)
                except RemoteError as error:
                    log.warning("%s: %s", url, error)
                    self._failed[url] = (time.monotonic(), error)
                    raise
                self._trim(keep=path)
        return path

    def opened(self, url: str) -> BinaryIO:
        """The fetched file of ``url``, unbuffered; fetched again if another process deletes it in between.

        Raises:
            RemoteError, UserError: as :meth:`fetch`.
        """
        for _ in range(_FETCHES):
            with suppress(FileNotFoundError):
                return open(self.fetch(url), "rb", buffering=0)
        raise RemoteError("unreachable shard", f"deleted {_FETCHES} times before it was opened; is the cache small?")

    def counts(self, urls: Sequence[str]) -> dict[str, int]:
        """Samples of the ``urls`` that the manifest beside them lists: these need not be fetched to be counted."""
        found: dict[str, int] = {}
        directories: dict[str, list[str]] = {}
        for url in urls:
            if not url.startswith("pipe:"):  # nothing is beside a command
                directories.setdefault(url.rsplit("/", 1)[0], []).append(url)
        for directory, members in directories.items():
            try:
                with tempfile.NamedTemporaryFile() as file:
                    copy(f"{directory}/{MANIFEST}", file.name, self.read_timeout)
                    rows = json.loads(Path(file.name).read_bytes())["shards"]
                samples = {row["name"]: int(row["samples"]) for row in rows}
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s: no manifest (%s); every shard is fetched once to count its samples.", directory, error)
                continue
            found |= {url: samples[name] for url in members if (name := url.rsplit("/", 1)[1]) in samples}
        return found

    def _trim(self, keep: Path) -> None:
        if self.limit is None:
            return
        with _locked(self.directory / ".trim.lock"):
            files = []
            for file in self.directory.glob("*.tar"):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    files.append((status.st_mtime_ns, status.st_size, file))
            excess = sum(size for _, size, _ in files) - self.limit
            for _, size, file in sorted(files):
                if excess > 0 and file != keep:
                    file.unlink(missing_ok=True)
                    excess -= size


def copy(url: str, path: str, timeout: float) -> None:
    """Write a remote file, or the output of a ``pipe:`` command, to a local file.

    Raises:
        RemoteError: it is not available, or the local file does not grow for ``timeout`` seconds.
        UserError: no file system for this kind of URL is installed.
    """
    size = 0
    try:
        wait, stop = (_start_command if url.startswith("pipe:") else _start_transfer)(url, path)
        try:
            while True:
                with suppress(TimeoutError, subprocess.TimeoutExpired):
                    return wait(timeout)
                before, size = size, os.path.getsize(path)
                if size == before:
                    raise RemoteError("stalled shard", f"no data for {timeout:g} s")
        finally:
            stop()
    except (RemoteError, UserError):
        raise
    except Exception as error:  # each store has errors of its own
        raise RemoteError("unreachable shard", (str(error) or type(error).__name__)[:200]) from error


def _start_transfer(url: str, path: str) -> tuple[Callable[[float], Any], Callable[[], Any]]:
    """Start to fetch ``url``; how to wait for its end, and how to stop it."""
    import aiohttp  # imported here: local shards need neither
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):  # the environment's proxies; transfers of any length
        options["client_kwargs"] = {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None)}
    try:
        store, remote = url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url} cannot be opened ({error}); a command can be used: 'pipe:COMMAND'.") from error
    if not store.async_impl:  # such a store has its own time limits
        return lambda timeout: store.get_file(remote, path), lambda: None
    transfer = asyncio.run_coroutine_threadsafe(store._get_file(remote, path), store.loop)
    return transfer.result, transfer.cancel


def _start_command(url: str, path: str) -> tuple[Callable[[float], Any], Callable[[], Any]]:
    with open(path, "wb") as file:
        process = subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=file, start_new_session=True)

    def wait(timeout: float) -> None:
        if code := process.wait(timeout):
            raise OSError(f"exit code {code}")

    def stop() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
        process.wait()

    return wait, stop


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
