"""Where the samples of a tar shard lie: an index from its headers alone, damage counted."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from nxtp.data.shards.urls import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)

HEADER = _BLOCK = 512  # bytes
_MAX_NAME_BYTES = 1 << 16
_SKIPPED_NAME = re.compile(r"__[^/]*__($|/)")  # what WebDataset takes for metadata
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


@dataclass
class ShardIndex:
    """Where the samples of one shard lie; row i of every array is sample i.

    Offsets and sizes are int64 bytes within the file, -1 where the member is absent. ``keys`` holds strings
    (NumPy's variable-width StringDType), ``extensions`` positions in :data:`IMAGE_EXTENSIONS`, ``headers`` the CRC-32
    of the tar headers of image, text and JSON in this order: a file with others there is another file. ``skipped``
    counts what was left out, by kind: "truncated shard", "corrupt shard", "empty shard", "compressed shard", "shard
    vanished", "unreadable shard", and of samples "no image", "duplicate key", "incomplete sample".
    """

    path: str
    keys: np.ndarray
    extensions: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    headers: np.ndarray
    stamp: tuple[int, int] | None = None  # size and mtime (ns) of the file that was indexed
    skipped: Counter = field(default_factory=Counter)

    @classmethod
    def of_rows(
        cls, path: str, keys: list[str], rows: np.ndarray, stamp: tuple[int, int] | None, skipped: Counter
    ) -> ShardIndex:
        """An index of ``keys`` and int64 [samples, 8] ``rows``: extension, offset and size of each member, headers."""
        columns = (np.ascontiguousarray(rows[:, column]) for column in range(1, 8))
        strings = np.array(keys, dtype=np.dtypes.StringDType())
        return cls(path, strings, rows[:, 0].astype(np.int8), *columns, stamp=stamp, skipped=skipped)

    def rows(self) -> np.ndarray:
        """int64 [samples, 8], as :meth:`of_rows` takes them."""
        members = (self.image_offset, self.image_size, self.text_offset, self.text_size)
        columns = (self.extensions, *members, self.json_offset, self.json_size, self.headers)
        return np.stack([column.astype(np.int64) for column in columns], axis=1)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def truncated(self) -> bool:
        """Whether the file ends before its tar does."""
        return self.skipped["truncated shard"] > 0


class _Damage(Exception):
    """The tar cannot be followed beyond this point; ``name`` is the member that is cut, where known."""

    def __init__(self, kind: str, name: str | None = None):
        super().__init__(kind, name)
        self.kind, self.name = kind, name


def index_shard(path: str | os.PathLike, file: BinaryIO | None = None) -> ShardIndex:
    """Find the samples of a shard from its tar headers alone; ``file`` is it, where it is open already.

    Agrees with WebDataset on sound shards. Where the tar is damaged, the samples before the damage are kept and a
    fault is counted; nothing is raised. Of a key that comes twice, the first sample is kept. Names are only keys:
    nothing is ever written under them.
    """
    path = os.fspath(path)
    rows = _Rows()
    stamp = None
    try:
        with open(path, "rb", buffering=0) if file is None else nullcontext(file) as file:
            status = os.fstat(file.fileno())
            stamp = (status.st_size, status.st_mtime_ns)
            for name, *where in _members(file.fileno(), status.st_size):
                rows.add(name, *where)
        rows.close()
    except _Damage as damage:
        rows.close_damaged(damage)
    except FileNotFoundError:
        rows.close_damaged(_Damage("shard vanished"))
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error)
        rows.close_damaged(_Damage("unreadable shard"))
    if not rows.seen and not rows.skipped:
        rows.skipped["empty shard"] += 1
    return rows.index(path, stamp)


class _Rows:
    """Gathers tar members into samples, the members of one key being adjacent."""

    def __init__(self):
        self.keys: list[str] = []
        self.numbers: list[tuple[int, ...]] = []
        self.seen: set[str] = set()
        self.skipped: Counter = Counter()
        self._key: str | None = None
        self._members: dict[str, tuple[int, int, bytes]] = {}
        self._repeated = False
        self._usual: set[str] = set()  # extensions of the sample before

    def add(self, name: str, offset: int, size: int, header: bytes) -> None:
        if _SKIPPED_NAME.match(name):
            return
        key, extension = base_plus_ext(name)
        if key is None:
            return
        if key != self._key:
            self.close()
            self._key = key
        extension = extension.lower()
        if extension in self._members:
            self._repeated = True
        else:
            self._members[extension] = (offset, size, header)

    def close(self) -> None:
        """End the open sample."""
        key, members = self._key, self._members
        if key is None:
            return
        extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if self._repeated:
            self.skipped["duplicate key"] += 1
        if key in self.seen:
            self.skipped["duplicate key"] += 1
        elif extension is None:
            self.skipped["no image"] += 1
        else:
            self.keys.append(key)
            found = [members.get(name, (-1, -1, b"")) for name in (extension, "txt", "json")]
            places = [number for offset, size, _ in found for number in (offset, size)]
            headers = zlib.crc32(b"".join(header for *_, header in found))
            self.numbers.append((IMAGE_EXTENSIONS.index(extension), *places, headers))
        self.seen.add(key)
        self._usual = set(members)
        self._discard()

    def close_damaged(self, damage: _Damage) -> None:
        """End at a damage: the open sample is kept if it is whole, judged by the sample before it."""
        self.skipped[damage.kind] += 1
        if damage.name is not None:
            whole = base_plus_ext(damage.name)[0] != self._key
        else:
            whole = bool(self._usual) and self._usual <= set(self._members)
        if self._key is not None and not whole:
            self.skipped["incomplete sample"] += 1
            self._discard()
        self.close()

    def _discard(self) -> None:
        self._key, self._members, self._repeated = None, {}, False

    def index(self, path: str, stamp: tuple[int, int] | None) -> ShardIndex:
        rows = np.array(self.numbers, dtype=np.int64).reshape(-1, 8)
        return ShardIndex.of_rows(path, self.keys, rows, stamp, self.skipped)


def _members(fd: int, end: int) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, data offset, data size and header (it ends where the data begin) of the regular files of a tar.

    Formats: ustar, GNU long names, pax.

    Raises:
        _Damage: the tar ends early, or a header is not one.
    """
    position = 0
    long_name: bytes | None = None
    long_size: int | None = None
    while position < end or position == 0:
        header = os.pread(fd, _BLOCK, position)
        if position == 0 and (not header or header.startswith(_COMPRESSED)):
            raise _Damage("compressed shard" if header else "empty shard")
        if len(header) < _BLOCK:
            raise _Damage("truncated shard" if position else "corrupt shard")
        if not header[0] and header.count(0) == _BLOCK:
            return
        kind, size, name = _parse_header(header)
        data = position + _BLOCK
        if kind in b"xgXLK":
            position = data + _padded(size)
            if position > end:
                raise _Damage("truncated shard")
            if kind in b"xXL" and size > _MAX_NAME_BYTES:
                raise _Damage("corrupt shard")
            if kind in b"xX":
                records = _pax_records(os.pread(fd, size, data))
                long_name = records.get(b"path", long_name)
                long_size = _number(records[b"size"], 10) if b"size" in records else long_size
            elif kind == b"L":
                long_name = os.pread(fd, size, data).split(b"\0", 1)[0]
            continue
        name = name if long_name is None else long_name
        size = size if long_size is None else long_size
        long_name = long_size = None
        if kind in b"123456":  # links, devices, directories: no data
            position = data
            continue
        text = name.decode("utf-8", "backslashreplace")
        position = data + _padded(size)
        if data + size > end:
            raise _Damage("truncated shard", text)
        if kind in b"0\x007" and not text.endswith("/"):
            yield text, data, size, header
    raise _Damage("truncated shard")  # a tar ends with a block of zeros


def _parse_header(header: bytes) -> tuple[bytes, int, bytes]:
    """Type flag, size and name of a tar header.

    Raises:
        _Damage: the checksum or a number is wrong.
    """
    checksum = _number(header[148:156], 8)
    if sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
        raise _Damage("corrupt shard")
    binary = header[124] == 0x80  # GNU: sizes from 8 GiB on
    size = int.from_bytes(header[125:136], "big") if binary else _number(header[124:136], 8)
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], size, name


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
    while position < len(data) and (match := _PAX_RECORD.match(data, position)):
        end = position + int(match[1])
        if end <= match.end():
            raise _Damage("corrupt shard")
        records[match[2]] = data[match.end() : end - 1]
        position = end
    return records


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
