"""Remote shards: fetched whole by WebDataset's openers into a local cache of bounded size, each once a machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil
import webdataset  # noqa: F401  makes webdataset.gopen a module in sys.modules and a function in the package

from nxtp.data.shards.manifest import MANIFEST
from nxtp.errors import UserError
from nxtp.runs.atomic import atomic_file

log = logging.getLogger(__name__)

RETRY_AFTER = 300.0  # seconds before a shard that could not be fetched is tried again
_CHUNK = 1 << 20
_FETCHES = 20  # of one file that others delete as soon as it is there
_MAX_MANIFEST_BYTES = 1 << 26
_openers = sys.modules["webdataset.gopen"]


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192):
    return _openers.Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode=mode, bufsize=bufsize)


_openers.gopen_schemes.setdefault("s3", _open_s3)  # the one common store that WebDataset leaves to its users


class RemoteError(OSError):
    """A remote file that cannot be had now; ``kind`` is the fault to count: "unreachable shard" or "stalled shard"."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class RemoteCache:
    """Fetched shards in ``directory``; where ``limit`` bytes are exceeded, the least recently used are deleted.

    Processes share it: each file is fetched by one of them while the others wait. A file that is open stays readable
    after its deletion. ``stall`` is how many seconds a transfer may stand still.
    """

    def __init__(self, directory: Path | str, limit: int | None = None, stall: float = 60.0):
        self.directory, self.limit, self.stall = Path(directory), limit, stall
        self._failed: dict[str, tuple[float, RemoteError]] = {}

    def path_of(self, url: str) -> Path:
        """Where a remote shard is kept: a hash of its URL, and the URL's end for people."""
        tail = re.sub(r"[^\w.-]+", "_", url.removesuffix(".tar"))[-60:]
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}.tar"

    def fetch(self, url: str) -> Path:
        """The local file of ``url``, fetched now if it is not there.

        Raises:
            RemoteError: it cannot be had; the same again for :data:`RETRY_AFTER` seconds without another try.
            UserError: no opener for this kind of URL, or its command is not installed.
        """
        path = self.path_of(url)
        if path.exists():
            with suppress(OSError):
                os.utime(path)  # used now
            return path
        at, error = self._failed.get(url, (-RETRY_AFTER, None))
        if time.monotonic() - at < RETRY_AFTER:
            raise error
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                try:
                    self._download(url, path)
                except RemoteError as problem:
                    log.warning("%s: %s", url, problem)
                    self._failed[url] = (time.monotonic(), problem)
                    raise
                self._trim(keep=path)
        return path

    def opened(self, url: str) -> BinaryIO:
        """The fetched file of ``url``, unbuffered; another process may trim the cache in between: then once more.

        Raises:
            RemoteError, UserError: as :meth:`fetch`.
        """
        for _ in range(_FETCHES):
            with suppress(FileNotFoundError):
                return open(self.fetch(url), "rb", buffering=0)
        raise RemoteError("unreachable shard", f"deleted {_FETCHES} times before it was opened; is the cache small?")

    def counts(self, urls: Sequence[str]) -> dict[str, int]:
        """Samples of those ``urls`` whose directory has a manifest: so they need not be fetched to be counted."""
        found: dict[str, int] = {}
        directories: dict[str, list[str]] = {}
        for url in urls:
            if not url.startswith("pipe:"):  # only commands that were given are run
                directories.setdefault(url.rsplit("/", 1)[0], []).append(url)
        for directory, members in directories.items():
            try:
                with _open(f"{directory}/{MANIFEST}") as source:
                    text = b"".join(_chunks(source, self.stall))
                if len(text) > _MAX_MANIFEST_BYTES:
                    raise ValueError("too large")
                samples = {row["name"]: int(row["samples"]) for row in json.loads(text)["shards"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s: no manifest (%s); every shard is fetched once to count its samples.", directory, error)
                continue
            for url in members:
                if (name := url.rsplit("/", 1)[1]) in samples:
                    found[url] = samples[name]
        return found

    def _download(self, url: str, path: Path) -> None:
        try:
            with atomic_file(path) as file, _open(url) as source:  # closing the source tells whether it failed
                for chunk in _chunks(source, self.stall):
                    file.write(chunk)
        except RemoteError:
            raise
        except OSError as error:
            raise RemoteError("unreachable shard", str(error)[:200]) from error

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
                if excess <= 0:
                    break
                if file != keep:
                    file.unlink(missing_ok=True)
                    excess -= size


def _open(url: str) -> BinaryIO:
    try:
        return _openers.gopen(url)
    except ValueError as error:
        raise UserError(f"{url} cannot be opened ({error}); a command can: 'pipe:COMMAND'.") from error
    except FileNotFoundError as error:
        raise UserError(f"{url} needs the command '{error.filename}', which is not installed.") from error


def _chunks(source, stall: float) -> Iterator[bytes]:
    """What ``source`` gives, until its end.

    Raises:
        RemoteError: nothing came for ``stall`` seconds; its process is ended.
    """
    process, stream = getattr(source, "proc", None), getattr(source, "stream", source)
    while True:
        if process is not None and not select.select([stream], [], [], stall)[0]:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            source.ignore_errors = True  # of how the process ended
            raise RemoteError("stalled shard", f"nothing came for {stall:g} s")
        chunk = stream.read1(_CHUNK) if hasattr(stream, "read1") else stream.read(_CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
