"""The index of a tar shard: where its samples are, by its headers alone. It is created once and stored on disk."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nxtp.data.shards.remote import RemoteError
from nxtp.data.shards.urls import IMAGE_EXTENSIONS, METADATA_NAME, split_name
from nxtp.runs.atomic import atomic_file

log = logging.getLogger(__name__)

HEADER = _BLOCK = 512  # bytes
_FORMAT = "6"  # of the files of an IndexStore
_INDEX = re.compile(r"[0-9a-f]{32}\.safetensors")
_UNFINISHED = re.compile(rf"\.{_INDEX.pattern}\..+\.tmp")  # by atomic_file
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError)
_MAX_HEADER_BYTES = 1 << 20  # of a long name or of pax records
_PADDING = 1 << 20  # bytes that are checked behind the end of a tar: writers pad with zeros
_IRREGULAR = {b"1": "link", b"2": "link", b"S": "sparse file"} | dict.fromkeys((b"3", b"4", b"6"), "special file")
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


@dataclass
class ShardIndex:
    """Where the samples of one shard are.

    ``keys``     of the samples
    ``rows``     int64 [samples, 7]: offset and size in bytes of image, text and JSON, -1 if absent; CRC-32 of their tar
                 headers, by which a replaced file is noticed
    ``stamp``    size and mtime (ns) of the file; None if it could not be opened
    ``skipped``  counts by kind: "truncated shard", "corrupt shard", "empty shard", "compressed shard", "shard
                 vanished", "unreadable shard", "data behind the end"; of samples "no image", "duplicate key",
                 "incomplete sample"; of members with a sample's name "link", "sparse file", "special file" (a device
                 or FIFO) and "unknown member"
    """

    keys: list[str]
    rows: np.ndarray
    stamp: tuple[int, int] | None = None
    skipped: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.keys)

    def is_of(self, path: str) -> bool:
        """Whether this is the index of an undamaged shard that has exactly the headers of the file ``path``."""
        if self.skipped:
            return False
        with open(path, "rb", buffering=0) as file:
            for *places, checksum in self.rows.tolist():
                headers = (os.pread(file.fileno(), HEADER, offset - HEADER) for offset in places[::2] if offset >= 0)
                if zlib.crc32(b"".join(headers)) != checksum:
                    return False
            end = int((self.rows[:, 0:6:2] + self.rows[:, 1:6:2]).max(initial=0))
            return not os.pread(file.fileno(), _PADDING, _padded(end)).strip(b"\0")


class IndexStore:
    """One file per shard, named by a hash of its path or URL; valid while the shard has the same size and mtime.

    If only the mtime differs, all headers are compared: a copied shard keeps its index. Above about ``limit`` bytes the
    least recently read indexes are deleted.

    Args:
        directory: by default ``$XDG_CACHE_HOME/nxtp/index``, usually ~/.cache/nxtp/index.
    """

    def __init__(self, directory: Path | str | None = None, limit: float = 10e9):
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nxtp" / "index"
        self.directory, self.limit = Path(directory) if directory is not None else default, limit
        self._unchecked = math.inf  # bytes written since this process last measured the directory
        self._warned = False

    def head(self, name: str, stamp: tuple[int, int] | None) -> tuple[int, tuple[int, int], Counter] | None:
        """(samples, stamp, skipped), without reading the whole index; None if it is missing or of another shard."""
        head = self._head(name)
        if head is None or stamp in (None, head[1]):
            return head
        if (index := self.load(name, stamp)) is None:
            return None
        self.save(name, index)
        return len(index), stamp, index.skipped

    def load(self, name: str, stamp: tuple[int, int] | None) -> ShardIndex | None:
        """The index; None if it is missing or of another shard."""
        head, path = self._head(name), self._file(name)
        if head is None or (stamp is not None and stamp[0] != head[1][0]):
            return None
        with suppress(*_UNREADABLE), safe_open(path, "np") as file:
            index = ShardIndex(json.loads(file.get_tensor("keys").tobytes()), file.get_tensor("rows"), *head[1:])
            if stamp in (None, index.stamp) or index.is_of(name):
                with suppress(OSError):
                    os.utime(path)  # deleted later
                return replace(index, stamp=stamp or index.stamp)
        return None

    def _head(self, name: str) -> tuple[int, tuple[int, int], Counter] | None:
        with suppress(*_UNREADABLE), safe_open(self._file(name), "np") as file:
            about = file.metadata()
            size, mtime = json.loads(about["stamp"])
            if about["format"] == _FORMAT and about["name"] == name:
                return int(about["samples"]), (size, mtime), Counter(json.loads(about["skipped"]))
        return None

    def save(self, name: str, index: ShardIndex) -> None:
        """Store an index; a failure is logged once."""
        if index.stamp is None:
            return
        tensors = {"keys": np.frombuffer(json.dumps(index.keys).encode(), dtype=np.uint8), "rows": index.rows}
        about = {"format": _FORMAT, "name": name, "samples": str(len(index)), "stamp": json.dumps(index.stamp)}
        content = save(tensors, metadata=about | {"skipped": json.dumps(index.skipped)})
        try:
            with atomic_file(self._file(name)) as file:
                file.write(content)
            self._unchecked += len(content)
            if self._unchecked > self.limit / 20:
                self._trim()
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "Indexes of shards cannot be stored in %s (%s): each process will read the headers of every shard "
                    "again. Set data.index_dir.",
                    self.directory,
                    error.strerror,
                )

    def _trim(self) -> None:
        """Delete the least recently read indexes above the limit, and unfinished files of killed processes."""
        self._unchecked, files = 0, []
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if _INDEX.fullmatch(path.name):
                    files.append((status.st_mtime_ns, status.st_size, path))
                elif _UNFINISHED.fullmatch(path.name) and status.st_mtime < time.time() - 3600:
                    path.unlink()
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in sorted(files):
            if excess > 0:
                path.unlink(missing_ok=True)
                excess -= size

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """A lock between processes that create what has this name; no lock where the directory cannot be written."""
        with ExitStack() as held:
            with suppress(OSError):
                self.directory.mkdir(parents=True, exist_ok=True)
                lock = self._file(name).name[:2]
                fcntl.flock(held.enter_context(open(self.directory / f"{lock}.lock", "a")), fcntl.LOCK_EX)
            yield

    def forget(self, name: str) -> None:
        """Delete a stored index."""
        with suppress(OSError):
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.directory / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"


def stamp_of(file: str | int) -> tuple[int, int]:
    """Size and mtime (ns) of a path or a descriptor."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


class _Damage(Exception):
    """The tar cannot be read beyond this point; ``name`` is the truncated member, if known."""

    def __init__(self, kind: str, name: str | None = None):
        super().__init__(kind, name)
        self.kind, self.name = kind, name


class OpenFile(io.FileIO):
    """A file that is closed when its object is deleted, without a ResourceWarning."""

    def __del__(self) -> None:
        self.close()


class LocalFile:
    """A shard on disk, read by offset; ``stamp`` is its size and mtime (ns)."""

    arrived = True  # a remote shard may still be arriving

    def __init__(self, path: str | os.PathLike):
        self._file = OpenFile(path)
        self.stamp = stamp_of(self._file.fileno())

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on; fewer only at the end of the file."""
        return os.pread(self._file.fileno(), size, offset)


def index_shard(path: str | os.PathLike, file: Any = None) -> ShardIndex:
    """Index a shard by its tar headers; ``file`` is the open file, with the interface of :class:`LocalFile`.

    The samples are those that WebDataset reads. Of a damaged tar the samples before the damage are used, and the damage
    is counted; only a remote ``file`` raises. The first sample of a duplicate key is used.
    """
    index = Indexing(path, file).find(None)
    assert isinstance(index, ShardIndex)
    return index


class Indexing:
    """:func:`index_shard` in steps, only as far as needed: the shard may still be arriving."""

    def __init__(self, path: str | os.PathLike, file: Any = None):
        self.path, self._file, self._samples = path, file, _Samples()
        self._found = self._members()

    @property
    def stamp(self) -> tuple[int, int] | None:
        """As in :class:`ShardIndex`."""
        return self._file.stamp if self._file else None

    @property
    def arrived(self) -> bool:
        """Whether the whole index can be read without waiting."""
        return self._file is None or self._file.arrived

    def _members(self) -> Iterator[tuple[str, int, int, bytes, str | None]]:
        self._file = self._file or LocalFile(self.path)
        yield from _members(self._file.read, self._file.stamp[0])

    def find(self, row: int | None) -> tuple[str, list[int]] | ShardIndex:
        """Key and index row of sample ``row``; the whole index if ``row`` is None or the end of the shard is reached.

        Raises:
            RemoteError: the shard does not arrive; create another Indexing.
        """
        samples, damage = self._samples, None
        try:
            while row is None or len(samples.rows) <= row:
                samples.add(*next(self._found))
            return samples.keys[row], list(samples.rows[row])
        except StopIteration:
            samples.close()
        except _Damage as found:
            damage = found
        except RemoteError:
            raise
        except FileNotFoundError:
            damage = _Damage("shard vanished")
        except OSError as error:
            log.warning("%s cannot be read: %s", self.path, error)
            damage = _Damage("unreadable shard")
        if damage is not None:
            samples.close_damaged(damage)
        if not samples.seen and not samples.skipped:
            samples.skipped["empty shard"] += 1
        rows = np.array(samples.rows, dtype=np.int64).reshape(-1, 7)
        return ShardIndex(samples.keys, rows, self.stamp, samples.skipped)


class _Samples:
    """Groups tar members into samples; the members of one key are adjacent."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.rows: list[tuple[int, ...]] = []
        self.seen: set[str] = set()
        self.skipped: Counter = Counter()
        self._key: str | None = None
        self._members: dict[str, tuple[int, int, bytes]] = {}
        self._repeated = False
        self._previous: set[str] = set()  # extensions of the previous sample

    def add(self, name: str, offset: int, size: int, header: bytes, irregular: str | None) -> None:
        if METADATA_NAME.match(name) or (parts := split_name(name)) is None:
            return
        if irregular is not None:
            self.skipped[irregular] += 1
            return
        key, extension = parts[0], parts[1].lower()
        if key != self._key:
            self.close()
            self._key = key
        if extension in self._members:
            self._repeated = True
        else:
            self._members[extension] = (offset, size, header)

    def close(self) -> None:
        """Finish the current sample."""
        key, members = self._key, self._members
        if key is None:
            return
        image = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if self._repeated:
            self.skipped["duplicate key"] += 1
        if key in self.seen:
            self.skipped["duplicate key"] += 1
        elif image is None:
            self.skipped["no image"] += 1
        else:
            found = [members.get(name, (-1, -1, b"")) for name in (image, "txt", "json")]
            places = [number for offset, size, _ in found for number in (offset, size)]
            self.keys.append(key)
            self.rows.append((*places, zlib.crc32(b"".join(header for *_, header in found))))
        self.seen.add(key)
        self._previous = set(members)
        self._discard()

    def close_damaged(self, damage: _Damage) -> None:
        """Finish at damage: the current sample is used if it seems complete, compared with the previous one."""
        self.skipped[damage.kind] += 1
        if damage.name is not None:
            complete = (split_name(damage.name) or (None,))[0] != self._key
        else:
            complete = bool(self._previous) and self._previous <= set(self._members)
        if self._key is not None and not complete:
            self.skipped["incomplete sample"] += 1
            self._discard()
        self.close()

    def _discard(self) -> None:
        self._key, self._members, self._repeated = None, {}, False


def _members(read: Callable[[int, int], bytes], end: int) -> Iterator[tuple[str, int, int, bytes, str | None]]:
    """Yield name, data offset, data size, header and kind of each member, without directories.

    The kind of a regular file is None. Formats: ustar, GNU long names, pax; the results agree with Python's tarfile,
    which WebDataset uses. _Damage if the tar ends early, a header is invalid, or data follows the end.
    """
    position = 0
    shared: dict[bytes, bytes] = {}  # pax records of all further members
    extended: dict[bytes, bytes] = {}  # pax records of the next member; the first of two counts
    while position < end or position == 0:
        header = read(_BLOCK, position)
        if position == 0 and (not header or header.startswith(_COMPRESSED)):
            raise _Damage("compressed shard" if header else "empty shard")
        if len(header) < _BLOCK:
            raise _Damage("truncated shard" if position else "corrupt shard")
        if not header[0] and header.count(0) == _BLOCK:
            if extended:
                raise _Damage("corrupt shard")
            if read(_PADDING, position).strip(b"\0"):
                raise _Damage("data behind the end", "")
            return
        kind, size, name = _parse_header(header)
        data = position + _BLOCK
        if kind in b"xgXLK":
            position = data + _padded(size)
            if position > end:
                raise _Damage("truncated shard")
            if size > _MAX_HEADER_BYTES:
                raise _Damage("corrupt shard")
            content = read(size, data)
            if kind == b"L":
                extended.setdefault(b"path", content.split(b"\0", 1)[0])
            elif kind in b"xX":
                extended = _pax_records(content) | extended
            elif kind == b"g":
                shared |= _pax_records(content)
                if b"size" in shared:  # of all members: readers do not agree on its meaning
                    raise _Damage("corrupt shard")
            continue
        more = kind == b"S" and header[482]
        while more:  # further headers of a sparse file
            more = (read(_BLOCK, data) if data + _BLOCK <= end else b"").ljust(_BLOCK, b"\0")[504]
            data += _BLOCK
        records = shared | extended
        extended = {}
        if any(key.startswith(b"GNU.sparse.") for key in records):
            kind = b"S"
        path = records.get(b"GNU.sparse.name", records.get(b"path", name)).decode("utf-8", "backslashreplace")
        size = _number(records[b"size"], 10) if b"size" in records else size
        size = 0 if kind in b"123456" else size  # links, devices, directories: no data, whatever the header says
        position = data + _padded(size)
        if data + size > end:
            raise _Damage("truncated shard", path)
        if kind != b"5":
            yield path, data, size, header, None if kind in b"0\x007" else _IRREGULAR.get(kind, "unknown member")
    raise _Damage("truncated shard")  # a tar ends with a block of zeros


def _parse_header(header: bytes) -> tuple[bytes, int, bytes]:
    """Type flag, size and name of a tar header; _Damage if the checksum or a number is wrong."""
    checksum = _number(header[148:156], 8)
    excess = sum(header) - sum(header[148:156]) + 8 * 32 - checksum
    if excess and excess != 256 * sum(byte > 127 for byte in header[:148] + header[156:]):  # old tars sum signed bytes
        raise _Damage("corrupt shard")
    binary = header[124] == 0x80  # GNU: sizes from 8 GiB on
    size = int.from_bytes(header[125:136], "big") if binary else _number(header[124:136], 8)
    name, kind = header[:100].split(b"\0", 1)[0], header[156:157]
    if kind == b"\0" and name.endswith(b"/"):  # old tars mark a directory by its slash
        kind = b"5"
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return kind, size, name


def _number(field: bytes, base: int) -> int:
    try:
        number = int(field.split(b"\0", 1)[0].strip() or b"0", base)
    except ValueError:
        raise _Damage("corrupt shard") from None
    if number < 0:
        raise _Damage("corrupt shard")
    return number


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    records = {}
    position = 0
    while data[position : position + 1].strip(b"\0"):
        match = _PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or end <= match.end():
            raise _Damage("corrupt shard")
        value = data[match.end() : end - 1]
        records[match[2]] = value.rstrip(b"/") if match[2] == b"path" else value
        position = end
    return records


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
