"""Tracking: a run in W&B, pictures with their predictions, and run records read back from a W&B project."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from nxtp.errors import UserError
from nxtp.runs.atomic import write_json
from nxtp.runs.record import FILE, read_record

log = logging.getLogger("nxtp")
RUN_FILE = "wandb-run.json"  # beside run.json: W&B's id of the run, and its next row


class Wandb(WandbLogger):
    """Lightning's W&B logger of the run in ``save_dir``; its id is kept there: a continuation is the same run.

    Args:
        save_dir: the run directory.
        model_artifact: at the end log the model directory as an artifact, offline too.
        options: of WandbLogger and of ``wandb.init``.

    Raises:
        UserError: ``log_model`` of an offline run.
    """

    def __init__(self, *, save_dir: str | Path, offline: bool = False, model_artifact: bool = False, **options: Any):
        if offline and options.get("log_model"):
            raise UserError(
                "logger.wandb.log_model uploads checkpoints while training, and this run is offline: "
                "logger.wandb.model_artifact=true keeps the model directory for `wandb sync`."
            )
        self.model_artifact = model_artifact
        self._kept = Path(save_dir) / RUN_FILE
        known = json.loads(self._kept.read_text()) if self._kept.exists() else {}
        self._next_row = known.get("next_row", 0)
        if offline:
            options["mode"] = "offline"  # Lightning sets a variable that the client has read by then
        options["id"] = options.get("id") or known.get("id") or secrets.token_hex(4)
        super().__init__(save_dir=save_dir, offline=offline, **options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        begins = self._experiment is None
        run = super().experiment
        if begins:
            self._keep(run)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment
        if run.step < self._next_row:  # offline the client counts anew, and W&B wants a run's rows in rising order
            run.log({}, step=self._next_row, commit=False)
        super().log_metrics(metrics, step)
        self._keep(run)

    def _keep(self, run: Any) -> None:
        self._next_row = max(self._next_row, run.step)
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._kept, {"id": run.id, "next_row": self._next_row})


class WandbMetadata(L.Callback):
    """Gives W&B what the run record knows at the start: the resolved configuration, overrides and code commit."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        record = read_record(self.run_dir)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and record is not None:
                about = {key: record[key] for key in ("code", "overrides", "versions", "data")}
                logger.log_hyperparams({**record["config"], "record": about})


def end_tracking(loggers: list[Logger], run_dir: Path) -> None:
    """End W&B's part of a run as its record says: run.json among its files, metrics and status in its summary."""
    record = read_record(run_dir)
    for logger in loggers:
        if not isinstance(logger, WandbLogger) or logger._experiment is None or record is None:
            continue  # without an experiment nothing was logged: do not begin a run at its end
        run = logger.experiment
        shutil.copy(run_dir / FILE, run.dir)  # a link would break where the directory is moved before `wandb sync`
        run.save(str(Path(run.dir) / FILE), base_path=run.dir, policy="now")
        run.summary.update({**record["metrics"], "status": record["status"], "code": record["code"]})
        if getattr(logger, "model_artifact", False) and record["status"] == "finished":
            _log_model(run, run_dir / "model", record)
        if record["status"] == "interrupted":
            run.mark_preempting()
        run.finish(exit_code=int(record["status"] != "finished"))


def _log_model(run: Any, directory: Path, record: dict[str, Any]) -> None:
    import wandb

    about = {key: record[key] for key in ("metrics", "code", "step")}
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=about)
    artifact.add_dir(str(directory), policy="immutable")  # read from there by `wandb sync`, not copied to a cache
    run.log_artifact(artifact)
