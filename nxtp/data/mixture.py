"""Opening a set of shards, which may be a mixture of several sources."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from nxtp.data.config import DataConfig, named_sources
from nxtp.data.sampler import Part
from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.tar_index import IndexStore
from nxtp.data.shards.urls import expand_shards, identity
from nxtp.errors import UserError, by_kind

log = logging.getLogger("nxtp")


@dataclass(frozen=True)
class OpenedSet:
    """A set that is ready to be read: its shards in one line, and which of them are each source's."""

    shards: IndexedShards
    parts: list[Part]

    def __len__(self) -> int:
        return len(self.shards)


def open_set(name: str, spec: Any, config: DataConfig) -> OpenedSet:
    """The indexed shards of one set.

    Raises:
        UserError: nothing is given, nothing found, or nothing in it.
    """
    if spec is None:
        raise UserError(f"data.{name} is not set: give a directory of shards, a glob or a brace expression.")
    sources = named_sources(spec)
    urls = {source: expand_shards(given.shards) for source, given in sources.items()}
    owner: dict[str, str] = {}
    for source, members in urls.items():
        for url in members:
            if (first := owner.setdefault(identity(url), source)) != source:
                raise UserError(f"data.{name}: the sources '{first}' and '{source}' both name {url}.")
    cache = None
    if config.cache_dir is not None:
        limit = None if config.cache_gb is None else int(config.cache_gb * 1e9)
        cache = RemoteCache(config.cache_dir, limit, config.read_timeout)
    shards = IndexedShards(
        sorted(url for members in urls.values() for url in members), cache, IndexStore(config.index_dir)
    )
    if len(shards) == 0:
        raise UserError(f"data.{name}: the shards of {spec} hold no sample ({by_kind(shards.skipped)}).")
    number = {url: i for i, url in enumerate(shards.urls)}
    parts = []
    for source, given in sources.items():
        part = Part(source, sorted(number[url] for url in urls[source]), given.repeat)
        parts.append(part)
        found = int(shards.sizes[list(part.shards)].sum())
        if given.expected_samples is not None and found != given.expected_samples:
            log.warning(
                "data.%s.%s holds %d samples; the recipe expects %d.", name, source, found, given.expected_samples
            )
    return OpenedSet(shards, parts)
