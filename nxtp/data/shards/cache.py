"""A local cache of remote shards. Each shard is fetched once per machine, and can be read while it arrives."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from nxtp.data.shards.remote import Pace, RemoteError, transfer
from nxtp.data.shards.tar_index import OpenFile
from nxtp.errors import UserError

log = logging.getLogger(__name__)

RETRY_AFTER = 300.0  # seconds before a shard that could not be fetched is tried again
_NOTE = 4096  # bytes of a lock file, in which a transfer reports to other processes
T = TypeVar("T")


class RemoteCache:
    """Fetched shards in ``directory``, shared by the processes of a machine.

    One process fetches a shard; the others read what has arrived. Above ``limit`` bytes the shards fetched or
    prefetched longest ago are deleted; an open file stays readable. A transfer resumes after a fault or a timeout (at
    most ``read_timeout`` seconds, see :class:`Pace`), up to ``retries`` times in a row. All processes see a failure,
    and do not try again for :data:`RETRY_AFTER` seconds.
    """

    def __init__(self, directory: Path | str, limit: int | None = None, read_timeout: float = 60.0, retries: int = 3):
        self.directory, self.limit, self.retries = Path(directory), limit, retries
        self.pace = Pace(read_timeout)
        self.usage: Counter = Counter()  # samples read ("reads"), those that did not wait ("hits"), "waits"
        self._arrived: deque[tuple[int, int]] = deque()  # (process id, bytes that it fetched)
        self._begin = time.time()  # failures of earlier runs do not count

    def path_of(self, url: str) -> Path:
        """The local file of a remote shard: a hash of its URL, and the end of the URL for readers."""
        tail = re.sub(r"[^\w.-]+", "_", url.removesuffix(".tar"))[-60:]
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}.tar"

    def fetch(self, url: str, *, background: bool = False) -> None:
        """Fetch ``url`` unless it is in the cache, or another thread or process fetches it.

        Raises:
            RemoteError: it is not available now (not with ``background``), or was not a while ago.
            UserError: no file system for this kind of URL is installed; the cache cannot be written.
        """
        path = self.path_of(url)
        if path.exists():
            if not background:
                with suppress(OSError):
                    os.utime(path)  # deleted later
            return
        lock = file = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = _lock(path.with_suffix(".lock"))
            if lock is not None and not path.exists():
                self._check(url)
                _write_note(lock, {})
                file = open(path.with_suffix(".part"), "wb", buffering=0)  # noqa: SIM115  closed by the transfer
        except RemoteError:
            raise
        except OSError as error:
            raise _local_error(self.directory, error) from error
        finally:
            if lock is not None and file is None:
                _unlock(lock)
        if lock is None or file is None:
            return
        if background:
            threading.Thread(target=self._transfer_quietly, args=(url, lock, file), daemon=True).start()
        else:
            self._transfer(url, lock, file)

    def open(self, url: str) -> RemoteFile:
        """Open ``url`` for reading, and fetch it if it is missing; raises as :meth:`fetch`."""
        return RemoteFile(self, url)

    def take_over(self, url: str) -> None:
        """Unlink the files of another process's stalled transfer, so that this process can fetch the shard."""
        for suffix in (".lock", ".part"):
            self.path_of(url).with_suffix(suffix).unlink(missing_ok=True)

    def _check(self, url: str) -> None:
        """Raise the recent failure of ``url``, if any: RemoteError or UserError."""
        note = self.note(url)
        if self._begin <= note.get("time", 0) and time.time() - note["time"] < RETRY_AFTER:
            raise UserError(note["fatal"]) if "fatal" in note else RemoteError(note["kind"], note["detail"])

    def note(self, url: str) -> dict[str, Any]:
        """Report of the last transfer of ``url``: ``bytes`` of the whole file, or its failure."""
        with suppress(OSError, ValueError):
            return json.loads(self.path_of(url).with_suffix(".lock").read_bytes())
        return {}

    def take_usage(self) -> Counter:
        """Counts of this process since the last call: :attr:`usage`, and "bytes" fetched."""
        taken, self.usage = self.usage, Counter()
        with suppress(IndexError):
            while True:
                process, size = self._arrived.popleft()
                taken["bytes"] += size * (process == os.getpid())
        return taken

    def _transfer(self, url: str, lock: int, file: BinaryIO) -> None:
        path = self.path_of(url)

        def arrived(total: int | None, size: int) -> None:
            if total is not None and total != known.get("bytes"):
                known["bytes"] = total
                _write_note(lock, known)
            self._arrived.append((os.getpid(), size))

        known: dict[str, int] = {}
        try:
            try:
                with file:
                    transfer(url, file, self.pace, self.retries, arrived)
                    os.fsync(file.fileno())
                    with suppress(FileNotFoundError):  # another process has taken over
                        if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                            os.replace(file.name, path)
            except RemoteError:
                raise
            except OSError as error:
                raise _local_error(path, error) from error
        except (RemoteError, UserError) as error:
            failure = {"fatal": str(error)[:600]}
            if isinstance(error, RemoteError):
                failure = {"kind": error.kind, "detail": error.detail}
                log.warning("%s: %s", url, error)
            _write_note(lock, {"time": time.time(), **failure})
            Path(file.name).unlink(missing_ok=True)
            raise
        finally:
            _unlock(lock)
        self._trim(keep=path)

    def _transfer_quietly(self, url: str, lock: int, file: BinaryIO) -> None:
        with suppress(RemoteError, UserError):  # a reader finds the failure in the note
            self._transfer(url, lock, file)

    def _trim(self, keep: Path) -> None:
        """Delete the parts of killed transfers, and the oldest files above the limit."""
        lock = _lock(self.directory / ".trim.lock", wait=True)
        assert lock is not None
        try:
            files = []
            for file in self.directory.iterdir():
                with suppress(FileNotFoundError):
                    status = file.stat()
                    if file.suffix == ".part" and (free := _lock(file.with_suffix(".lock"))) is not None:
                        log.info("%s: an unfinished transfer is removed (%d bytes).", file, status.st_size)
                        file.unlink(missing_ok=True)
                        _unlock(free)
                    elif file.suffix in (".tar", ".part"):
                        files.append((status.st_mtime_ns, status.st_size, file))
            excess = sum(size for _, size, _ in files) - (math.inf if self.limit is None else self.limit)
            for _, size, file in sorted(files):
                if excess > 0 and file != keep and file.suffix == ".tar":
                    file.unlink(missing_ok=True)
                    excess -= size
        finally:
            _unlock(lock)


class RemoteFile:
    """A remote shard that can be read while it arrives, as :class:`~nxtp.data.shards.tar_index.LocalFile`.

    Every method waits for the bytes that it needs.

    Raises:
        RemoteError, UserError: as :meth:`RemoteCache.fetch`.
    """

    def __init__(self, cache: RemoteCache, url: str):
        self._cache, self._url, self._path = cache, url, cache.path_of(url)
        self._file: OpenFile | None = None
        self._whole = False
        cache.fetch(url, background=True)  # first: it truncates the part of a killed transfer
        self._look()

    @property
    def arrived(self) -> bool:
        """Whether the whole file has arrived."""
        if not self._whole:
            self._look()
        return self._whole

    @property
    def stamp(self) -> tuple[int, int]:
        """Its size, and 0: the mtime of a fetched file means nothing."""
        size = self._wait(lambda: self._size() if self.arrived else self._cache.note(self._url).get("bytes"))
        return size, 0

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on; fewer only at the end of the file."""
        while True:
            self._wait(lambda: self._size() >= offset + size or self.arrived or None)
            assert self._file is not None
            whole, data = self._whole, os.pread(self._file.fileno(), size, offset)
            if len(data) == size or whole:  # else another transfer has started over
                return data

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size if self._file else 0

    def _look(self) -> None:
        """Open the whole file, or the part that has arrived."""
        with suppress(FileNotFoundError):
            self._file = OpenFile(self._path)
            self._whole = True
            return
        with suppress(FileNotFoundError):
            part = self._path.with_suffix(".part")
            if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), os.stat(part)):
                self._file = OpenFile(part)

    def _wait(self, found: Callable[[], T | None]) -> T:
        """Wait until ``found`` returns a value, and return it."""
        if (value := found()) is not None:
            return value
        cache, pause, size, deadline, taken_over = self._cache, 0.001, -1, 0.0, False
        cache.usage["waits"] += 1
        while (value := found()) is None:
            now = time.monotonic()
            if self._size() != size:
                size, deadline = self._size(), now + 2 * cache.pace.limit * (cache.retries + 1)
            elif now > deadline and taken_over:
                raise RemoteError("stalled shard", "other processes fetch it, and stand still")
            elif now > deadline:  # the process that fetches it is frozen, as by Ctrl-Z
                cache.take_over(self._url)
                size, taken_over = -1, True
            cache.fetch(self._url, background=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return value


def _local_error(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error.strerror}. Free some space or choose another data.cache_dir.")


def _lock(path: Path, wait: bool = False) -> int | None:
    """Lock the file ``path``: its descriptor, or None if it is locked already."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _unlock(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not unlock what a forked process has open too
    os.close(lock)


def _write_note(lock: int, note: dict[str, Any]) -> None:
    with suppress(OSError):
        os.pwrite(lock, json.dumps(note).encode()[:_NOTE].ljust(_NOTE), 0)
