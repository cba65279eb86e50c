"""Tracking: a run in W&B, pictures with their predictions, and run records read back from a W&B project."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from nxtp.errors import UserError
from nxtp.labels import normalise
from nxtp.record import FILE, read_record, write_json
from nxtp.show import GridItem, save_grid

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


class TrackRecord(L.Callback):
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


def has_key() -> bool:
    """Whether a W&B key is at hand: in the environment, W&B's settings or .netrc. It is not asked for, nor checked."""
    import wandb

    if os.environ.get("WANDB_MODE") == "offline":  # the client would only say that it cannot tell
        return False
    return wandb.login(prompt=False, verify=False)


def wandb_records(project: str) -> list[dict[str, Any]]:
    """The run records, run.json, of a W&B project's runs, oldest first. A run without a readable one is told, left out.

    Args:
        project: "entity/project", or "project" of the key's own entity.

    Raises:
        UserError: no key at hand, or W&B does not answer for this project.
    """
    import wandb

    if not has_key():
        raise UserError(f"Reading W&B project '{project}' needs a key: `wandb login`, or set WANDB_API_KEY.")
    records = []
    try:
        for run in wandb.Api().runs(project):
            record = _uploaded(run)
            if record is None:
                log.warning("%s: run '%s' (%s) has no %s: left out.", project, run.name, run.id, FILE)
            else:
                records.append(record)
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"W&B project '{project}' cannot be read: {error}") from error
    return records


def _uploaded(run: Any) -> dict[str, Any] | None:
    if not any(file.name == FILE for file in run.files([FILE])):
        return None
    with tempfile.TemporaryDirectory() as directory:
        run.file(FILE).download(root=directory, replace=True).close()
        try:
            record = json.loads((Path(directory) / FILE).read_text())
        except json.JSONDecodeError:
            return None
    return record if isinstance(record, dict) else None
