"""Many shards as one sequence of samples, read by position: an epoch is exact, its order is arithmetic."""

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
from typing import Any, BinaryIO

import numpy as np

from nxtp.data.shards.cache import RemoteCache, RemoteError
from nxtp.data.shards.captions import read_captions
from nxtp.data.shards.tar_index import HEADER, IndexStore, ShardIndex, index_shard, stamp_of
from nxtp.data.shards.urls import is_remote, local_path
from nxtp.data.where import FILTERED, Selection
from nxtp.errors import UserError, by_kind, printable

log = logging.getLogger(__name__)

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28
_MEMBERS = (("image", MAX_IMAGE_BYTES), ("caption", MAX_CAPTION_BYTES), ("json", MAX_JSON_BYTES))  # as in an index
_OPEN_SHARDS = 16
_OPEN_INDEXES = 32
_OPEN_CAPTIONS = 8
_ALL = Selection()
_SPREAD_SHARDS = 32
_GAP = 1 << 14  # unwanted bytes that are read along rather than skipped by another read


class SampleError(Exception):
    """A sample that cannot be used: it is skipped, and counted by ``kind``."""

    def __init__(self, kind: str, key: str, shard: str):
        super().__init__(kind, key, shard)
        self.kind, self.key, self.shard = kind, key, shard

    def __str__(self) -> str:
        return f"{self.kind}: {name_of(self.key, self.shard)}"


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample as its shard stores it: the image's encoded bytes, texts decoded; None if absent."""

    key: str
    shard: str
    image: bytes
    caption: str | None
    labels: list[str] | None

    @property
    def name(self) -> str:
        return name_of(self.key, self.shard)


@dataclass(frozen=True, slots=True)
class _Shard:
    """What is known of a shard without its index.

    ``stamp`` is the size and time of its file, None if only the manifest's count is known.
    """

    url: str
    samples: int
    stamp: tuple[int, int] | None
    skipped: Counter

    @property
    def name(self) -> str:
        """What its index is stored under: the same from every working directory."""
        return self.url if is_remote(self.url) else os.path.abspath(local_path(self.url))


class IndexedShards:
    """Many shards as one sequence of samples, positions 0 … len-1, in the order of ``urls``.

    Each shard is indexed once and its index stored on disk (``store``). Remote shards (``://`` and ``pipe:``) are
    fetched whole into ``cache``: when a sample is first read if a manifest beside them lists their number of samples,
    else at once. What is readable in damaged shards is used; ``skipped`` counts the rest by kind. Copies (pickles,
    forks) share nothing: each process and thread opens its own files.

    Raises:
        UserError: a remote shard without ``cache``, or with a scheme that cannot be opened.
    """

    def __init__(
        self, urls: Sequence[str | os.PathLike], cache: RemoteCache | None = None, store: IndexStore | None = None
    ):
        self.urls = [os.fspath(url) for url in urls]
        self.store = store or IndexStore()
        self.cache = cache
        remote = [url for url in self.urls if is_remote(url)]
        if remote and cache is None:
            raise UserError(f"{remote[0]} is remote: set a directory for fetched shards (data.cache_dir, --cache-dir).")
        unknown = [url for url in remote if self.store.head(url, None) is None]
        counts = cache.counts(unknown) if cache is not None and unknown else {}
        # Processes that start together share the work: each starts elsewhere and uses what others have stored.
        start = os.getpid() % max(len(self.urls), 1)
        order = [*range(start, len(self.urls)), *range(start)]
        with ThreadPoolExecutor(max_workers=8) as pool:
            described = pool.map(lambda i: self._describe(self.urls[i], counts), order)
            found = dict(zip(order, described, strict=True))
        self.shards = [found[i] for i in range(len(self.urls))]
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
        """The key at ``position``; its number in the shard, in brackets, if the shard can no longer be read."""
        number, row = self._locate(position)
        try:
            return self._index(number).keys[row]
        except (SampleError, IndexError):
            return f"[{row}]"

    def spread(self, most: int) -> list[int]:
        """Up to ``most`` positions, spread evenly over 32 shards, or over so many as have twice as many samples."""
        numbers = np.flatnonzero(self.sizes)
        shards = max(_SPREAD_SHARDS, 2 * most * len(numbers) // len(self) + 1)
        if shards < len(numbers):
            numbers = numbers[np.linspace(0, len(numbers) - 1, shards, dtype=np.int64)]
        ends = np.cumsum(self.sizes[numbers])
        places = np.unique(np.linspace(0, ends[-1] - 1, min(most, ends[-1]), dtype=np.int64))
        at = np.searchsorted(ends, places, side="right")
        return (places - ends[at] + self._ends[numbers[at]]).tolist()

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch the remote ones among the shards ``numbers``; failures are reported when a sample is read."""
        for number in numbers:
            if self.cache is not None and is_remote(self.urls[number]):
                with suppress(RemoteError):
                    self.cache.fetch(self.urls[number])

    def read(self, position: int) -> RawSample:
        """The sample at ``position``.

        Raises:
            SampleError: "shard vanished", "shard changed" (since it was indexed), "unreadable shard", "unreachable
                shard", "stalled shard", "missing sample" (the manifest promised more), "truncated member",
                "oversized image|caption|json", "corrupt json", "bad labels" (not a list of strings), "damaged
                image" (other bytes than its JSON's ``crc32``), "unreadable captions" (beside the shard), or FILTERED
                (its shard's ``selections`` has it not).
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
        return RawSample(key, url, content["image"], caption or None, labels)

    def _captions(self, position: int, column: str) -> dict[str, str]:
        """Those beside the shard of ``position``, from this thread's most recently used ones."""
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
        """The image's bytes at ``position``, whatever the texts beside it contain; raises as :meth:`read`."""
        return self._content(position, ("image",))[2]["image"]

    def _content(self, position: int, wanted: Container[str]) -> tuple[str, str, dict[str, bytes]]:
        """Key, shard and the bytes of a sample's ``wanted`` members; of the others the headers are checked."""
        number, row = self._locate(position)
        url = self.urls[number]
        index = self._index(number)
        if row >= len(index):
            raise SampleError("missing sample", f"{url}[{row}]", url)
        key = index.keys[row]
        *places, checksum = index.rows[row].tolist()
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
            data = os.pread(file, last - first, first) if neighbours else b""
            for what, begin, end in members:
                if not neighbours:
                    first, data = begin, os.pread(file, end - begin, begin)
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
        if zlib.crc32(headers) != checksum:
            self.store.forget(self.shards[number].name)  # size and time are those of the indexed file, its content not
            raise SampleError("shard changed", key, url)
        return key, url, content

    def close(self) -> None:
        """Close the files that this thread has open; they are opened again when needed."""
        for file in self._local.__dict__.pop("files", {}).values():
            file.close()

    def _locate(self, position: int) -> tuple[int, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"no sample {position} among {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        return number, int(position - self._ends[number] + self.sizes[number])

    def _describe(self, url: str, counts: dict[str, int]) -> _Shard:
        """From the stored index, else the manifest's count, else by reading the shard's headers."""
        shard = _Shard(url, counts.get(url, 0), None, Counter())
        with suppress(OSError):
            stamp = None if is_remote(url) else stamp_of(local_path(url))  # the time of a fetched file means nothing
            if head := self.store.head(shard.name, stamp):
                return _Shard(url, *head)
        if url in counts:
            return shard
        try:
            index = self._read_index(url)
        except RemoteError as error:
            return _Shard(url, 0, None, Counter({error.kind: 1}))
        self.store.save(shard.name, index)
        return _Shard(url, len(index), index.stamp, index.skipped)

    def _index(self, number: int) -> ShardIndex:
        """A shard's index, from this thread's most recently used ones."""
        indexes: OrderedDict[int, ShardIndex] = self._local.__dict__.setdefault("indexes", OrderedDict())
        if number in indexes:
            indexes.move_to_end(number)
            return indexes[number]
        shard = self.shards[number]
        index = self.store.load(shard.name, None if is_remote(shard.url) else shard.stamp)
        if index is None:  # counted by its manifest, or the store was emptied
            try:
                index = self._read_index(shard.url)
            except RemoteError as error:
                raise SampleError(error.kind, "", shard.url) from error
            self.store.save(shard.name, index)
        indexes[number] = index
        if len(indexes) > _OPEN_INDEXES:
            indexes.popitem(last=False)
        return index

    def _read_index(self, url: str) -> ShardIndex:
        """A shard's index from its headers, or RemoteError."""
        if self.cache is None or not is_remote(url):
            return index_shard(local_path(url))
        with self.cache.opened(url) as file:
            return index_shard(url, file)

    def _open(self, number: int, key: str) -> int:
        """A descriptor of the shard's file, from this thread's most recently used ones."""
        shard = self.shards[number]
        files: OrderedDict[int, BinaryIO] = self._local.__dict__.setdefault("files", OrderedDict())
        if number in files:
            files.move_to_end(number)
            return files[number].fileno()
        remote = is_remote(shard.url)
        if self.cache is not None and remote:
            file = self.cache.opened(shard.url)
        else:
            file = open(local_path(shard.url), "rb", buffering=0)  # noqa: SIM115
        known, found = shard.stamp or self._index(number).stamp or (-1, -1), stamp_of(file.fileno())
        if found != known and not (remote and found[0] == known[0]):
            file.close()
            self.store.forget(shard.name)
            raise SampleError("shard changed", key, shard.url)
        files[number] = file
        if len(files) > _OPEN_SHARDS:
            files.popitem(last=False)[1].close()
        return file.fileno()


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
