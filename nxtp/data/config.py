"""The configuration of data: sources of shards, labels, batches (conf/data)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nxtp.config import to_dataclass
from nxtp.data.where import Selection
from nxtp.errors import UserError, at_least, one_of


@dataclass
class SourceConfig:
    """One of several training sets.

    ``shards``            a directory, a glob, a brace expression, or a list of them
    ``expected_samples``  how many a recipe expects; a warning if the number differs
    ``repeat``            how often each sample comes per epoch: 1 once, 2 twice, 0.5 every other epoch
    ``caption_key``       of this source, in place of ``data.caption_key``; '' is null
    ``where``             likewise
    """

    shards: Any
    expected_samples: int | None = None
    repeat: float = 1.0
    caption_key: str | None = None
    where: str | None = None

    def selection(self, data: DataConfig) -> Selection:
        """What is used of the source's samples."""
        key = data.caption_key if self.caption_key is None else self.caption_key
        return Selection(key or "", (data.where if self.where is None else self.where) or "")


@dataclass
class DataConfig:
    """Where the shards are and how they become batches.

    ``root``              a directory that the other keys of a file in conf/data may refer to
    ``train``             a directory of shards, a glob, a brace expression, a list, or name → :class:`SourceConfig`
    ``val``               name → shards, each evaluated and logged under its name
    ``batch_size``        images per rank and step
    ``num_workers``       loader processes per rank
    ``max_samples``       use only so many training samples; with nxtp evaluate so many of each set. A fixed, nested
                          choice (more samples contain fewer)
    ``fraction``          the same as a share of all samples
    ``subset_seed``       seed of that choice; the training seed does not change it
    ``caption_key``       the field of a training sample's JSON that is its caption, or parquet:COLUMN of the table
                          NNNNN.parquet beside NNNNN.tar, by its column key; null: the text, else the field caption
    ``where``             use only the training samples whose JSON fulfils this: "similarity > 0.3 and width >= 200"
    ``shuffle_window``    shuffle samples within windows of this many, over shuffled shards; 0 shuffles shards only
    ``nouns``             backend that finds the nouns of a caption, for samples without labels of their own
    ``stop_nouns``        nouns of captions that are no labels, singular: [person, people, view]
    ``given_labels``      all, or first: train on the first of the labels that a sample gives (a class's main name)
    ``label_order``       a file with a label per line: training writes an image's labels in its order, others after
                          them; null: shuffled anew each epoch
    ``max_labels``        labels per image at most; of more, a new random choice each epoch
    ``transforms``        steps by name, RGB image → RGB image, that change images of training before they are resized
    ``max_image_pixels``  a larger image is skipped before it is decoded; with a fourth channel from ¾ of it on
    ``max_skip_fraction`` a larger share of skipped samples ends the run
    ``allow_missing_shards``  shards that cannot be had at the start are skipped, by all ranks alike, up to
                          max_skip_fraction of them; otherwise an error
    ``allow_changed_shards``  a run resumes although a set has other shards or numbers of samples than before: its epoch
                          is then another one
    ``cache_dir``         where fetched remote shards are stored
    ``cache_gb``          size limit of it (10⁹ bytes): the least recently used shards are deleted
    ``read_timeout``      seconds in which a part of a remote shard must arrive
    ``retries``           how often a transfer continues after a fault, in a row, before samples count as skipped
    ``nodes``             shared: every machine reads all shards; split: each reads a part of every window's shards
    ``features``          a directory of ``nxtp features``: train on a frozen encoder's tokens instead of images
    ``index_dir``         where the indexes of shards are stored; by default in the user's cache directory
    ``index_gb``          size limit of it (10⁹ bytes): the least recently read indexes are deleted
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
    caption_key: str | None = None
    where: str | None = None
    shuffle_window: int = 20_000
    nouns: str = "hanta"
    stop_nouns: list[str] = field(default_factory=list)
    given_labels: str = "all"
    label_order: str | None = None
    max_labels: int = 32
    transforms: dict[str, Any] | None = None
    max_image_pixels: int = 100_000_000
    max_skip_fraction: float = 0.1
    allow_missing_shards: bool = False
    allow_changed_shards: bool = False
    cache_dir: str | None = None
    cache_gb: float | None = None
    read_timeout: float = 60.0
    retries: int = 3
    nodes: str = "shared"
    features: str | None = None
    index_dir: str | None = None
    index_gb: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        lowests = {"batch_size": 1, "val_batch_size": 1, "num_workers": 0, "shuffle_window": 0, "max_labels": 1}
        lowests |= {"max_image_pixels": 1, "retries": 0, "index_gb": 0}
        for name, lowest in lowests.items():
            at_least(f"data.{name}", getattr(self, name), lowest)
        if self.cache_gb is not None:
            at_least("data.cache_gb", self.cache_gb, 0)
        if not 0 <= self.max_skip_fraction <= 1:
            raise UserError(f"data.max_skip_fraction must be ≥ 0 and ≤ 1, got {self.max_skip_fraction}.")
        if not 0 < self.read_timeout < math.inf:
            raise UserError(f"data.read_timeout must be > 0 seconds, got {self.read_timeout}.")
        if slashed := next((name for name in self.val if "/" in name), None):
            raise UserError(f"data.val must not name a set '{slashed}': its metrics are SET/METRIC.")
        one_of("data.nodes", self.nodes, ("shared", "split"))
        one_of("data.given_labels", self.given_labels, ("all", "first"))
        Selection(self.caption_key or "", self.where or "")  # which finds what is wrong
        if self.features and self.transforms:
            raise UserError("data.features are of images as they are: use transforms=none.")


def named_sources(spec: Any) -> dict[str, SourceConfig]:
    """A set's sources by name: each a :class:`SourceConfig`, or its shards. Without names they are one source, ''."""
    if not isinstance(spec, Mapping):
        return {"": SourceConfig(spec)}
    return {
        name: to_dataclass(SourceConfig, source, f"data.train.{name}")
        if isinstance(source, Mapping)
        else SourceConfig(source)
        for name, source in spec.items()
    }
