"""Shards → batches: samples decoded and laid out or skipped and counted, the loader that resumes, the DataModule."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nxtp.epoch_plan import EpochPlan
from nxtp.errors import UserError
from nxtp.features import FeatureStore
from nxtp.images import ImageError, load_image
from nxtp.labels import noun_backend
from nxtp.layout import Layout, Objective, lay_out
from nxtp.parallel import data_ranks
from nxtp.pixels import to_pixels
from nxtp.shard_set import RawSample, SampleFault, ShardSet
from nxtp.sources import DataConfig, OpenedSet, labels_of, open_set
from nxtp.tokens import LabelTokenizer


@dataclass
class Batch:
    """What a step sees, and what was skipped to get it.

    ``images`` uint8 [B, 3, S, S], or features of a frozen encoder, floating point [B, N, D_encoder]; ``layout`` their
    laid-out labels. ``offered`` counts the samples that were read for this batch, ``faults`` those of them that were
    skipped, by kind. B may be smaller than the batch size, in evaluation even 0. In training a batch without a usable
    sample has no keys and one blank image whose loss does not count: every rank must take part in the step.
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
        if config.given_labels not in ("all", "first"):
            raise UserError(f"data.given_labels is '{config.given_labels}': say all or first.")
        self.features = FeatureStore(config.features) if training and config.features else None

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Batch:
        epoch, positions = item
        faults: Counter = Counter()
        images, keys, texts, ids = [], [], [], []
        for position in positions.tolist():
            try:
                raw = self.shards.read(position)
                labels = self.labels_of(raw)
                pixels = self.pixels_of(raw)
            except SampleFault as fault:
                faults[fault.kind] += 1
                continue
            except ImageError:
                faults["bad image"] += 1
                continue
            if self.training:
                order = self._random(epoch, position).permutation(len(labels))
                labels = [labels[i] for i in order[: self.config.max_labels]]
            images.append(pixels)
            keys.append(raw.key)
            texts.append(labels)
            ids.append(self.tokenizer.encode_labels(labels))
        if self.training and not images:
            images.append(self._blank)
            ids.append([self.tokenizer.prompt_ids[-1:]])
        prompt = self.tokenizer.prompt
        if self.training:
            prompt = self.prompts[self._random(epoch, int(positions[0]), 1).integers(len(self.prompts))]
        layout = lay_out(
            ids,
            prompt=self.tokenizer.encode_prompt(prompt),
            delimiter=self.tokenizer.delimiter_id,
            num_image_tokens=self.num_image_tokens,
            objective=self.objective,
        )
        return Batch(
            torch.stack(images) if images else self._blank[None][:0], layout, keys, texts, len(positions), faults
        )

    @property
    def _blank(self) -> Tensor:
        if self.features is None:
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        meta = self.features.meta
        return torch.zeros(meta.tokens, meta.width, dtype=getattr(torch, meta.dtype))

    def _random(self, *which: int) -> np.random.Generator:
        """A sample's own random numbers: the same in whichever batch, on whichever rank it comes."""
        return np.random.default_rng([self.config.seed, *which])

    def pixels_of(self, raw: RawSample) -> Tensor:
        """A sample's image, uint8 [3, S, S], or where there are features its features [N, D_encoder].

        Raises:
            SampleFault: there are none.
            ImageError: the image cannot be decoded.
        """
        if self.features is None:
            return to_pixels(load_image(raw.image, near=self.image_size), self.image_size)
        try:
            features = self.features.read(raw.image)
        except KeyError:
            raise SampleFault("no features", raw.key, raw.shard) from None
        if features is None:
            raise SampleFault("bad image", raw.key, raw.shard)
        return features

    def labels_of(self, raw: RawSample) -> list[str]:
        """Of a sample's labels those that have tokens.

        Raises:
            SampleFault: none has.
        """
        labels = labels_of(raw, self.nouns)
        if self.training and raw.labels is not None and self.config.given_labels == "first":
            labels = labels[:1]
        labels = [label for label, ids in zip(labels, self.tokenizer.encode_labels(labels), strict=True) if ids]
        if not labels:
            raise SampleFault("no labels", raw.key, raw.shard)
        return labels


class Loader(DataLoader):
    """A DataLoader over an :class:`EpochPlan` that says where it is, and continues there.

    ``waited`` is the time in seconds that its user has spent waiting for batches.
    """

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
        self._position = (0, 0)  # epoch, and the samples of it that were handed out on all ranks together
        self._resume: tuple[int, int] | None = None
        self.waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing starts before the first batch is asked for, when epoch and state are known.
        plan: EpochPlan = self.sampler
        plan.start = self._resume[1] if self._resume and self._resume[0] == plan.epoch else 0
        self._resume = None
        for done, batch in enumerate(self._timed(super().__iter__()), start=1):
            self._position = (plan.epoch, plan.start + done * plan.per_step)
            yield batch

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, int]:
        epoch, samples = self._position
        return {"epoch": epoch, "samples": samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the samples that were handed out, by any number of ranks and workers."""
        self._resume = self._position = (state["epoch"], state["samples"])

    def steps_done(self, state: dict[str, int]) -> int:
        """How far ``state`` is in its epoch, in steps of this number of ranks."""
        return self.sampler.steps - self.sampler.steps_after(state["samples"])


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
        sets: dict[str, OpenedSet] | None = None,  # opened already, by name
    ):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.objective, self.prompts = Objective(objective), list(prompts) or [tokenizer.prompt]
        self.sets = dict(sets or {})
        self._train_loader: Loader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def shard_faults(self) -> Counter:
        """Damaged shards met while indexing, by kind."""
        return sum((opened.shards.faults for opened in self.sets.values()), Counter())

    @property
    def val_names(self) -> list[str]:
        return list(self.config.val)

    def open(self, name: str, spec: Any) -> OpenedSet:
        """The indexed shards of ``spec``, indexed once a process."""
        if name not in self.sets:
            self.sets[name] = open_set(name, spec, self.config)
        return self.sets[name]

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

    def steps_done(self, state: dict[str, int]) -> int:
        """How far the training loader's ``state`` is in its epoch, in steps of this number of ranks."""
        return (self._train_loader or self.train_dataloader()).steps_done(state)

    def val_dataloader(self) -> list[Loader]:
        return [self.loader(name, spec, training=False) for name, spec in self.config.val.items()]

    def loader(self, name: str, spec: Any, *, training: bool) -> Loader:
        """Batches of one set of shards; shuffled and in whole steps for training, each sample once otherwise."""
        opened = self.open(name, spec)
        shards = opened.shards
        rank, world = data_ranks(self.trainer)
        plan = EpochPlan(
            shards.sizes,
            self.config.batch_size if training else self.config.val_batch_size,
            shuffle=training,
            parts=opened.parts,
            seed=self.config.seed,
            window=self.config.window,
            rank=rank,
            world=world,
            samples=self.config.samples if training else None,
            fraction=self.config.fraction if training else None,
            subset_seed=self.config.subset_seed,
        )
        if shards.cache is not None:
            plan.prefetch = shards.prefetch
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
