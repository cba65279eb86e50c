"""The predictions of a validation as predictions.jsonl."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import lightning as L

from nxtp.distributed.ranks import gathered
from nxtp.eval.predictions import prediction_lines
from nxtp.runs.atomic import atomic_file
from nxtp.train.module import RecognitionModule


class WritePredictions(L.Callback):
    """Writes each image's labels to ``path``, set after set, in the order of the set on any number of ranks."""

    def __init__(self, path: Path):
        self.path = path
        self._batches: dict[int, list[list[str]]] = {}  # set → lines of each batch of this rank

    def on_validation_batch_end(
        self, trainer, module: RecognitionModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        lines: Iterable[str] = []  # of a batch without images too: all ranks have as many batches
        if outputs:
            lines = prediction_lines(module.val_names[dataloader_idx], batch.keys, batch.labels, outputs["predictions"])
        self._batches.setdefault(dataloader_idx, []).append(list(lines))

    def on_validation_end(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        every = gathered(self._batches)
        if trainer.is_global_zero:
            with atomic_file(self.path) as file:
                for index in range(len(module.val_names)):
                    steps = zip_longest(*(batches.get(index, []) for batches in every), fillvalue=[])
                    file.writelines(line.encode() for step in steps for batch in step for line in batch)
