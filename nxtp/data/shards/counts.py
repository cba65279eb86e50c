"""Numbers of samples of shards: from files beside them, else from the tar headers."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.manifest import MANIFEST
from nxtp.data.shards.remote import ForwardFile, RemoteError, read_file
from nxtp.data.shards.tar_index import IndexStore, ShardIndex, index_shard, stamp_of
from nxtp.data.shards.urls import directory_of, identity, is_remote, local_path
from nxtp.errors import UserError

log = logging.getLogger(__name__)

UNAVAILABLE = ("shard vanished", "unreadable shard", "unreachable shard", "stalled shard")  # not read at all
THREADS = 16  # files read at once
_MANY = 100  # shards, whose counting is shown
_MOST = 10**9  # samples per shard: a list with more is damaged
Count = tuple[int, dict[str, int]]  # samples of a shard, and what is skipped in it, by kind


def listed_counts(urls: Sequence[str], cache: RemoteCache | None) -> dict[str, int]:
    """Numbers of samples that files beside ``urls`` list; the shards themselves are not read.

    The first of these files that lists a shard counts: manifest.json, sizes.json of open_clip, index.json of
    WebDataset, per shard _stats.json or .parquet of img2dataset. A manifest's entry is ignored if a local shard has
    another size, and any entry of 0 samples: reading the headers of such a shard costs little.

    Raises:
        UserError: a remote shard without ``cache``.
    """
    if cache is None and (remote := next(filter(is_remote, urls), None)) is not None:
        raise UserError(f"{remote} is remote: set a directory for fetched shards (data.cache_dir, --cache-dir).")
    found: dict[str, int] = {}
    directories: dict[str, list[str]] = {}
    for url in urls:
        if not url.startswith("pipe:"):  # a command has no directory
            directories.setdefault(url.rpartition("/")[0], []).append(url)
    with ThreadPoolExecutor(THREADS) as pool:
        for directory, members in directories.items():
            rest = members
            for name, parse in _LISTS.items():
                if rest and (content := read_json(f"{directory}/{name}" if directory else name, cache)) is not None:
                    with suppress(ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
                        listed = parse(content)
                        found |= {url: listed[n][0] for url in rest if _fits(url, listed.get(n := _name(url)))}
                        rest = [url for url in rest if url not in found]
            if rest and successes(rest[0], cache) is not None:
                counted = pool.map(lambda url: successes(url, cache), rest)
                found |= {url: samples for url, samples in zip(rest, counted, strict=True) if samples is not None}
    return found


def missing_shards(spec: str, urls: Sequence[str], cache: RemoteCache | None) -> list[str]:
    """Shards that the manifest of the directory ``spec`` lists and ``urls`` lack, as in an unfinished copy.

    Empty if ``spec`` is not a directory.
    """
    directory = (directory_of(spec) or spec).rstrip("/")
    if directory_of(spec) or any(url.startswith(f"{directory}/") for url in urls):
        known = {*map(identity, urls)}
        with suppress(KeyError, TypeError):
            rows = read_json(f"{directory}/{MANIFEST}", cache)["shards"]
            names = {row["name"] for row in rows if row["samples"]}
            return sorted(name for name in names if identity(f"{directory}/{name}") not in known)
    return []


def header_counts(
    urls: Sequence[str], cache: RemoteCache | None, store: IndexStore, *, shown: bool = False
) -> list[Count]:
    """Samples of shards from their stored indexes, else from their headers; new indexes are stored.

    Args:
        shown: show progress for many shards.
    """
    failed: list[str] = []

    def count(url: str) -> Count:
        name = index_name(url)
        with suppress(OSError):
            head = store.head(name, None if is_remote(url) else stamp_of(name))
            if head and head[0]:  # an empty shard may have been replaced, which no reader would notice
                return head[0], dict(head[2])
        try:
            index = read_index(url, cache)
        except RemoteError as error:
            if not failed:  # the caller names all, without the reason
                log.warning("%s: %s", url, error)
            failed.append(url)
            return 0, {error.kind: 1}
        store.save(name, index)
        return len(index), dict(index.skipped)

    with ThreadPoolExecutor(THREADS) as pool:
        counts: Iterable[Count] = pool.map(count, urls)
        if shown and len(urls) >= _MANY:
            log.info("The headers of up to %s shards are read: no file beside them lists their samples.", len(urls))
            counts = track(counts, "counting samples", len(urls), console=Console(stderr=True), transient=True)
        return list(counts)


def count_shards(urls: Sequence[str], cache: RemoteCache | None, store: IndexStore) -> list[Count]:
    """Samples of shards, from files beside them or from their headers."""
    listed = listed_counts(urls, cache)
    unlisted = [url for url in urls if url not in listed]
    found = dict(zip(unlisted, header_counts(unlisted, cache, store), strict=True))
    return [found[url] if url in found else (listed[url], {}) for url in urls]


def read_index(url: str, cache: RemoteCache | None) -> ShardIndex:
    """Index a shard by its headers. Long members of a remote shard that is not in the cache are not transferred.

    Raises:
        RemoteError: it is not available.
    """
    if not is_remote(url) or cache is None:
        return index_shard(local_path(url))
    if not (url.startswith("pipe:") or cache.path_of(url).exists()):
        file = ForwardFile(url, cache.pace, cache.retries)
        if file.stamp[0] >= 0:
            return index_shard(url, file)
    return index_shard(url, cache.open(url))


def index_name(url: str) -> str:
    """The name of a shard's stored index: the same from every working directory."""
    return url if is_remote(url) else os.path.abspath(local_path(url))


def successes(url: str, cache: RemoteCache | None) -> int | None:
    """Samples of one shard by img2dataset's files beside it; None without them."""
    stem = url.removesuffix(".tar")
    with suppress(ArithmeticError, KeyError, TypeError, ValueError):
        if 0 < (count := int(read_json(f"{stem}_stats.json", cache)["successes"])) < _MOST:
            return count
    return _rows_of_parquet(f"{stem}.parquet", cache)


def _rows_of_parquet(url: str, cache: RemoteCache | None) -> int | None:
    """The number of rows whose download succeeded."""
    try:
        from pyarrow.parquet import read_table

        content = read_content(url, cache)
        return read_table(io.BytesIO(content), columns=["status"])["status"].to_pylist().count("success")
    except (ImportError, OSError, ValueError, KeyError):  # pyarrow's errors are ValueErrors too
        return None


def read_content(url: str, cache: RemoteCache | None) -> bytes:
    """A small file's content; raises OSError."""
    if is_remote(url) and cache is not None:
        return read_file(url, cache.pace, cache.retries)
    return Path(local_path(url)).read_bytes()


def read_json(url: str, cache: RemoteCache | None) -> Any:
    """The content of a small JSON file; None if it is missing or no JSON."""
    try:
        return json.loads(read_content(url, cache))
    except (OSError, RecursionError, ValueError) as error:
        if not isinstance(error, OSError):
            log.warning("%s is no JSON, and is not used.", url)
        return None


def _fits(url: str, listed: tuple[int, int | None] | None) -> bool:
    """Whether a shard's entry can be used: a plausible number of samples, and the size of a local file."""
    if listed is None or not 0 < listed[0] < _MOST:
        return False
    if listed[1] is None or is_remote(url):
        return True
    with suppress(OSError):
        return os.stat(local_path(url)).st_size == listed[1]
    return False


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


_LISTS: dict[str, Callable[[Any], dict[str, tuple[int, int | None]]]] = {  # shard → samples, and bytes if listed
    MANIFEST: lambda content: {row["name"]: (int(row["samples"]), int(row["bytes"])) for row in content["shards"]},
    "sizes.json": lambda content: {name: (int(samples), None) for name, samples in content.items()},
    "index.json": lambda content: {_name(row["url"]): (int(row["nsamples"]), None) for row in content["shardlist"]},
}
