"""The run record in W&B."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from nxtp.runs.record import read_record
from nxtp.runs.tracking import log_record


class WandbMetadata(L.Callback):
    """Logs the run record to W&B at the start: the resolved configuration, overrides, versions, data and commit."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        record = read_record(self.run_dir)
        for logger in trainer.loggers:
            if record is not None:
                log_record(logger, record)
