"""What a set of samples is made of: sources, their weights, where the shards lie, which nouns are labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nxtp.config import to_dataclass
from nxtp.epoch_plan import Part
from nxtp.errors import UserError
from nxtp.index_store import IndexStore
from nxtp.labels import NounBackend, clean_labels, noun_backend
from nxtp.remote import RemoteCache
from nxtp.shard_set import RawSample, SampleFault, ShardSet
from nxtp.shards import expand_shards, identity, read_manifest

log = logging.getLogger("nxtp")


@dataclass
class Source:
    """One of several training sets.

    ``shards``   a directory, a glob, a brace expression, or a list of them
    ``samples``  how many a recipe expects there (told when it differs)
    ``weight``   how often each of its samples comes in an epoch: "natural" is once, 2 twice, 0.5 every other epoch
    """

    shards: Any
    samples: int | None = None
    weight: float | int | str = "natural"


@dataclass
class DataConfig:
    """Where the shards are and how they become batches.

    ``root``           where the sets stand together, for configurations that name it once
    ``train``          a directory of shards, a glob, a brace expression, a list of them, or name → :class:`Source`
    ``val``            name → shards, each evaluated and logged under its name
    ``batch_size``     images a rank and step
    ``workers``        loader processes a rank
    ``samples``        use only this many training samples: a fixed, nested choice (more samples contain fewer)
    ``fraction``       the same as a share of all training samples
    ``subset_seed``    another seed, another choice; the training's seed does not change it
    ``window``         samples are shuffled within windows of this many, over shuffled shards; 0 shuffles shards only
    ``nouns``          backend that makes labels of captions, where a sample has no labels of its own
    ``given_labels``   all, or first: train on the first only of the labels that a sample gives (a class's main name)
    ``max_labels``     labels an image at most; of more, a new random choice each epoch
    ``fault_limit``    a larger share of skipped samples than this ends the run
    ``cache_dir``      where remote shards are kept
    ``cache_gb``       at most so much of them (10⁹ bytes): the least recently used are deleted
    ``stall_timeout``  seconds after which a transfer that stands still is given up
    ``features``       a directory that ``nxtp features`` made: training reads a frozen encoder's tokens, not images
    ``index_dir``      where the indexes of shards are kept; by default in the user's cache directory
    """

    root: str | None = None
    train: Any = None
    val: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    val_batch_size: int = 128
    workers: int = 1
    samples: int | None = None
    fraction: float | None = None
    subset_seed: int = 0
    window: int = 20_000
    nouns: str = "textblob"
    given_labels: str = "all"
    max_labels: int = 32
    fault_limit: float = 0.1
    cache_dir: str | None = None
    cache_gb: float | None = None
    stall_timeout: float = 60.0
    features: str | None = None
    index_dir: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class OpenedSet:
    """A set that is ready to be read: its shards in one line, and which of them are each source's."""

    shards: ShardSet
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
        cache = RemoteCache(config.cache_dir, limit, config.stall_timeout)
    shards = ShardSet(sorted(url for members in urls.values() for url in members), cache, IndexStore(config.index_dir))
    if len(shards) == 0:
        raise UserError(f"data.{name}: the shards of {spec} hold no sample ({dict(shards.faults)}).")
    number = {url: i for i, url in enumerate(shards.urls)}
    parts = []
    for source, given in sources.items():
        part = Part(source, sorted(number[url] for url in urls[source]), _weight(given.weight, f"data.{name}.{source}"))
        parts.append(part)
        found = int(shards.sizes[list(part.shards)].sum())
        if given.samples is not None and found != given.samples:
            log.warning("data.%s.%s holds %d samples; the recipe expects %d.", name, source, found, given.samples)
    return OpenedSet(shards, parts)


def _weight(value: float | str, where: str) -> float:
    if value == "natural":
        return 1.0
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}.weight is '{value}': give a number above 0, or 'natural'.") from None


def named_sources(spec: Any) -> dict[str, Source]:
    """A set's sources by name; shards given without names are one source, named ''."""
    if not isinstance(spec, Mapping):
        return {"": Source(spec)}
    return {name: to_dataclass(Source, source, f"data.train.{name}") for name, source in spec.items()}


def warn_if_nouns_differ(name: str, spec: Any, nouns: str, trained: str | None) -> None:
    """Labels of captions depend on the backend that found them: say so where it is not the training's.

    Args:
        name: of the set, for the message.
        spec: its shards; a manifest that names a backend is believed, for others ``nouns`` is used.
        trained: the backend of the training's labels; None: unknown, nothing to compare.
    """
    for source in named_sources(spec).values():
        directory = Path(source.shards) if isinstance(source.shards, str | os.PathLike) else None
        manifest = read_manifest(directory) if directory is not None and directory.is_dir() else None
        here = ((manifest or {}).get("nouns") or {}).get("backend", nouns)
        if trained is not None and here != trained:
            log.warning("Set '%s': nouns come from '%s', the model's training labels from '%s'.", name, here, trained)


def label_texts(shards: ShardSet, config: DataConfig, limit: int = 20_000) -> list[str]:
    """Distinct labels of up to ``limit`` samples spread over the shards, sorted: what a tokenizer is trained on."""
    nouns = noun_backend(config.nouns)
    found: set[str] = set()
    for position in np.unique(np.linspace(0, len(shards) - 1, min(limit, len(shards)), dtype=np.int64)):
        with suppress(SampleFault):
            found.update(labels_of(shards.read(int(position)), nouns))
    shards.close()  # loader workers open their own
    return sorted(found)


def labels_of(raw: RawSample, nouns: NounBackend) -> list[str]:
    """Labels given explicitly win over nouns from a caption.

    Raises:
        SampleFault: "no caption" (nor labels), or "no labels" (no noun in the caption).
    """
    if raw.labels is not None:
        labels = clean_labels(raw.labels)
    elif raw.caption is not None:
        labels = nouns(raw.caption)
    else:
        raise SampleFault("no caption", raw.key, raw.shard)
    if not labels:
        raise SampleFault("no labels", raw.key, raw.shard)
    return labels
