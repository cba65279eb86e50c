"""Averaged weights (Lightning's WeightAveraging and EMAWeightAveraging), which it swaps in for each validation."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging


def swap_back(trainer: L.Trainer, module: L.LightningModule) -> None:
    """End of a validation that stops early: otherwise a checkpoint would store the average as the weights."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging):
            callback.on_validation_epoch_end(trainer, module)


def defer_average(callback: WeightAveraging) -> None:
    """Keep Lightning from replacing the weights by their average when training ends: last.ckpt has to have both."""
    callback.on_train_end = lambda *_: None


def keep_average(trainer: L.Trainer, module: L.LightningModule) -> None:
    """End of the training: from now on the model has the averaged weights, of loaded checkpoints too."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging):
            type(callback).on_train_end(callback, trainer, module)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]
