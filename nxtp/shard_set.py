"""Many shards as one line of samples, read by position; remote shards fetched once and kept.

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.gopen import gopen

from nxtp.errors import UserError
from nxtp.shards import is_remote, replacing
from nxtp.tar_index import ShardIndex, index_shard, unreadable

log = logging.getLogger(__name__)

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28
_OPEN_SHARDS = 16
_LOCAL_SCHEME = re.compile(r"^file:(//)?")


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
        caption = None if text is None else decode_text(text)
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


def decode_text(text: bytes) -> str:
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
            return unreadable(str(path), "unreachable shard")
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
