"""Opening a set of shards: one source or a mixture of several."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nxtp.data.config import DataConfig, named_sources
from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.tar_index import IndexStore
from nxtp.data.shards.urls import expand_shards, identity
from nxtp.errors import UserError, by_kind

log = logging.getLogger("nxtp")


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture: the numbers of its shards, ascending, and how often its samples come per epoch.

    ``repeat`` w gives each sample ⌊w⌋ times per epoch, and a share w - ⌊w⌋ of the samples, which moves on with every
    epoch, once more.
    """

    name: str
    shards: Sequence[int]
    repeat: float = 1.0


@dataclass(frozen=True)
class OpenedSet:
    """A set that is ready to be read: its shards in one sequence, and the sources that they belong to."""

    shards: IndexedShards
    sources: list[MixtureSource]

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes (in samples) of the sources' shards, wherever these are stored."""
        names = [url.partition("?")[0].rpartition("/")[2] for url in self.shards.urls]
        sizes = self.shards.sizes.tolist()
        named = {source.name: [[names[i], sizes[i]] for i in source.shards] for source in self.sources}
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def open_set(name: str, spec: Any, config: DataConfig) -> OpenedSet:
    """The indexed shards of the set ``data.<name>``.

    Raises:
        UserError: ``spec`` is None, no shard is found, none has a sample, or two sources share one.
    """
    if spec is None:
        raise UserError(f"data.{name} is not set: give a directory of shards, a glob or a brace expression.")
    configs = named_sources(spec)
    urls = {source: expand_shards(given.shards) for source, given in configs.items()}
    owner: dict[str, str] = {}
    for source, members in urls.items():
        for url in members:
            if (first := owner.setdefault(identity(url), source)) != source:
                raise UserError(f"data.{name}: the sources '{first}' and '{source}' both name {url}.")
    cache = None
    if config.cache_dir is not None:
        limit = None if config.cache_gb is None else int(config.cache_gb * 1e9)
        cache = RemoteCache(config.cache_dir, limit, config.read_timeout)
    every = sorted(url for members in urls.values() for url in members)
    shards = IndexedShards(every, cache, IndexStore(config.index_dir, config.index_gb * 1e9))
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
