"""What ends a run: its record and its log say it; the progress bar has the steps that are left, in one line."""

import io
import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf
from rich.console import Console

from nxtp.runs.record import RunRecord
from nxtp.train.callbacks.run_record import RunRecordWriter
from nxtp.train.callbacks.throughput import Progress, Throughput


class Line(L.LightningModule):
    """A weight that grows; its loss too."""

    val_names = ()

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        self.log("train/loss", self.weight.detach(), prog_bar=True)
        self.log("val/recall@10", self.weight.detach(), prog_bar=True)
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(6))


def fit(tmp_path, *callbacks, **trainer) -> None:
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **options, **trainer)
    trainer.fit(Line())


@pytest.mark.parametrize(
    ("limits", "planned", "step", "limit", "announced"),
    [
        ({"max_epochs": 1}, 6, 6, "trainer.max_epochs=1", None),
        ({"max_epochs": 2, "max_steps": 8}, 8, 8, "trainer.max_steps=8", "trainer.max_epochs=2 is 12 steps"),
        ({"max_epochs": 1, "max_steps": 9}, 6, 6, "trainer.max_epochs=1", "trainer.max_epochs=1 is 6 steps"),
        ({"max_epochs": 5, "early": True}, 30, 12, "early stopping: Monitored metric train/loss did not improve", None),
        ({"max_epochs": 3, "max_time": {"microseconds": 1}}, 18, 1, "trainer.max_time", None),
    ],
)
def test_a_run_says_what_is_before_it_and_what_ended_it(tmp_path, caplog, limits, planned, step, limit, announced):
    caplog.set_level(logging.INFO)
    record = RunRecord("line", {}, [], 0)
    stops = [EarlyStopping("train/loss", patience=1, check_on_train_epoch_end=True)] if limits.pop("early", 0) else []
    fit(tmp_path, RunRecordWriter(tmp_path, OmegaConf.create(), record), *stops, enable_progress_bar=False, **limits)
    assert (record.step, record.steps) == (step, step)
    assert record.ended_by.startswith(limit)
    lines = [entry.getMessage() for entry in caplog.records if entry.name == "nxtp"]
    assert lines[-1].startswith(f"Ended at step {step} by {limit}")
    assert lines[0] == f"{planned} steps, 6 per epoch"
    assert len(lines) == 2 + bool(announced)
    assert (
        announced is None
        or f"The run ends at step {step}: {announced}, trainer.max_steps={limits['max_steps']}" in lines[1]
    )


def test_the_progress_bar_has_the_steps_that_are_left_in_one_line(tmp_path, monkeypatch):
    shown = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            console = Console(width=80, file=io.StringIO())
            console.print(trainer.progress_bar_callback.progress.get_renderable())
            shown.append(console.file.getvalue().splitlines())

    speed = Throughput(flops=object())
    speed.line = "312 images/s · 9,120 tokens/s · data wait 0.1% · padding 2.3% · 1.23 GB"
    monkeypatch.setattr(Throughput, "on_train_batch_end", lambda *_: None)
    fit(tmp_path, Progress(), speed, Look(), max_epochs=3, max_steps=8, log_every_n_steps=1)
    assert {len(lines) for lines in shown} == {1}
    assert "6/6" in shown[5][0]
    assert "2/2" in shown[-1][0]
    assert all("train/loss 1." in line and len(line) <= 80 for (line,) in shown)
