"""Many shards as one sequence of samples, read by position: so an epoch can be exact and shuffled by arithmetic."""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from nxtp.data.shards.cache import RemoteCache, RemoteFile
from nxtp.data.shards.captions import read_captions
from nxtp.data.shards.counts import THREADS, Count, count_shards, index_name
from nxtp.data.shards.prefetch import Prefetcher
from nxtp.data.shards.remote import RemoteError
from nxtp.data.shards.tar_index import HEADER, Indexing, IndexStore, LocalFile, ShardIndex, index_shard, stamp_of
from nxtp.data.shards.urls import is_remote, local_path
from nxtp.data.where import FILTERED, Selection
from nxtp.errors import by_kind, printable

log = logging.getLogger(__name__)

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28
_MEMBERS = (("image", MAX_IMAGE_BYTES), ("caption", MAX_CAPTION_BYTES), ("json", MAX_JSON_BYTES))  # as in an index
UNLISTED = "unlisted sample"  # kind: the shard has more samples than a file beside it lists
_OPEN_SHARDS = 16
_OPEN_INDEXES = 32
_OPEN_CAPTIONS = 8
_ALL = Selection()
_SPREAD_SHARDS = 32
_GAP = 1 << 14  # bytes between members: up to so many, one read is faster than several


class SampleError(Exception):
    """A sample that cannot be used. It is skipped and counted by ``kind``."""

    def __init__(self, kind: str, key: str, shard: str):
        super().__init__(kind, key, shard)
        self.kind, self.key, self.shard = kind, key, shard

    def __str__(self) -> str:
        return f"{self.kind}: {name_of(self.key, self.shard)}"


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample as stored: the image's encoded bytes, decoded texts (None if absent).

    ``unlisted`` of the last sample that a file beside the shard lists: how many more the shard has.
    """

    key: str
    shard: str
    image: bytes
    caption: str | None
    labels: list[str] | None
    unlisted: int = 0

    @property
    def name(self) -> str:
        return name_of(self.key, self.shard)


@dataclass(frozen=True, slots=True)
class _Shard:
    """What is known of a shard without its index; ``stamp`` is None if it is remote or missing."""

    url: str
    samples: int
    stamp: tuple[int, int] | None
    skipped: Counter

    @property
    def name(self) -> str:
        """The name of its stored index."""
        return index_name(self.url)


class IndexedShards:
    """Many shards as one sequence of samples, positions 0 … len-1, in the order of ``urls``.

    Each shard is indexed once, and the index stored on disk (``store``): now, or when it is first read if a file beside
    it lists the number of its samples. Remote shards (``://`` and ``pipe:``) are fetched into ``cache`` and read while
    they arrive. Readable samples of damaged shards are used; ``skipped`` counts the others by kind. Each process and
    thread opens its own files.

    Args:
        counts: samples of each shard, by default from :func:`~nxtp.data.shards.counts.count_shards`.

    Raises:
        UserError: a remote shard without ``cache``, or with a scheme that cannot be opened.
    """

    def __init__(
        self,
        urls: Sequence[str | os.PathLike],
        cache: RemoteCache | None = None,
        store: IndexStore | None = None,
        counts: Sequence[Count] | None = None,
    ):
        self.urls = [os.fspath(url) for url in urls]
        self.store = store or IndexStore()
        self.cache = cache
        counts = count_shards(self.urls, cache, self.store) if counts is None else counts
        with ThreadPoolExecutor(THREADS) as pool:
            stamps = pool.map(_stamp_here, self.urls)
            parts = zip(self.urls, counts, stamps, strict=True)
            self.shards = [_Shard(url, n, stamp, Counter(skipped)) for url, (n, skipped), stamp in parts]
        self.sizes = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self.skipped: Counter = Counter()
        for shard in self.shards:
            self.skipped.update(shard.skipped)
            if shard.skipped:
                log.warning("%s: %s", shard.url, by_kind(shard.skipped))
        self.selections: dict[str, Selection] = {}  # by shard
        self._local = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_local": threading.local()}

    def shard_of(self, position: int) -> str:
        """The URL of the shard that contains ``position``."""
        return self.urls[self._locate(position)[0]]

    def key_of(self, position: int) -> str:
        """The key at ``position``; [number in the shard] if the shard can no longer be read."""
        number, row = self._locate(position)
        with suppress(RemoteError):
            if found := self._find(number, row):
                return found[0]
        return f"[{row}]"

    def spread(self, most: int) -> list[int]:
        """Up to ``most`` positions, evenly over 32 shards, or over more where these have too few samples."""
        numbers = np.flatnonzero(self.sizes)
        shards = max(_SPREAD_SHARDS, 2 * most * len(numbers) // len(self) + 1)
        if shards < len(numbers):
            numbers = numbers[np.linspace(0, len(numbers) - 1, shards, dtype=np.int64)]
        ends = np.cumsum(self.sizes[numbers])
        places = np.unique(np.linspace(0, ends[-1] - 1, min(most, ends[-1]), dtype=np.int64))
        at = np.searchsorted(ends, places, side="right")
        return (places - ends[at] + self._ends[numbers[at]]).tolist()

    def prefetch(self, numbers: Iterable[int]) -> Prefetcher | None:
        """Start to fetch the remote shards among ``numbers``, in this order; None if there are none."""
        urls = [self.urls[number] for number in numbers]
        return Prefetcher(self.cache, urls) if self.cache is not None and any(map(is_remote, urls)) else None

    def read(self, position: int) -> RawSample:
        """The sample at ``position``.

        Raises:
            SampleError: "shard vanished", "shard changed" (since it was indexed), "unreadable shard", "unreachable
                shard", "stalled shard", "missing sample" (the manifest lists more), "truncated member",
                "oversized image|caption|json", "corrupt json", "bad labels" (not a list of strings), "damaged
                image" (other bytes than its JSON's ``crc32``), "unreadable captions" (beside the shard), or FILTERED
                (the shard's ``selections`` excludes it).
            IndexError: no such position.
        """
        key, url, content = self._content(position, ("image", "caption", "json"))
        caption = decode_text(content["caption"]) if "caption" in content else None
        try:
            record = json.loads(content.get("json", b"{}"))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise SampleError("corrupt json", key, url)
        selection = self.selections.get(url, _ALL)
        if not selection.takes(record):
            raise SampleError(FILTERED, key, url)
        if (labels := record.get("labels")) is not None:
            if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                raise SampleError("bad labels", key, url)
            labels = [valid_text(label) for label in labels]
        if selection.column:
            caption = self._captions(position, selection.column).get(key)
        elif selection.caption_key or not caption:
            text = record.get(selection.caption_key or "caption")
            caption = valid_text(text).strip() if isinstance(text, str) else None
        if isinstance(record.get("crc32"), int) and zlib.crc32(content["image"]) != record["crc32"]:
            raise SampleError("damaged image", key, url)
        return RawSample(key, url, content["image"], caption or None, labels, self._unlisted(position))

    def _captions(self, position: int, column: str) -> dict[str, str]:
        """Captions beside the shard of ``position``; each thread caches the most recent tables."""
        number = self._locate(position)[0]
        tables: OrderedDict[int, dict[str, str]] = self._local.__dict__.setdefault("captions", OrderedDict())
        if number not in tables:
            try:
                tables[number] = read_captions(self.urls[number], column, self.cache)
            except OSError as error:
                raise SampleError("unreadable captions", self.key_of(position), self.urls[number]) from error
            if len(tables) > _OPEN_CAPTIONS:
                tables.popitem(last=False)
        tables.move_to_end(number)
        return tables[number]

    def read_image(self, position: int) -> bytes:
        """The image's bytes at ``position``; damaged texts do not matter. Raises as :meth:`read`."""
        return self._content(position, ("image",))[2]["image"]

    def _content(self, position: int, wanted: Container[str]) -> tuple[str, str, dict[str, bytes]]:
        """Key, shard and the bytes of a sample's ``wanted`` members; of the others only the headers are checked."""
        number, row = self._locate(position)
        url, cache = self.urls[number], self.cache
        if cache is not None and is_remote(url):
            cache.usage["reads"] += 1
            waits = cache.usage["waits"]
        try:
            found = self._find(number, row)
        except RemoteError as error:
            raise SampleError(error.kind, f"[{row}]", url) from error
        if found is None:
            raise SampleError("missing sample", f"[{row}]", url)
        key, (*places, checksum) = found
        members: list[tuple[str, int, int]] = []  # begin and end, with the header
        for (what, limit), offset, size in zip(_MEMBERS, places[::2], places[1::2], strict=True):
            if offset >= 0:
                size = size if what in wanted else 0
                if size > limit:
                    raise SampleError(f"oversized {what}", key, url)
                members.append((what, offset - HEADER, offset + size))
        first, last = min(begin for _, begin, _ in members), max(end for *_, end in members)
        neighbours = last - first <= sum(end - begin for _, begin, end in members) + _GAP
        content, headers = {}, b""
        try:
            file = self._open(number, key)
            data = file.read(last - first, first) if neighbours else b""
            for what, begin, end in members:
                if not neighbours:
                    first, data = begin, file.read(end - begin, begin)
                if len(data) < end - first:
                    raise SampleError("truncated member", key, url)
                headers += data[begin - first : begin - first + HEADER]
                content[what] = data[begin - first + HEADER : end - first]
        except RemoteError as error:
            raise SampleError(error.kind, key, url) from error
        except FileNotFoundError:
            raise SampleError("shard vanished", key, url) from None
        except OSError as error:
            raise SampleError("unreadable shard", key, url) from error
        if cache is not None and is_remote(url):
            cache.usage["hits"] += cache.usage["waits"] == waits
        if zlib.crc32(headers) != checksum:
            self.store.forget(self.shards[number].name)  # size and mtime are as indexed, the content is not
            raise SampleError("shard changed", key, url)
        return key, url, content

    def close(self) -> None:
        """Close this thread's files; they are opened again when needed."""
        self._local.__dict__.clear()

    def _locate(self, position: int) -> tuple[int, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"no sample {position} among {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        return number, int(position - self._ends[number] + self.sizes[number])

    def _find(self, number: int, row: int) -> tuple[str, list[int]] | None:
        """Key of a shard's sample and its row in the index; None if the shard has fewer.

        Of a shard that is still arriving and not indexed, only the headers up to this sample are read.
        """
        indexes: OrderedDict[int, ShardIndex | Indexing] = self._local.__dict__.setdefault("indexes", OrderedDict())
        shard = self.shards[number]
        index = indexes.pop(number, None)
        if index is None:
            index = self.store.load(shard.name, None if is_remote(shard.url) else shard.stamp)
        if index is None:  # counted by a list, or the store was emptied
            index = self._index_here(shard) or Indexing(shard.url, self._remote_file(shard.url))
        sample = None
        if isinstance(index, Indexing):
            found = index.find(None if index.arrived or row == shard.samples - 1 else row)
            if isinstance(found, ShardIndex):
                self.store.save(shard.name, found)
                index = found
            else:
                sample = found
        indexes[number] = index
        if len(indexes) > _OPEN_INDEXES:
            indexes.popitem(last=False)
        if isinstance(index, ShardIndex) and row < len(index):
            sample = index.keys[row], index.rows[row].tolist()
        return sample

    def _index_here(self, shard: _Shard) -> ShardIndex | None:
        """Index a local shard: one process does it, the others wait."""
        if is_remote(shard.url):
            return None
        with self.store.locked(shard.name):
            index = self.store.load(shard.name, shard.stamp)
            if index is None:
                index = index_shard(local_path(shard.url))
                self.store.save(shard.name, index)
        return index

    def _unlisted(self, position: int) -> int:
        number, row = self._locate(position)
        index, listed = self._local.indexes[number], self.shards[number].samples
        return max(len(index) - listed, 0) if isinstance(index, ShardIndex) and row == listed - 1 else 0

    def _remote_file(self, url: str) -> RemoteFile | None:
        """The file of a remote shard; None for a local one."""
        return self.cache.open(url) if self.cache is not None and is_remote(url) else None

    def _open(self, number: int, key: str) -> LocalFile | RemoteFile:
        """A shard's open file; each thread caches the most recent ones. Call :meth:`_find` first."""
        shard = self.shards[number]
        files: OrderedDict[int, LocalFile | RemoteFile] = self._local.__dict__.setdefault("files", OrderedDict())
        if number in files:
            files.move_to_end(number)
            return files[number]
        file = self._remote_file(shard.url) or LocalFile(local_path(shard.url))
        known = shard.stamp or self._local.indexes[number].stamp or (-1, -1)
        if file.stamp != known and not (is_remote(shard.url) and file.stamp[0] == known[0]):
            self.store.forget(shard.name)
            raise SampleError("shard changed", key, shard.url)
        files[number] = file
        if len(files) > _OPEN_SHARDS:
            files.popitem(last=False)
        return file


def _stamp_here(url: str) -> tuple[int, int] | None:
    with suppress(OSError):
        return None if is_remote(url) else stamp_of(local_path(url))
    return None


def name_of(key: str, shard: str) -> str:
    """A sample's name in messages."""
    return f"{printable(key)} in {shard}" if key else shard


def decode_text(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return text.decode("latin-1").strip()


def valid_text(text: str) -> str:
    """``text`` without the lone surrogates that JSON may contain and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")
