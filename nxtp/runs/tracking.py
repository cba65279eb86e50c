"""The loggers of a run or an evaluation; a W&B logger that resumes its run, with the run record in W&B."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from nxtp.config import instantiated
from nxtp.errors import UserError
from nxtp.runs.atomic import read_json, write_json
from nxtp.runs.record import FILE, read_record

RUN_FILE = "wandb-run.json"  # beside run.json: the run's id in W&B, and its next row


def configured_loggers(cfg: DictConfig) -> list[Logger]:
    """Those of the group ``logger``; none has been started."""
    nodes = (cfg.get("logger") or {}).items()
    return [instantiated(node, f"logger.{name}") for name, node in nodes if node is not None]


class Wandb(WandbLogger):
    """Lightning's W&B logger; stores the run's id in ``save_dir``, so that a resumed run is the same run in W&B.

    Args:
        save_dir: the run directory.
        model_artifact: log the model directory as an artifact at the end, offline too.
        options: of WandbLogger and of ``wandb.init``.

    Raises:
        UserError: ``log_model`` of an offline run.
    """

    def __init__(self, *, save_dir: str | Path, offline: bool = False, model_artifact: bool = False, **options: Any):
        if offline and options.get("log_model"):
            raise UserError(
                "logger.wandb.log_model uploads checkpoints while training, and this run is offline: use "
                "logger.wandb.model_artifact=true, which stores the model directory for `wandb sync`."
            )
        self.model_artifact = model_artifact
        self._file = Path(save_dir) / RUN_FILE
        known = read_json(self._file) or {}
        self._next_row = known.get("next_row", 0)
        if offline:
            options["mode"] = "offline"  # Lightning's `offline` sets a variable, too late for the client
        options["id"] = options.get("id") or known.get("id") or secrets.token_hex(4)
        super().__init__(save_dir=save_dir, **options)
        self._wandb_init.pop("anonymous", None)  # the client warns about it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        is_new = self._experiment is None
        run = super().experiment
        if is_new:
            self._store(run)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment
        if run.step < self._next_row:  # offline, the client counts from 0 again, and W&B needs rising row numbers
            run.log({}, step=self._next_row, commit=False)
        super().log_metrics(metrics, step)
        self._store(run)

    def _store(self, run: Any) -> None:
        self._next_row = max(self._next_row, run.step)
        write_json(self._file, {"id": run.id, "next_row": self._next_row})


def log_record(logger: Logger, record: dict[str, Any]) -> None:
    """Log a run record to W&B: the resolved configuration, overrides, versions, data and commit."""
    if isinstance(logger, WandbLogger):
        about = {key: record[key] for key in ("code", "overrides", "versions", "data")}
        logger.log_hyperparams({**record["config"], "record": about})


def log_evaluation(loggers: list[Logger], record: dict[str, Any]) -> None:
    """Log the metrics of a finished evaluation, as one row."""
    for logger in loggers:
        log_record(logger, record)
        logger.log_metrics(record["metrics"], step=0)
        logger.finalize("success")


def end_tracking(loggers: list[Logger], run_dir: Path) -> None:
    """Finish the run in W&B: run.json among its files, the record's metrics and status in its summary."""
    record = read_record(run_dir)
    for logger in loggers:
        if not isinstance(logger, WandbLogger) or logger._experiment is None or record is None:
            continue  # without an experiment nothing was logged: do not start a run at its end
        run = logger.experiment
        shutil.copy(run_dir / FILE, run.dir)  # a link would break if the directory is moved before `wandb sync`
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
    artifact.add_dir(str(directory), policy="immutable")  # `wandb sync` reads it from there: no copy in a cache
    run.log_artifact(artifact)
