"""Opening a set of shards: one source or a mixture of several."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nxtp.data.config import DataConfig, SourceConfig, named_sources
from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.counts import UNAVAILABLE, Count, header_counts, listed_counts, missing_shards
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.tar_index import IndexStore
from nxtp.data.shards.urls import expand_shards, identity, parts_of
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError, by_kind, counted, some_of

log = logging.getLogger("nxtp")


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture: the numbers of its shards, ascending, and how often its samples come per epoch.

    With ``repeat`` 2.1 each sample comes twice per epoch, and a tenth of them, another one each epoch, once more.
    """

    name: str
    shards: Sequence[int]
    repeat: float = 1.0


@dataclass(frozen=True)
class OpenedSet:
    """A set that is ready to be read: its shards as one sequence, and its sources."""

    shards: IndexedShards
    sources: list[MixtureSource]

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names of the sources' shards and their numbers of samples, wherever they are stored.

        A name is the path below the source's common directory: a/0.tar and b/0.tar differ from b/0.tar and c/0.tar.
        """
        named = {}
        for source in self.sources:
            paths = [self.shards.urls[i].partition("?")[0] for i in source.shards]
            common = os.path.commonprefix([path[: path.rfind("/") + 1] for path in paths])  # noqa: RUF071  cut at a /
            names = [path[common.rfind("/") + 1 :] for path in paths]
            named[source.name] = list(zip(names, self.shards.sizes[list(source.shards)].tolist(), strict=True))
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    @property
    def plan(self) -> str:
        """What its epochs depend on besides settings: shards, samples, and the start of the fingerprint."""
        return f"{counted(len(self.shards.urls), 'shard')} of {len(self):,} samples ({self.fingerprint[:16]})"

    @property
    def local(self) -> dict[str, str]:
        """The size of each shard on this machine's disk, to be compared between machines."""
        return {shard.url: f"{shard.stamp[0]:,} bytes" for shard in self.shards.shards if shard.stamp}


def open_set(name: str, spec: Any, config: DataConfig, ranks: Ranks | None = None) -> OpenedSet:
    """Open the set ``data.<name>``: the first of ``ranks`` lists its shards, and all ranks have the same ones.

    Raises:
        UserError: ``spec`` is None, no shard is found, one cannot be had, none has a sample, or two sources share one.
    """
    if spec is None:
        raise UserError(f"data.{name} is not set: give a directory of shards, a glob or a brace expression.")
    ranks = ranks or Ranks()
    configs = named_sources(spec)
    cache = _cache_of(name, config)
    store = IndexStore(config.index_dir, config.index_gb * 1e9)
    urls = ranks.from_first(f"{name}/urls", lambda: _list_shards(name, configs, name in config.val))
    if not config.allow_missing_shards:
        ranks.from_first(f"{name}/complete", lambda: _check_complete(name, configs, urls, cache))
    every = sorted(url for members in urls.values() for url in members)
    listed = ranks.from_first(f"{name}/listed", lambda: listed_counts(every, cache))
    unlisted = [url for url in every if url not in listed]
    by_headers = ranks.share_out(
        f"{name}/headers", unlisted, lambda share: header_counts(share, cache, store, shown=ranks.rank == 0)
    )
    counts = dict(zip(unlisted, by_headers, strict=True)) | {url: (samples, {}) for url, samples in listed.items()}
    _check_available(name, counts, config)
    shards = IndexedShards(every, cache, store, [counts[url] for url in every])
    if len(shards) == 0:
        raise UserError(f"data.{name}: the shards of {spec} contain no sample ({by_kind(shards.skipped)}).")
    number = {url: i for i, url in enumerate(shards.urls)}
    sources = []
    for source, given in configs.items():
        own = sorted(number[url] for url in urls[source])
        sources.append(MixtureSource(source, own, given.repeat))
        shards.selections |= dict.fromkeys(urls[source], given.selection(config))
        found, expected = int(shards.sizes[own].sum()), given.expected_samples
        if expected not in (None, found):
            log.warning("data.%s.%s has %d samples; the recipe expects %d.", name, source, found, expected)
    return OpenedSet(shards, sources)


def _cache_of(name: str, config: DataConfig) -> RemoteCache | None:
    """The cache of a set's shards. With a limit, remote validation sets have ¼ of it, in a directory of their own.

    In one directory, validation would delete what is prefetched for the next training steps.
    """
    if config.cache_dir is None:
        return None
    directory, limit = Path(config.cache_dir), None if config.cache_gb is None else config.cache_gb * 1e9
    if limit is not None and all("://" in str(spec) for spec in (config.train, config.val)):
        if name in config.val:
            directory, limit = directory / "val", 0.25 * limit
        else:
            limit = 0.75 * limit
    return RemoteCache(directory, None if limit is None else int(limit), config.read_timeout, config.retries)


def _list_shards(name: str, sources: Mapping[str, SourceConfig], is_val: bool) -> dict[str, list[str]]:
    """The shards of each source."""
    try:
        urls = {source: expand_shards(given.shards) for source, given in sources.items()}
    except UserError as error:
        without = f" Without this validation set: '~data.val.{name}'." if is_val else ""
        raise UserError(f"{error}{without}") from error
    owner: dict[str, str] = {}
    for source, members in urls.items():
        for url in members:
            if (first := owner.setdefault(identity(url), source)) != source:
                raise UserError(f"data.{name}: the sources '{first}' and '{source}' both name {url}.")
    return urls


def _check_complete(
    name: str, sources: Mapping[str, SourceConfig], urls: Mapping[str, list[str]], cache: RemoteCache | None
) -> None:
    """Raise a UserError if a directory lacks shards that its manifest lists."""
    for source, given in sources.items():
        for part in map(os.fspath, parts_of(given.shards)):
            if missing := missing_shards(part, urls[source], cache):
                raise UserError(
                    f"data.{name}: the manifest of {part} lists {counted(len(missing), 'shard')} that it does not "
                    f"contain: {some_of(missing)}. Restore them; a glob, as {part.rstrip('/')}/*.tar, or "
                    "data.allow_missing_shards=true trains without them."
                )


def _check_available(name: str, counts: Mapping[str, Count], config: DataConfig) -> None:
    """Raise a UserError if more shards are unavailable than the settings allow."""
    kinds = {url: kind for url, (_, skipped) in counts.items() for kind in skipped if kind in UNAVAILABLE}
    limit = config.max_skip_fraction * len(counts) if config.allow_missing_shards else 0
    if len(kinds) > limit:
        allow = "data.allow_missing_shards=true trains without them, up to data.max_skip_fraction of all shards"
        raise UserError(
            f"data.{name}: {len(kinds):,} of {counted(len(counts), 'shard')} cannot be had "
            f"({by_kind(Counter(kinds.values()))}): {some_of(sorted(kinds))}. Restore them; {allow}."
        )
