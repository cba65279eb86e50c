"""What a set of samples is made of: sources, their weights, where the shards lie, which nouns are labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nxtp.config import to_dataclass

log = logging.getLogger("nxtp")


@dataclass
class Source:
    """One of several training sets.

    ``shards``            a directory, a glob, a brace expression, or a list of them
    ``expected_samples``  how many a recipe expects there (told when it differs)
    ``repeat``            how often each of its samples comes in an epoch: 1 once, 2 twice, 0.5 every other epoch
    """

    shards: Any
    expected_samples: int | None = None
    repeat: float = 1.0


@dataclass
class DataConfig:
    """Where the shards are and how they become batches.

    ``root``           where the sets stand together, for configurations that name it once
    ``train``          a directory of shards, a glob, a brace expression, a list of them, or name → :class:`Source`
    ``val``            name → shards, each evaluated and logged under its name
    ``batch_size``     images a rank and step
    ``num_workers``        loader processes a rank
    ``max_samples``        use only this many training samples: a fixed, nested choice (more samples contain fewer)
    ``fraction``       the same as a share of all training samples
    ``subset_seed``    another seed, another choice; the training's seed does not change it
    ``shuffle_window``         samples are shuffled within windows of this many, over shuffled shards; 0 shuffles shards only
    ``nouns``          backend that makes labels of captions, where a sample has no labels of its own
    ``given_labels``   all, or first: train on the first only of the labels that a sample gives (a class's main name)
    ``max_labels``     labels an image at most; of more, a new random choice each epoch
    ``max_skip_fraction``    a larger share of skipped samples than this ends the run
    ``cache_dir``      where remote shards are kept
    ``cache_gb``       at most so much of them (10⁹ bytes): the least recently used are deleted
    ``read_timeout``  seconds after which a transfer that stands still is given up
    ``features``       a directory that ``nxtp features`` made: training reads a frozen encoder's tokens, not images
    ``index_dir``      where the indexes of shards are kept; by default in the user's cache directory
    """

    root: str | None = None
    train: Any = None
    val: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    val_batch_size: int = 128
    num_workers: int = 1
    max_samples: int | None = None
    fraction: float | None = None
    subset_seed: int = 0
    shuffle_window: int = 20_000
    nouns: str = "textblob"
    given_labels: str = "all"
    max_labels: int = 32
    max_skip_fraction: float = 0.1
    cache_dir: str | None = None
    cache_gb: float | None = None
    read_timeout: float = 60.0
    features: str | None = None
    index_dir: str | None = None
    seed: int = 0


def named_sources(spec: Any) -> dict[str, Source]:
    """A set's sources by name; shards given without names are one source, named ''."""
    if not isinstance(spec, Mapping):
        return {"": Source(spec)}
    return {name: to_dataclass(Source, source, f"data.train.{name}") for name, source in spec.items()}
