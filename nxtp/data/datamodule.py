"""Shards → batches: samples decoded and laid out or skipped and counted, the loader that resumes, the DataModule."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from nxtp.data.config import DataConfig
from nxtp.data.dataset import Batch, BatchDataset
from nxtp.data.mixture import OpenedSet, open_set
from nxtp.data.sampler import ElasticBatchSampler
from nxtp.model.layout import Objective
from nxtp.model.tokenizer import LabelTokenizer


class ResumableDataLoader(DataLoader):
    """A DataLoader over an :class:`ElasticBatchSampler` that says where it is, and continues there.

    ``waited`` is the time in seconds that its user has spent waiting for batches.
    """

    def __init__(self, dataset: BatchDataset, plan: ElasticBatchSampler, num_workers: int, pin_memory: bool):
        super().__init__(
            dataset,
            sampler=plan,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            persistent_workers=False,
            pin_memory=pin_memory,
            worker_init_fn=_quiet_tokenizers,
        )
        self._position = (0, 0)  # epoch, and the samples of it that were handed out on all ranks together
        self._resume: tuple[int, int] | None = None
        self.waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing starts before the first batch is asked for, when epoch and state are known.
        plan: ElasticBatchSampler = self.sampler
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


class WebDatasetDataModule(L.LightningDataModule):
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
        self._train_loader: ResumableDataLoader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def shard_faults(self) -> Counter:
        """Damaged shards met while indexing, by kind."""
        return sum((opened.shards.skipped for opened in self.sets.values()), Counter())

    @property
    def val_names(self) -> list[str]:
        return list(self.config.val)

    def open(self, name: str, spec: Any) -> OpenedSet:
        """The indexed shards of ``spec``, indexed once a process."""
        if name not in self.sets:
            self.sets[name] = open_set(name, spec, self.config)
        return self.sets[name]

    def train_dataloader(self) -> ResumableDataLoader:
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

    def val_dataloader(self) -> list[ResumableDataLoader]:
        return [self.loader(name, spec, training=False) for name, spec in self.config.val.items()]

    def loader(self, name: str, spec: Any, *, training: bool) -> ResumableDataLoader:
        """Batches of one set of shards; shuffled and in whole steps for training, each sample once otherwise."""
        opened = self.open(name, spec)
        shards = opened.shards
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        plan = ElasticBatchSampler(
            shards.sizes,
            self.config.batch_size if training else self.config.val_batch_size,
            shuffle=training,
            parts=opened.parts,
            seed=self.config.seed,
            shuffle_window=self.config.shuffle_window,
            rank=rank,
            world=world,
            max_samples=self.config.max_samples if training else None,
            fraction=self.config.fraction if training else None,
            subset_seed=self.config.subset_seed,
        )
        if shards.cache is not None:
            plan.prefetch = shards.prefetch
        batches = BatchDataset(
            shards,
            self.tokenizer,
            self.config,
            image_size=self.image_size,
            num_image_tokens=self.num_image_tokens,
            objective=self.objective,
            prompts=self.prompts,
            training=training,
        )
        return ResumableDataLoader(batches, plan, self.config.num_workers, pin_memory=torch.cuda.is_available())
