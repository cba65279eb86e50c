"""The data loader that resumes within an epoch, and the Lightning data module of named sets of shards."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from nxtp.data.augmentation import Augmentation
from nxtp.data.config import DataConfig
from nxtp.data.dataset import Batch, BatchDataset
from nxtp.data.mixture import OpenedSet, open_set
from nxtp.data.sampler import ElasticBatchSampler
from nxtp.data.transforms import ImageTransform
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError
from nxtp.model.layout import MATCHED, Objective
from nxtp.model.tokenizer import LabelTokenizer
from nxtp.runs.processes import deaf_children, end_with_parent

log = logging.getLogger("nxtp")


class ResumableDataLoader(DataLoader):
    """A DataLoader over an :class:`ElasticBatchSampler` that saves its position and continues there.

    ``waited`` is the time in seconds spent waiting for batches.
    """

    sampler: ElasticBatchSampler

    def __init__(self, dataset: BatchDataset, sampler: ElasticBatchSampler, num_workers: int, pin_memory: bool):
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            persistent_workers=False,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
        )
        self._position = (0, 0)  # epoch, and how many samples of it all ranks together have returned
        self._resume: tuple[int, int] | None = None
        self.waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing starts before the first batch is requested, when epoch and state are known.
        sampler = self.sampler
        sampler.start = self._resume[1] if self._resume and self._resume[0] == sampler.epoch else 0
        self._resume = None
        with deaf_children():
            batches = super().__iter__()
        for done in itertools.count(1):
            begin = time.perf_counter()
            failed = ""
            try:
                batch = next(batches, None)
            except UserError as error:  # of a worker: after its traceback
                failed = str(error).strip().rpartition("UserError: ")[2]
                error.__traceback__ = None  # which keeps the iterator
            if failed:
                del batches  # ends its workers at once; collected later, it waits 5 s for each of them
                raise UserError(failed)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            if (cache := self.dataset.shards.cache) is not None:
                batch.remote.update(cache.take_usage())  # of the prefetch, in this process
            self._position = (sampler.epoch, sampler.start + done * sampler.per_step)
            yield batch

    def state_dict(self) -> dict[str, int]:
        epoch, samples = self._position
        return {"epoch": epoch, "samples": samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the samples that were returned, by any number of ranks and workers."""
        self._resume = self._position = (state["epoch"], state["samples"])


def _start_worker(worker: int) -> None:
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class WebDatasetDataModule(L.LightningDataModule):
    """Caption shards for training and any number of named validation sets.

    Rank and world size are taken from the trainer or given, never from the environment.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: LabelTokenizer,
        *,
        transform: ImageTransform,
        num_image_tokens: int,
        objective: Objective = MATCHED,
        sets: dict[str, OpenedSet] | None = None,  # those already opened
        ranks: Ranks | None = None,  # which open the same sets
    ):
        super().__init__()
        self.config = config
        self.sets, self.ranks = dict(sets or {}), ranks
        self._batches = partial(
            BatchDataset,
            tokenizer=tokenizer,
            config=config,
            transform=transform,
            num_image_tokens=num_image_tokens,
            objective=objective,
            augmentation=Augmentation(config.transforms) if config.transforms else None,
        )
        self._train_loader: ResumableDataLoader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def shard_faults(self) -> Counter:
        """Damage found while indexing shards, by kind."""
        return sum((opened.shards.skipped for opened in self.sets.values()), Counter())

    @property
    def val_names(self) -> list[str]:
        return list(self.config.val)

    def open(self, name: str, spec: Any, *, whole: bool = False) -> OpenedSet:
        """The indexed shards of ``spec``, opened once per process.

        Args:
            whole: ignore data.where and data.caption_key, as a validation set does while training.
        """
        if name not in self.sets:
            config = replace(self.config, where=None, caption_key=None) if whole else self.config
            self.sets[name] = open_set(name, spec, config, self.ranks)
        return self.sets[name]

    def train_dataloader(self) -> ResumableDataLoader:
        self._train_loader = self.loader("train", self.config.train, training=True)
        if self._resume is not None:
            self._train_loader.load_state_dict(self._resume)
        return self._train_loader

    # Lightning restores a loader only if it is created after the checkpoint is read, but the learning-rate schedule
    # needs it before, to count the steps. So the position is saved here too.

    def state_dict(self) -> dict[str, Any]:
        position = {"train": self._train_loader.state_dict()} if self._train_loader is not None else {}
        return position | {"sets": {name: opened.plan for name, opened in self.sets.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: a set is another one than at the checkpoint, and data.allow_changed_shards is not set.
        """
        for name, before in state.get("sets", {}).items():
            if name in self.sets and (now := self.sets[name].plan) != before:
                text = f"data.{name} was {before} when the checkpoint was written, and is {now}"
                if not self.config.allow_changed_shards:
                    advice = "Restore the set, or go on with another epoch: data.allow_changed_shards=true."
                    raise UserError(f"{text}. {advice}")
                log.warning("%s.", text)
        self._resume = state.get("train")
        if self._train_loader is not None and self._resume is not None:
            self._train_loader.load_state_dict(self._resume)

    def steps_of_epoch(self, state: dict[str, int]) -> tuple[int, int]:
        """Steps of the training loader's epoch done and left at ``state``, for the present number of ranks."""
        sampler = (self._train_loader or self.train_dataloader()).sampler
        left = sampler.steps_after(state["samples"])
        return sampler.steps - left, left

    def val_dataloader(self) -> list[ResumableDataLoader]:
        return [self.loader(name, spec, training=False, whole=True) for name, spec in self.config.val.items()]

    def loader(
        self, name: str, spec: Any, *, training: bool, whole: bool = False, share: tuple[int, int] = (0, 1)
    ) -> ResumableDataLoader:
        """Batches of one set: shuffled and in whole steps for training, each sample once otherwise.

        Args:
            whole: ignore data.max_samples, data.fraction, data.where and data.caption_key, as a validation set does
                while training.
            share: (rank, number of ranks), without a trainer.
        """
        opened = self.open(name, spec, whole=whole)
        shards = opened.shards
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else share
        config = self.config
        sampler = ElasticBatchSampler(
            shards.sizes,
            config.batch_size if training else config.val_batch_size,
            shuffle=training,
            sources=opened.sources,
            seed=config.seed,
            shuffle_window=config.shuffle_window,
            rank=rank,
            world=world,
            max_samples=None if whole else config.max_samples,
            fraction=None if whole else config.fraction,
            subset_seed=config.subset_seed,
            nodes=self.trainer.num_nodes if training and self.trainer and config.nodes == "split" else 1,
        )
        if shards.cache is not None:
            sampler.prefetch = shards.prefetch
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        batches = self._batches(shards, training=training, multiple=8 if on_gpu else 1)
        return ResumableDataLoader(batches, sampler, config.num_workers, pin_memory=on_gpu)
