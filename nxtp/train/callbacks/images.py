"""Validation images with their predictions, in W&B and TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Sequence

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from nxtp.data.labels.cleaning import normalise
from nxtp.errors import UserError
from nxtp.sampling.ranking import Labels
from nxtp.train.module import RecognitionModule


class PredictionImages(L.Callback):
    """Logs the first images of the first validation set with their predicted and true labels.

    The images are the same each time: at the first validation, then at least ``every_n_steps`` after the last time, and
    at the final validation. The predictions are those of the validation, so that they cost nothing.

    Args:
        every_n_steps: optimizer steps.
        images: the largest number of images, of those that the first rank validates.
    """

    def __init__(self, every_n_steps: int = 1000, images: int = 16):
        if every_n_steps < 0 or images < 1:
            raise UserError(
                f"callbacks.predictions: every_n_steps must be ≥ 0 and images ≥ 1, got {every_n_steps} and {images}."
            )
        self.every_n_steps, self.images = every_n_steps, images
        self._last: int | None = None
        self._rows: list[tuple[str, Image.Image, Sequence[str], Labels]] = []  # key, image, truth, predictions

    def _is_due(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return False
        if not any(isinstance(logger, (WandbLogger, TensorBoardLogger)) for logger in trainer.loggers):
            return False
        is_final = trainer.state.fn == TrainerFn.VALIDATING
        return is_final or self._last is None or trainer.global_step - self._last >= self.every_n_steps

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._rows = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        room = self.images - len(self._rows)
        if dataloader_idx != 0 or room <= 0 or not outputs or not self._is_due(trainer):
            return
        images = [Image.fromarray(pixels) for pixels in batch.images[:room].permute(0, 2, 3, 1).cpu().numpy()]
        self._rows += zip(batch.keys, images, batch.labels, outputs["predictions"], strict=False)

    def on_validation_end(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        if not self._rows:
            return
        name, step = f"{module.val_names[0]}/predictions", trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log_table(logger, name, step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, self._grid(module.validation.top_k), step, dataformats="HWC")
        self._last, self._rows = step, []

    def _log_table(self, logger: WandbLogger, name: str, step: int) -> None:
        import wandb

        rows = []
        for key, image, labels, predictions in self._rows:
            truth = {normalise(label) for label in labels}
            hits = len(truth & {normalise(label) for label, _ in predictions})
            text = "\n".join(f"{probability:.4f} {label}" for label, probability in predictions)
            rows.append([key, wandb.Image(image), ", ".join(labels), text, hits, len(truth)])
        columns = ["key", "image", "truth", "labels", "hits", "true labels"]
        logger.log_table(name, columns=columns, data=rows, step=step)

    def _grid(self, top_k: int) -> np.ndarray:
        """One picture of all images with their labels, uint8 [height, width, 3]."""
        from nxtp.inference.figures import GridItem, save_grid  # imports matplotlib

        png = io.BytesIO()
        save_grid(png, [GridItem(*row[1:]) for row in self._rows], top=top_k)
        return np.asarray(Image.open(png).convert("RGB"))
