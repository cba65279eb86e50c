"""Shards → batches: a deterministic plan of every epoch, samples that are skipped and counted, the DataModule."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nxtp.config import to_dataclass
from nxtp.errors import UserError
from nxtp.images import ImageError, load_image
from nxtp.labels import clean_labels, noun_backend
from nxtp.layout import Layout, Objective, lay_out
from nxtp.pixels import to_pixels
from nxtp.shard_set import SampleFault, ShardSet
from nxtp.shards import expand_shards, read_manifest
from nxtp.tokens import LabelTokenizer

log = logging.getLogger("nxtp")


@dataclass
class Source:
    """One of several training sets: its shards, and how many samples a recipe expects there (told when it differs)."""

    shards: Any
    samples: int | None = None


@dataclass
class DataConfig:
    """Where the shards are and how they become batches.

    ``root``           where the sets stand together, for configurations that name it once
    ``train``          a directory of shards, a glob, a brace expression, a list of them, or name → :class:`Source`
    ``val``            name → shards, each evaluated and logged under its name
    ``batch_size``     images a rank and step
    ``workers``        loader processes a rank
    ``samples``        use only this many training samples: a fixed, nested choice (more samples contain fewer)
    ``window``         samples are shuffled within windows of this many, over shuffled shards; 0 shuffles shards only
    ``nouns``          backend that makes labels of captions, where a sample has no labels of its own
    ``max_labels``     labels an image at most; of more, a new random choice each epoch
    ``fault_limit``    a larger share of skipped samples than this ends the run
    ``cache_dir``      where remote shards are kept
    """

    root: str | None = None
    train: Any = None
    val: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    val_batch_size: int = 128
    workers: int = 1
    samples: int | None = None
    window: int = 20_000
    nouns: str = "textblob"
    max_labels: int = 32
    fault_limit: float = 0.1
    cache_dir: str | None = None
    seed: int = 0


@dataclass
class Batch:
    """What a step sees: ``images`` uint8 [B, 3, S, S], the laid-out labels, and what was skipped to get them.

    ``offered`` counts the samples that were read for this batch, ``faults`` those of them that were skipped,
    by kind. B may be smaller than the batch size, even 0.
    """

    images: Tensor
    layout: Layout
    keys: list[str]
    labels: list[list[str]]
    offered: int
    faults: Counter

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, *args, **kwargs) -> Batch:
        return Batch(
            self.images.to(*args, **kwargs),
            self.layout.to(*args, **kwargs),
            self.keys,
            self.labels,
            self.offered,
            self.faults,
        )

    def pin_memory(self) -> Batch:
        return Batch(
            self.images.pin_memory(), self.layout.pin_memory(), self.keys, self.labels, self.offered, self.faults
        )


class EpochPlan(Sampler):
    """Which samples make each batch of an epoch, on one rank: a function of (seed, epoch) alone.

    The global order is the same whatever the number of ranks and loader workers: shards in a shuffled order,
    end to end, shuffled again within windows. Step i of all ranks together takes the i-th run of
    ``batch_size · world`` samples of it. In training an epoch has whole steps only (the few samples left over
    change with the epoch); in evaluation (``shuffle=False``) every sample comes once, the last step is shared
    out evenly and may leave a rank with a smaller or empty batch.

    Yields:
        (epoch, int64 array of positions in the ShardSet)
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        window: int = 20_000,
        rank: int = 0,
        world: int = 1,
        samples: int | None = None,
    ):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.shuffle, self.window = shuffle, window
        self.chosen = _nested_choice(int(self.sizes.sum()), samples, seed)
        self.total = len(self.chosen)
        self.epoch = 0
        self.start = 0
        per_step = batch_size * world
        self.steps = self.total // per_step if shuffle else -(-self.total // per_step)
        if self.steps == 0:
            raise UserError(
                f"{self.total} samples do not fill one step of {batch_size} images on {world} rank(s): "
                "set a smaller data.batch_size or give more data."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        order = self._order(self.epoch)
        per_step = self.batch_size * self.world
        for step in range(self.start, self.steps):
            run = order[step * per_step : (step + 1) * per_step]
            yield self.epoch, np.array_split(run, self.world)[self.rank]

    def _order(self, epoch: int) -> np.ndarray:
        """All chosen positions in the order of this epoch."""
        if not self.shuffle:
            return self.chosen
        rng = np.random.default_rng([self.seed, epoch])
        starts = np.cumsum(self.sizes) - self.sizes
        bounds = np.searchsorted(self.chosen, np.append(starts, self.sizes.sum()))
        order = np.concatenate([self.chosen[bounds[s] : bounds[s + 1]] for s in rng.permutation(len(self.sizes))])
        if self.window > 1:
            for begin in range(0, self.total, self.window):
                rng.shuffle(order[begin : begin + self.window])
        return order


def _nested_choice(total: int, samples: int | None, seed: int) -> np.ndarray:
    """Sorted positions of the ``samples`` of ``total`` that come first in a fixed random order."""
    if samples is None or samples >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(np.random.default_rng([seed, 0xDA7A]).permutation(total)[:samples]).astype(np.int64)


class Batches(Dataset):
    """Map-style over batches: (epoch, positions) → :class:`Batch`. Runs in loader workers."""

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: LabelTokenizer,
        config: DataConfig,
        *,
        image_size: int,
        num_image_tokens: int,
        objective: Objective,
        prompts: Sequence[str],
        training: bool,
    ):
        self.shards, self.tokenizer, self.config = shards, tokenizer, config
        self.image_size, self.num_image_tokens, self.objective = image_size, num_image_tokens, objective
        self.prompts, self.training = list(prompts), training
        self.nouns = noun_backend(config.nouns)

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Batch:
        epoch, positions = item
        rng = np.random.default_rng([self.config.seed, epoch, int(positions[0]) if len(positions) else 0])
        faults: Counter = Counter()
        images, keys, texts, ids = [], [], [], []
        for position in positions.tolist():
            try:
                raw = self.shards.read(position)
                labels = self.labels_of(raw)
                pixels = to_pixels(load_image(raw.image, near=self.image_size), self.image_size)
            except SampleFault as fault:
                faults[fault.kind] += 1
                continue
            except ImageError:
                faults["bad image"] += 1
                continue
            if self.training:
                labels = [labels[i] for i in rng.permutation(len(labels))[: self.config.max_labels]]
            images.append(pixels)
            keys.append(raw.key)
            texts.append(labels)
            ids.append(self.tokenizer.encode_labels(labels))
        prompt = self.prompts[rng.integers(len(self.prompts))] if self.training else self.tokenizer.prompt
        layout = lay_out(
            ids,
            prompt=self.tokenizer.encode_prompt(prompt),
            delimiter=self.tokenizer.delimiter_id,
            num_image_tokens=self.num_image_tokens,
            objective=self.objective,
        )
        empty = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return Batch(torch.stack(images) if images else empty, layout, keys, texts, len(positions), faults)

    def labels_of(self, raw) -> list[str]:
        """Labels given explicitly win over nouns from a caption.

        Raises:
            SampleFault: neither labels nor caption, or no noun in the caption.
        """
        if raw.labels is not None:
            labels = clean_labels(raw.labels)
        elif raw.caption is not None:
            labels = self.nouns(raw.caption)
        else:
            raise SampleFault("no caption", raw.key, raw.shard)
        labels = [label for label, ids in zip(labels, self.tokenizer.encode_labels(labels), strict=True) if ids]
        if not labels:
            raise SampleFault("no labels", raw.key, raw.shard)
        return labels


class Loader(DataLoader):
    """A DataLoader over an :class:`EpochPlan` that says where it is, and continues there."""

    def __init__(self, dataset: Batches, plan: EpochPlan, workers: int, pin_memory: bool):
        super().__init__(
            dataset,
            sampler=plan,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            persistent_workers=False,
            pin_memory=pin_memory,
            worker_init_fn=_quiet_tokenizers,
        )
        self._position = (0, 0)
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing starts before the first batch is asked for, when epoch and state are known.
        plan: EpochPlan = self.sampler
        plan.start = self._resume[1] if self._resume and self._resume[0] == plan.epoch else 0
        self._resume = None
        for done, batch in enumerate(super().__iter__(), start=plan.start + 1):
            self._position = (plan.epoch, done)
            yield batch

    def state_dict(self) -> dict[str, int]:
        epoch, steps = self._position
        return {"epoch": epoch, "steps": steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = self._position = (state["epoch"], state["steps"])


def _quiet_tokenizers(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class ShardData(L.LightningDataModule):
    """Caption shards for training and any number of named validation sets.

    Rank and world size are taken from the trainer, never from the environment.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: LabelTokenizer,
        *,
        image_size: int,
        num_image_tokens: int,
        objective: Objective | str = Objective.MATCHED,
        prompts: Sequence[str] = (),
    ):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.objective, self.prompts = Objective(objective), list(prompts) or [tokenizer.prompt]
        self.shard_sets: dict[str, ShardSet] = {}
        self._train_loader: Loader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def shard_faults(self) -> Counter:
        """Damaged shards met while indexing, by kind."""
        return sum((shards.faults for shards in self.shard_sets.values()), Counter())

    @property
    def val_names(self) -> list[str]:
        return list(self.config.val)

    def open(self, name: str, spec: Any) -> ShardSet:
        """The indexed shards of ``spec``, indexed once a process."""
        if name not in self.shard_sets:
            self.shard_sets[name] = open_shards(name, spec, self.config)
        return self.shard_sets[name]

    def train_dataloader(self) -> Loader:
        self._train_loader = self.loader("train", self.config.train, training=True)
        if self._resume is not None:
            self._train_loader.load_state_dict(self._resume)
        return self._train_loader

    # Lightning restores a loader only if it was made after the checkpoint was read, and the learning-rate schedule
    # has it made before, to count the steps. So the position is kept here too.

    def state_dict(self) -> dict[str, Any]:
        return {"train": self._train_loader.state_dict()} if self._train_loader is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = state.get("train")
        if self._train_loader is not None and self._resume is not None:
            self._train_loader.load_state_dict(self._resume)

    def val_dataloader(self) -> list[Loader]:
        return [self.loader(name, spec, training=False) for name, spec in self.config.val.items()]

    def loader(self, name: str, spec: Any, *, training: bool) -> Loader:
        """Batches of one set of shards; shuffled and in whole steps for training, each sample once otherwise."""
        shards = self.open(name, spec)
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        plan = EpochPlan(
            shards.sizes,
            self.config.batch_size if training else self.config.val_batch_size,
            shuffle=training,
            seed=self.config.seed,
            window=self.config.window,
            rank=rank,
            world=world,
            samples=self.config.samples if training else None,
        )
        batches = Batches(
            shards,
            self.tokenizer,
            self.config,
            image_size=self.image_size,
            num_image_tokens=self.num_image_tokens,
            objective=self.objective,
            prompts=self.prompts,
            training=training,
        )
        return Loader(batches, plan, self.config.workers, pin_memory=torch.cuda.is_available())


def open_shards(name: str, spec: Any, config: DataConfig) -> ShardSet:
    """The indexed shards of one set.

    Raises:
        UserError: nothing is given, nothing found, or nothing in it.
    """
    if spec is None:
        raise UserError(f"data.{name} is not set: give a directory of shards, a glob or a brace expression.")
    sources = named_sources(spec)
    parts = {source: expand_shards(given.shards) for source, given in sources.items()}
    shards = ShardSet(sorted({url for urls in parts.values() for url in urls}), cache_dir=config.cache_dir)
    if len(shards) == 0:
        raise UserError(f"data.{name}: the shards of {spec} hold no sample ({dict(shards.faults)}).")
    size = dict(zip(shards.urls, shards.sizes.tolist(), strict=True))
    for source, given in sources.items():
        found = sum(size[url] for url in parts[source])
        if given.samples is not None and found != given.samples:
            log.warning("data.%s.%s holds %d samples; the recipe expects %d.", name, source, found, given.samples)
    return shards


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
        try:
            raw = shards.read(int(position))
        except SampleFault:
            continue
        if raw.labels is not None:
            found.update(clean_labels(raw.labels))
        elif raw.caption is not None:
            found.update(nouns(raw.caption))
    return sorted(found)
