"""The predictions of a validation as predictions.jsonl."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from nxtp.distributed.ranks import gathered
from nxtp.eval.predictions import prediction_lines
from nxtp.runs.atomic import atomic_file
from nxtp.train.module import RecognitionModule


class WritePredictions(L.Callback):
    """Writes each image's labels to ``path``: set after set, and of each set rank after rank."""

    def __init__(self, path: Path):
        self.path = path
        self._lines: dict[int, list[str]] = {}

    def on_validation_batch_end(
        self, trainer, module: RecognitionModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if outputs:
            lines = prediction_lines(module.val_names[dataloader_idx], batch.keys, batch.labels, outputs["predictions"])
            self._lines.setdefault(dataloader_idx, []).extend(lines)

    def on_validation_end(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        every = gathered(self._lines)
        if trainer.is_global_zero:
            with atomic_file(self.path) as file:
                for index in range(len(module.val_names)):
                    file.writelines(line.encode() for lines in every for line in lines.get(index, []))
