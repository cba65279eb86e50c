"""Example predictions, as images in the loggers."""

from __future__ import annotations

import io
import logging

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from nxtp.data.labels.cleaning import normalise
from nxtp.errors import UserError
from nxtp.inference.figures import GridItem, save_grid

log = logging.getLogger("nxtp")


class ShowPredictions(L.Callback):
    """The first images of the first validation set with their predicted and true labels, in W&B and TensorBoard.

    The same images each time: at a validation at least ``every_n_steps`` after the last shown, and at the final one.
    Costs nothing where neither logger is used: the predictions are those that the validation makes.

    Args:
        every_n_steps: optimiser steps.
        images: at most so many, of what the first rank sees.
    """

    def __init__(self, every_n_steps: int = 1000, images: int = 16):
        if every_n_steps < 0 or images < 1:
            raise UserError("callbacks.predictions: every_n_steps is at least 0 and images at least 1, please.")
        self.every_n_steps, self.images = every_n_steps, images
        self._last: int | None = None
        self._items: list[tuple[str, GridItem]] = []

    def _due(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return False
        if not any(isinstance(logger, (WandbLogger, TensorBoardLogger)) for logger in trainer.loggers):
            return False
        final = trainer.state.fn == TrainerFn.VALIDATING
        return final or self._last is None or trainer.global_step - self._last >= self.every_n_steps

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._items = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        room = self.images - len(self._items)
        if dataloader_idx != 0 or room <= 0 or not outputs or not self._due(trainer):
            return
        pixels = batch.images[:room].permute(0, 2, 3, 1).cpu().numpy()
        for key, image, truth, labels in zip(batch.keys, pixels, batch.labels, outputs["predictions"], strict=False):
            self._items.append((key, GridItem(Image.fromarray(image), truth, labels)))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._items:
            return
        name, step = f"{module.val_names[0]}/predictions", trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_table(logger, name, self._items, step)
            elif isinstance(logger, TensorBoardLogger):
                grid = _grid([item for _, item in self._items], module.validation.top_k)
                logger.experiment.add_image(name, grid, step, dataformats="HWC")
        self._last, self._items = step, []


def _log_table(logger: WandbLogger, name: str, items: list[tuple[str, GridItem]], step: int) -> None:
    import wandb

    rows = []
    for key, item in items:
        truth = {normalise(label) for label in item.truth}
        hits = len(truth & {normalise(label) for label, _ in item.predictions})
        labels = "\n".join(f"{probability:.4f} {label}" for label, probability in item.predictions)
        rows.append([key, wandb.Image(item.image), ", ".join(item.truth), labels, hits, len(truth)])
    columns = ["key", "image", "truth", "labels", "hits", "true labels"]
    logger.log_table(name, columns=columns, data=rows, step=step)


def _grid(items: list[GridItem], top: int) -> np.ndarray:
    """uint8 [height, width, 3]."""
    png = io.BytesIO()
    save_grid(png, items, top=top)
    return np.asarray(Image.open(png).convert("RGB"))
