"""Writes run.json while a run trains."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from nxtp.data.dataset import Batch
from nxtp.errors import one_line
from nxtp.runs.record import RunRecord
from nxtp.runs.tracking import log_record
from nxtp.train.module import RecognitionModule

log = logging.getLogger("nxtp")


class RunRecordWriter(L.Callback):
    """Writes config.yaml and run.json, and updates run.json after each validation and every ``interval`` seconds.
    At the start W&B gets the record.

    Not before all ranks have started, as each looks for a run in the directory, and a checkpoint is loaded: a run that
    cannot be continued keeps its files.

    ``written``  when run.json was last written; 0.0: not yet
    """

    interval = 30.0

    def __init__(self, run_dir: Path, cfg: DictConfig, record: RunRecord):
        self.run_dir, self.cfg, self.record = run_dir, cfg, record
        self.written = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        self._write(trainer)
        for logger in trainer.loggers:
            log_record(logger, asdict(self.record))
        log.info("%s", plan_of(trainer, validates=bool(module.val_names)))
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        in_epochs = epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if steps > 0 and epochs > 0 and math.isfinite(in_epochs) and in_epochs != steps:
            both = f"trainer.max_epochs={epochs} is {in_epochs:,} steps, trainer.max_steps={steps}"
            log.info("The run ends at step %s: %s; the first limit counts.", f"{min(steps, in_epochs):,}", both)

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, module: RecognitionModule, *_: Any) -> None:
        if time.monotonic() - self.written > self.interval:
            self._write(trainer)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            sets = tuple(f"{name}/" for name in module.val_names)
            seen = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(sets)}
            self.record.metrics.update(seen)
            self.record.validated = trainer.global_step
            self._write(trainer)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        self.record.ended_by = ended_by(trainer)
        log.info("Ended at step %s by %s.", f"{trainer.global_step:,}", self.record.ended_by)
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if not self.written:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.cfg, self.run_dir / "config.yaml", resolve=True)
        steps = trainer.global_step if self.record.ended_by else trainer.estimated_stepping_batches
        self.record.step, self.record.steps = trainer.global_step, int(steps) if math.isfinite(steps) else 0
        self.record.write(self.run_dir)
        self.written = time.monotonic()


class FrequentLabels(L.Callback):
    """Records the ``count`` most frequent labels of the images that rank 0 trained on: nxtp report's label prior."""

    def __init__(self, record: RunRecord, count: int):
        self.record, self.count = record, count
        self.images: Counter[str] = Counter()

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, module: RecognitionModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.images.update(chain.from_iterable(map(set, batch.labels)))

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        frequent = sorted(self.images, key=lambda label: (-self.images[label], label))[: self.count]
        self.record.data["train"] = self.record.data["train"] | {"frequent_labels": frequent}


def plan_of(trainer: L.Trainer, validates: bool) -> str:
    """What a run has before it, in a line, as far as it is known."""
    in_epoch, total = trainer.num_training_batches / trainer.accumulate_grad_batches, trainer.estimated_stepping_batches
    done = f"From step {trainer.global_step:,}: " if trainer.global_step else ""
    steps = f"{int(total):,} steps" if math.isfinite(total) else "steps until it is stopped"
    if math.isfinite(in_epoch):
        steps += f", {math.ceil(in_epoch):,} per epoch"
    epochs = trainer.check_val_every_n_epoch
    every = (trainer.val_check_batch or math.inf) / trainer.accumulate_grad_batches
    if validates and trainer.enable_validation:
        if math.isfinite(every) and (every < in_epoch or epochs is None):
            steps += f", validation every {math.ceil(every):,}"
        elif epochs is not None:
            steps += f", validation every {f'{epochs} epochs' if epochs > 1 else 'epoch'}"
    return f"{done}{steps}"


def ended_by(trainer: L.Trainer) -> str:
    """The limit that has ended the training."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps}"
    for callback in trainer.callbacks if trainer.should_stop else ():
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            reason = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
            return f"early stopping: {one_line(reason).rstrip('.')}"
        if isinstance(callback, Timer) and (callback.time_remaining() or 0) <= 0:  # negative, if it is over
            return "trainer.max_time"
    return "a callback" if trainer.should_stop else f"trainer.max_epochs={trainer.max_epochs}"
