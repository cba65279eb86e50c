"""Many shards as one line of samples, read by position.

Reading by position is what makes an epoch exact: shuffling, sharing out and resuming are arithmetic on positions,
and nothing is decoded twice.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from nxtp.data.shards.cache import RemoteCache, RemoteError
from nxtp.data.shards.index_store import IndexStore
from nxtp.data.shards.tar_index import HEADER, ShardIndex, index_shard
from nxtp.data.shards.urls import is_remote
from nxtp.errors import UserError, by_kind

log = logging.getLogger(__name__)

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28
_OPEN_SHARDS = 16
_OPEN_INDEXES = 32
_LOCAL_SCHEME = re.compile(r"^file:(//)?")


class SampleError(Exception):
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


@dataclass(frozen=True, slots=True)
class _Shard:
    """What is known of a shard without its index: samples, size and time of its file, damage."""

    url: str
    path: str
    samples: int
    stamp: tuple[int, int] | None
    skipped: Counter


class IndexedShards:
    """Many shards as one line of samples, positions 0 … len-1, in the order of ``urls``.

    Each shard is indexed once and its index kept on disk (``store``). Remote shards (anything with ``://``, and
    ``pipe:`` commands) are fetched whole into ``cache``: when they are first read where a manifest beside them says
    how many samples they hold, else at once. Damaged shards contribute what is readable; ``skipped`` counts the rest
    by kind. Copies (pickles, forks) share nothing: each process and thread opens its own files.

    Raises:
        UserError: a remote shard without ``cache``, or with a scheme that WebDataset cannot open.
    """

    def __init__(self, urls: Sequence[str], cache: RemoteCache | None = None, store: IndexStore | None = None):
        self.urls = [os.fspath(url) for url in urls]
        self.cache, self.store = cache, store or IndexStore()
        remote = [url for url in self.urls if is_remote(url)]
        if remote and cache is None:
            raise UserError(
                f"{remote[0]} is remote: name a directory that keeps fetched shards (data.cache_dir, --cache-dir)."
            )
        unknown = [url for url in remote if self.store.head(_name(url), None) is None]
        counts = cache.counts(unknown) if unknown else {}
        # Processes that begin together share the work: each starts elsewhere and takes over what others have stored.
        start = os.getpid() % max(len(self.urls), 1)
        order = [*range(start, len(self.urls)), *range(start)]
        with ThreadPoolExecutor(max_workers=8) as pool:
            looked_at = pool.map(lambda i: self._look_at(self.urls[i], counts), order)
            found = dict(zip(order, looked_at, strict=True))
        self.shards = [found[i] for i in range(len(self.urls))]
        self.sizes = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self.skipped: Counter = Counter()
        for shard in self.shards:
            self.skipped.update(shard.skipped)
            if shard.skipped:
                told = by_kind(shard.skipped)
                log.warning("%s: %s", shard.url, told)
        self._local = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_local": threading.local()}

    def shard_of(self, position: int) -> str:
        """The URL of the shard that holds ``position``."""
        return self.urls[self._locate(position)[0]]

    def key_of(self, position: int) -> str:
        """The key at ``position``; its number in the shard, in brackets, where the shard can no longer be read."""
        number, row = self._locate(position)
        try:
            return str(self._index(number).keys[row])
        except (SampleError, IndexError):
            return f"[{row}]"

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch the remote ones among the shards ``numbers``; failures are told when a sample is read."""
        for number in numbers:
            if is_remote(self.urls[number]):
                with suppress(RemoteError):
                    self.cache.fetch(self.urls[number])

    def read(self, position: int) -> RawSample:
        """The sample at ``position``.

        Raises:
            SampleError: "shard vanished", "shard changed" (since it was indexed), "unreadable shard", "unreachable
                shard", "stalled shard", "missing sample" (the manifest promised more), "truncated member",
                "oversized image|caption|json", "corrupt json", "bad labels" (not a list of strings) or "damaged
                image" (other bytes than its JSON's ``crc32``).
            IndexError: no such position.
        """
        number, row = self._locate(position)
        url = self.urls[number]
        shard = self._index(number)
        if row >= len(shard):
            raise SampleError("missing sample", f"{url}[{row}]", url)
        key = str(shard.keys[row])

        headers: dict[str, bytes] = {}

        def member(what: str, offsets: np.ndarray, sizes: np.ndarray, limit: int) -> bytes | None:
            offset, size = int(offsets[row]), int(sizes[row])
            if offset < 0:
                return None
            if size > limit:
                raise SampleError(f"oversized {what}", key, url)
            try:
                data = os.pread(self._open(number, key), HEADER + size, offset - HEADER)
            except FileNotFoundError:
                raise SampleError("shard vanished", key, url) from None
            except OSError as error:
                raise SampleError("unreadable shard", key, url) from error
            if len(data) < HEADER + size:
                raise SampleError("truncated member", key, url)
            headers[what] = data[:HEADER]
            return data[HEADER:]

        text = member("caption", shard.text_offset, shard.text_size, MAX_CAPTION_BYTES)
        record = member("json", shard.json_offset, shard.json_size, MAX_JSON_BYTES)
        image = member("image", shard.image_offset, shard.image_size, MAX_IMAGE_BYTES)
        if zlib.crc32(b"".join(headers.get(what, b"") for what in ("image", "caption", "json"))) != shard.headers[row]:
            self.store.forget(_name(url))  # size and time are those of the file that was indexed, the content is not
            raise SampleError("shard changed", key, url)
        caption = None if text is None else decode_text(text)
        labels = checksum = None
        if record is not None:
            try:
                values = json.loads(record)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                raise SampleError("corrupt json", key, url)
            labels, checksum = values.get("labels"), values.get("crc32")
            if labels is not None:
                if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                    raise SampleError("bad labels", key, url)
                labels = [sound_text(label) for label in labels]
            if not caption and isinstance(values.get("caption"), str):
                caption = sound_text(values["caption"]).strip()
        if isinstance(checksum, int) and zlib.crc32(image) != checksum:
            raise SampleError("damaged image", key, url)
        return RawSample(key, url, image, caption or None, labels)

    def close(self) -> None:
        """Close the files that this thread has open; they are opened again when they are needed."""
        for file in self._local.__dict__.pop("files", {}).values():
            file.close()

    def _locate(self, position: int) -> tuple[int, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"no sample {position} among {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        return number, int(position - self._ends[number] + self.sizes[number])

    def _look_at(self, url: str, counts: dict[str, int]) -> _Shard:
        """From the kept index, else the manifest's count, else by reading the shard's headers."""
        path, stamp = self._place(url)
        if (stamp is not None or is_remote(url)) and (head := self.store.head(_name(url), stamp)):
            samples, skipped, size = head
            return _Shard(url, path, samples, stamp or (size, 0), skipped)
        if url in counts:
            return _Shard(url, path, counts[url], None, Counter())
        try:
            index = self._indexed(url, path)
        except RemoteError as error:
            return _Shard(url, path, 0, None, Counter({error.kind: 1}))
        if not self.store.save(_name(url), index):
            self.__dict__.setdefault("_unsaved", {})[url] = index
        return _Shard(url, path, len(index), index.stamp, index.skipped)

    def _place(self, url: str) -> tuple[str, tuple[int, int] | None]:
        """A shard's local path, and its size and time; the time of a fetched file says nothing."""
        if is_remote(url):
            return str(self.cache.path_of(url)), None
        path = _LOCAL_SCHEME.sub("", url)
        with suppress(OSError):
            status = os.stat(path)
            return path, (status.st_size, status.st_mtime_ns)
        return path, None

    def _index(self, number: int) -> ShardIndex:
        """A shard's index, from this thread's most recently used ones."""
        indexes: OrderedDict[int, ShardIndex] = self._local.__dict__.setdefault("indexes", OrderedDict())
        if number in indexes:
            indexes.move_to_end(number)
            return indexes[number]
        shard = self.shards[number]
        index = self.__dict__.get("_unsaved", {}).get(shard.url)
        stamp = None if is_remote(shard.url) else shard.stamp
        index = index or self.store.load(_name(shard.url), shard.path, stamp)
        if index is None:  # counted by its manifest, or the store was emptied
            try:
                index = self._indexed(shard.url, shard.path)
            except RemoteError as error:
                raise SampleError(error.kind, "", shard.url) from error
            self.store.save(_name(shard.url), index)
        indexes[number] = index
        if len(indexes) > _OPEN_INDEXES:
            indexes.popitem(last=False)
        return index

    def _indexed(self, url: str, path: str) -> ShardIndex:
        """A shard's index from its headers.

        Raises:
            RemoteError: a remote one cannot be had.
        """
        if not is_remote(url):
            return index_shard(path)
        with self.cache.opened(url) as file:
            return index_shard(path, file)

    def _open(self, number: int, key: str) -> int:
        """A descriptor of the shard's file, from this thread's most recently used ones."""
        shard = self.shards[number]
        files: OrderedDict[int, BinaryIO] = self._local.__dict__.setdefault("files", OrderedDict())
        if number in files:
            files.move_to_end(number)
            return files[number].fileno()
        if is_remote(shard.url):
            try:
                file = self.cache.opened(shard.url)
            except RemoteError as error:
                raise SampleError(error.kind, key, shard.url) from error
        else:
            file = open(shard.path, "rb", buffering=0)  # noqa: SIM115
        status = os.fstat(file.fileno())
        found = (status.st_size, status.st_mtime_ns)
        expected = self._index(number).stamp if shard.stamp is None else shard.stamp
        if found[0] != expected[0] or (not is_remote(shard.url) and found != expected):
            file.close()
            self.store.forget(_name(shard.url))
            raise SampleError("shard changed", key, shard.url)
        files[number] = file
        if len(files) > _OPEN_SHARDS:
            files.popitem(last=False)[1].close()
        return file.fileno()


def _name(url: str) -> str:
    """What a shard's index is kept under: the same from every working directory."""
    return url if is_remote(url) else os.path.abspath(_LOCAL_SCHEME.sub("", url))


def decode_text(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return text.decode("latin-1").strip()


def sound_text(text: str) -> str:
    """Without the lone surrogates that JSON can hold and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")
