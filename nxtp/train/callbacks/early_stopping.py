"""Stops a run whose monitored metric no longer improves."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch import callbacks


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's, after which a resumed run stays stopped: Lightning stores the reason and trains on.

    Args:
        monitor: None is the metric that selects the best weights.
        options: of Lightning's callback.
    """

    def __init__(self, monitor: str | None = None, **options: Any):
        super().__init__(monitor, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the run has seen so far, with the patience of this configuration."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.stopping_reason_message is not None
