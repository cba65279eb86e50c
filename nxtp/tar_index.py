"""Reading tar shards by position: an index from their headers, any sample by its number, damage counted.

Reading by position is what makes an epoch exact: shuffling, sharing out and resuming are arithmetic on positions,
and nothing is decoded twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from nxtp.errors import UserError
from nxtp.shards import IMAGE_EXTENSIONS, is_remote, replacing

log = logging.getLogger(__name__)

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 16
_OPEN_SHARDS = 16
_SKIPPED_NAME = re.compile(r"__[^/]*__($|/)")  # what WebDataset takes for metadata
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_LOCAL_SCHEME = re.compile(r"^file:(//)?")


@dataclass
class ShardIndex:
    """Where the samples of one shard lie; row i of every array is sample i.

    Offsets and sizes are int64 bytes within the file, -1 where the member is absent. ``keys`` holds strings
    (NumPy's variable-width StringDType), ``extensions`` positions in :data:`IMAGE_EXTENSIONS`. ``faults`` counts
    what was left out, by kind: "truncated shard", "corrupt shard", "empty shard", "compressed shard", "shard
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
    stamp: tuple[int, int] | None = None  # size and mtime (ns) of the file that was indexed
    faults: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def truncated(self) -> bool:
        """Whether the file ends before its tar does."""
        return self.faults["truncated shard"] > 0


class _Damage(Exception):
    """The tar cannot be followed beyond this point; ``name`` is the member that is cut, where known."""

    def __init__(self, kind: str, name: str | None = None):
        super().__init__(kind, name)
        self.kind, self.name = kind, name


def index_shard(path: str | os.PathLike) -> ShardIndex:
    """Find the samples of a shard from its tar headers alone.

    Agrees with WebDataset on sound shards. Where the tar is damaged, the samples before the damage are kept and a
    fault is counted; nothing is raised. Of a key that comes twice, the first sample is kept. Names are only keys:
    nothing is ever written under them.
    """
    path = os.fspath(path)
    rows = _Rows()
    stamp = None
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            stamp = (status.st_size, status.st_mtime_ns)
            for name, offset, size in _members(file.fileno(), status.st_size):
                rows.add(name, offset, size)
        rows.close()
    except _Damage as damage:
        rows.close_damaged(damage)
    except FileNotFoundError:
        rows.close_damaged(_Damage("shard vanished"))
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error)
        rows.close_damaged(_Damage("unreadable shard"))
    if not rows.seen and not rows.faults:
        rows.faults["empty shard"] += 1
    return rows.index(path, stamp)


class _Rows:
    """Gathers tar members into samples, the members of one key being adjacent."""

    def __init__(self):
        self.keys: list[str] = []
        self.numbers: list[tuple[int, ...]] = []
        self.seen: set[str] = set()
        self.faults: Counter = Counter()
        self._key: str | None = None
        self._members: dict[str, tuple[int, int]] = {}
        self._repeated = False
        self._usual: set[str] = set()  # extensions of the sample before

    def add(self, name: str, offset: int, size: int) -> None:
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
            self._members[extension] = (offset, size)

    def close(self) -> None:
        """End the open sample."""
        key, members = self._key, self._members
        if key is None:
            return
        extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if self._repeated:
            self.faults["duplicate key"] += 1
        if key in self.seen:
            self.faults["duplicate key"] += 1
        elif extension is None:
            self.faults["no image"] += 1
        else:
            self.keys.append(key)
            absent = (-1, -1)
            row = (*members[extension], *members.get("txt", absent), *members.get("json", absent))
            self.numbers.append((IMAGE_EXTENSIONS.index(extension), *row))
        self.seen.add(key)
        self._usual = set(members)
        self._discard()

    def close_damaged(self, damage: _Damage) -> None:
        """End at a damage: the open sample is kept if it is whole, judged by the sample before it."""
        self.faults[damage.kind] += 1
        if damage.name is not None:
            whole = base_plus_ext(damage.name)[0] != self._key
        else:
            whole = bool(self._usual) and self._usual <= set(self._members)
        if self._key is not None and not whole:
            self.faults["incomplete sample"] += 1
            self._discard()
        self.close()

    def _discard(self) -> None:
        self._key, self._members, self._repeated = None, {}, False

    def index(self, path: str, stamp: tuple[int, int] | None) -> ShardIndex:
        numbers = np.array(self.numbers, dtype=np.int64).reshape(-1, 7)
        return ShardIndex(
            path,
            np.array(self.keys, dtype=np.dtypes.StringDType()),
            numbers[:, 0].astype(np.int8),
            *(np.ascontiguousarray(numbers[:, column]) for column in range(1, 7)),
            stamp=stamp,
            faults=self.faults,
        )


def _members(fd: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, data offset and data size of the regular files of a tar: ustar, GNU long names, pax.

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
            yield text, data, size
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


class SampleFault(Exception):
    """A sample that cannot be used: skipped and counted by ``kind``."""

    def __init__(self, kind: str, key: str, shard: str):
        super().__init__(kind, key, shard)
        self.kind, self.key, self.shard = kind, key, shard

    def __str__(self) -> str:
        return f"{self.kind}: {self.key} in {self.shard}"


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample as it lies in its shard: the image's encoded bytes, texts decoded; None where absent."""

    key: str
    shard: str
    image: bytes
    caption: str | None
    labels: list[str] | None


class ShardSet:
    """Many shards as one line of samples, positions 0 … len-1, in the order of ``urls``.

    Remote shards (anything with ``://``, and ``pipe:`` commands) are fetched whole into ``cache_dir`` first, each once.
    Damaged shards contribute what is readable; ``faults`` counts the rest by kind. Copies (pickles, forks) share
    nothing: each process and thread opens its own files.

    Raises:
        UserError: a remote shard without ``cache_dir``, or with a scheme that WebDataset cannot open.
    """

    def __init__(self, urls: Sequence[str], cache_dir: str | os.PathLike | None = None):
        self.urls = [os.fspath(url) for url in urls]
        with ThreadPoolExecutor(max_workers=8) as pool:
            self.shards = list(pool.map(lambda url: _index_url(url, cache_dir), self.urls))
        self.sizes = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self.faults: Counter = Counter()
        for url, shard in zip(self.urls, self.shards, strict=True):
            self.faults.update(shard.faults)
            if shard.faults:
                log.warning("%s: %s", url, ", ".join(f"{kind} × {n}" for kind, n in sorted(shard.faults.items())))
        self._handles = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_handles": threading.local()}

    def shard_of(self, position: int) -> str:
        """The URL of the shard that holds ``position``."""
        return self.urls[self._locate(position)[0]]

    def read(self, position: int) -> RawSample:
        """The sample at ``position``.

        Raises:
            SampleFault: "shard vanished", "shard changed" (since it was indexed), "unreadable shard", "truncated
                member", "oversized image|caption|json", "corrupt json" or "bad labels" (not a list of strings).
            IndexError: no such position.
        """
        number, row = self._locate(position)
        shard, url = self.shards[number], self.urls[number]
        key = str(shard.keys[row])

        def member(what: str, offsets: np.ndarray, sizes: np.ndarray, limit: int) -> bytes | None:
            offset, size = int(offsets[row]), int(sizes[row])
            if offset < 0:
                return None
            if size > limit:
                raise SampleFault(f"oversized {what}", key, url)
            try:
                data = os.pread(self._open(shard, key, url), size, offset)
            except FileNotFoundError:
                raise SampleFault("shard vanished", key, url) from None
            except OSError as error:
                raise SampleFault("unreadable shard", key, url) from error
            if len(data) < size:
                raise SampleFault("truncated member", key, url)
            return data

        text = member("caption", shard.text_offset, shard.text_size, MAX_CAPTION_BYTES)
        record = member("json", shard.json_offset, shard.json_size, MAX_JSON_BYTES)
        caption = None if text is None else _decode(text)
        labels = None
        if record is not None:
            try:
                values = json.loads(record)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                raise SampleFault("corrupt json", key, url)
            labels = values.get("labels")
            if labels is not None:
                if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                    raise SampleFault("bad labels", key, url)
                labels = [_sound(label) for label in labels]
            if not caption and isinstance(values.get("caption"), str):
                caption = _sound(values["caption"]).strip()
        image = member("image", shard.image_offset, shard.image_size, MAX_IMAGE_BYTES)
        return RawSample(key, url, image, caption or None, labels)

    def _locate(self, position: int) -> tuple[int, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"no sample {position} among {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        return number, int(position - self._ends[number] + self.sizes[number])

    def _open(self, shard: ShardIndex, key: str, url: str) -> int:
        """A descriptor of the shard's file, from this thread's most recently used ones."""
        files: OrderedDict[str, BinaryIO] = self._handles.__dict__.setdefault("files", OrderedDict())
        if shard.path in files:
            files.move_to_end(shard.path)
            return files[shard.path].fileno()
        file = open(shard.path, "rb", buffering=0)  # noqa: SIM115
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != shard.stamp:
            file.close()
            raise SampleFault("shard changed", key, url)
        files[shard.path] = file
        if len(files) > _OPEN_SHARDS:
            files.popitem(last=False)[1].close()
        return file.fileno()


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return text.decode("latin-1").strip()


def _sound(text: str) -> str:
    """Without the lone surrogates that JSON can hold and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _index_url(url: str, cache_dir: str | os.PathLike | None) -> ShardIndex:
    if not is_remote(url):
        return index_shard(_LOCAL_SCHEME.sub("", url))
    if cache_dir is None:
        raise UserError(f"{url} is remote: set data.cache_dir to the directory that keeps fetched shards.")
    path = _cached(url, Path(cache_dir))
    if not path.exists():
        try:
            _fetch(url, path)
        except OSError as error:
            log.warning("%s cannot be fetched: %s", url, error)
            rows = _Rows()
            rows.close_damaged(_Damage("unreachable shard"))
            return rows.index(str(path), None)
    return index_shard(path)


def _cached(url: str, cache_dir: Path) -> Path:
    """Where a remote shard is kept: a hash of its URL, and the URL's end for people."""
    tail = re.sub(r"[^\w.-]+", "_", url.removesuffix(".tar"))[-60:]
    return cache_dir / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}.tar"


def _fetch(url: str, path: Path) -> None:
    try:
        with replacing(path) as file, gopen(url) as source:  # closing the source tells whether it failed
            shutil.copyfileobj(source, file, 1 << 20)
    except ValueError as error:
        raise UserError(f"{url} cannot be opened ({error}); a command can: 'pipe:COMMAND'.") from error
