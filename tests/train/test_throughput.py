"""The throughput of a run: with a clock of our own, in a real run, and over two processes."""

import csv
import logging
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import PERF, TINY_OVERRIDES, run_nxtp, tiny_config, write_shards
from lightning.pytorch.loggers import CSVLogger

from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.dataset import Batch
from nxtp.data.transforms import ImageTransform
from nxtp.model.flops import ModelFlops
from nxtp.model.layout import lay_out
from nxtp.model.meta import meta_model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.train.callbacks import throughput
from nxtp.train.callbacks.throughput import Progress, Throughput, speed_line
from nxtp.train.command import filter_lightning_messages
from nxtp.train.module import RecognitionModule
from nxtp.train.optim import OptimConfig


def batch_of(labels: list[list[tuple[int, ...]]]) -> Batch:
    layout = lay_out(labels, prompt=[1, 2], delimiter=4, num_image_tokens=16)
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    return Batch(
        images, layout, ["k"] * len(labels), ["s"] * len(labels), [["a"]] * len(labels), len(labels), Counter()
    )


BATCH = batch_of([[(5, 6)] * 3, [(7,)]])  # 28 and 21 real tokens: 49 of 56 positions


class Run:
    """A trainer driven by hand: every batch is waited for ``wait`` seconds and computed in ``work`` seconds."""

    def __init__(self, monkeypatch, *, others=(), accumulate=1, every=2, device="cpu"):
        self.now, self.accumulate, self.batches = 100.0, accumulate, 0
        self.logged, self.synchronised = [], []
        monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.synchronised.append(self.batches))
        monkeypatch.setattr(throughput, "peak_memory_bytes", lambda device: 3e9)
        self.trainer = SimpleNamespace(
            global_step=0,
            log_every_n_steps=every,
            train_dataloader=SimpleNamespace(waited=0.0),
            strategy=SimpleNamespace(
                all_gather=lambda mine: torch.stack([mine, *(mine * o for o in others)]),
                checkpoint_io=SimpleNamespace(pause_s=0.0),
            ),
            world_size=1 + len(others),
            is_global_zero=True,
            precision="bf16-mixed",
        )
        self.module = SimpleNamespace(device=torch.device(device), log_dict=self.logged.append)
        self.callback = Throughput(ModelFlops(meta_model(tiny_config(), None)))
        self.hook("on_train_epoch_start")

    def hook(self, name, *arguments):
        getattr(self.callback, name)(self.trainer, self.module, *arguments)

    def step(self, batch=BATCH, wait=0.1, work=0.3):
        self.trainer.train_dataloader.waited += wait
        self.now += wait
        self.hook("on_train_batch_start", batch, self.batches)
        self.now += work
        self.batches += 1
        self.trainer.global_step = self.batches // self.accumulate
        self.hook("on_train_batch_end", None, batch, self.batches - 1)


def test_rates_are_over_the_time_between_logs(monkeypatch):
    run = Run(monkeypatch)
    for _ in range(4):
        run.step()
    first, second = run.logged
    assert first["perf/images_per_s"] == pytest.approx(4 / 0.7), "an epoch's first batch is not waited for"
    assert first["perf/data_wait"] == pytest.approx(0.1 / 0.7)
    assert second["perf/images_per_s"] == pytest.approx(4 / 0.8)
    assert second["perf/tokens_per_s"] == pytest.approx(98 / 0.8)
    assert second["perf/data_wait"] == pytest.approx(0.2 / 0.8)
    assert second["perf/padding"] == pytest.approx(1 - 49 / 56)
    assert second["perf/peak_memory_gb"] == pytest.approx(3)
    flops = run.callback.flops.step(2, 49 / 2, 9).total
    assert second["perf/tflops"] == pytest.approx(2 * flops / 0.8 / 1e12)
    assert "perf/mfu" not in second


def test_time_between_batches_without_waiting_for_data_counts_as_work(monkeypatch):
    run = Run(monkeypatch)
    run.step()
    run.now += 5  # a checkpoint
    run.step()
    assert run.logged[0]["perf/images_per_s"] == pytest.approx(4 / 5.7)
    assert run.logged[0]["perf/data_wait"] == pytest.approx(0.1 / 5.7)


def test_validation_and_a_new_epoch_are_pauses(monkeypatch):
    run = Run(monkeypatch)
    run.step()
    run.hook("on_validation_start")
    run.now += 1000
    run.hook("on_validation_end")
    run.step()
    assert run.logged[0]["perf/images_per_s"] == pytest.approx(4 / 0.7)
    run.now += 50
    run.hook("on_train_epoch_start")
    run.step(wait=30)  # the workers start
    run.step()
    assert run.logged[1]["perf/images_per_s"] == pytest.approx(4 / 0.7)
    assert run.logged[1]["perf/data_wait"] == pytest.approx(0.1 / 0.7)


def test_an_epoch_that_ends_between_logs_counts(monkeypatch):
    run = Run(monkeypatch)
    run.step()
    run.hook("on_train_epoch_end")
    run.now += 50
    run.hook("on_train_epoch_start")
    run.step(wait=30)  # the workers start
    assert run.logged[0]["perf/images_per_s"] == pytest.approx(4 / 0.6), "both batches' work"
    assert run.logged[0]["perf/data_wait"] == pytest.approx(0)


def test_accumulated_batches_are_one_step(monkeypatch):
    run = Run(monkeypatch, accumulate=3)
    for number in range(1, 13):
        run.step()
        assert len(run.logged) == number // 6
    assert run.logged[1]["perf/images_per_s"] == pytest.approx(12 / 2.4)


def test_the_pause_of_a_save_is_logged_once(monkeypatch):
    run = Run(monkeypatch)
    for number in range(6):
        run.trainer.strategy.checkpoint_io.pause_s += 1.5 * (number == 2)
        run.step()
    assert [values.get("perf/checkpoint_s") for values in run.logged] == [None, 1.5, None]


def test_ranks_add_up_and_the_worst_is_logged(monkeypatch):
    run = Run(monkeypatch, others=(3.0,))  # three times the images, the time, the wait and the memory
    run.step()
    run.step()
    (values,) = run.logged
    assert values["perf/images_per_s"] == pytest.approx((4 + 12) / 2.1)
    assert values["perf/data_wait"] == pytest.approx(0.3 / 2.1)
    assert values["perf/peak_memory_gb"] == pytest.approx(9)
    alone = 2 * run.callback.flops.step(2, 49 / 2, 9).total / 1e12
    assert values["perf/tflops"] == pytest.approx((alone + 3 * alone) / 2 / 2.1), "of one device"


def test_samples_that_batches_lack_are_logged_if_there_are_any(monkeypatch):
    run = Run(monkeypatch, others=(3.0,))
    run.step()
    run.step()
    assert "perf/unused" not in run.logged[0]
    run.step(replace(BATCH, samples_read=6, skipped=Counter(filtered=4)))
    run.step()
    assert run.logged[1]["perf/unused"] == pytest.approx(0.5)
    assert "unused samples 50.0%" in run.callback.line


def test_remote_shards_are_logged_where_there_are_some(monkeypatch):
    run = Run(monkeypatch, others=(3.0,))
    run.step()
    run.step()
    assert not {"perf/cache_hits", "perf/download_mb_per_s"} & set(run.logged[0])
    run.step(replace(BATCH, remote=Counter(reads=2, hits=1, bytes=5_000_000)))
    run.step(replace(BATCH, remote=Counter(reads=2, hits=2)))
    values = run.logged[1]
    assert values["perf/cache_hits"] == pytest.approx(3 / 4)
    assert values["perf/download_mb_per_s"] == pytest.approx((5 + 15) / 2.4), "by all ranks"
    assert "cache hits 75.0% · 8.3 MB/s fetched" in run.callback.line
    run.step()
    run.step()
    assert "perf/cache_hits" not in run.logged[2]


def test_a_batch_without_a_usable_sample_counts_as_padding(monkeypatch):
    run = Run(monkeypatch, every=1)
    empty = batch_of([[(5,)]])
    empty.keys = []
    run.step()
    run.step(empty)
    assert run.logged[1]["perf/images_per_s"] == run.logged[1]["perf/tflops"] == 0
    assert run.logged[1]["perf/padding"] == 1


def test_a_gpu_is_synchronised_only_at_logs_and_before_validation(monkeypatch):
    run = Run(monkeypatch, every=4, device="cuda")
    on_cpu = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, device: on_cpu(values))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    for _ in range(6):
        run.step()
    run.hook("on_validation_start")
    assert run.synchronised == [4, 6]
    (values,) = run.logged
    assert values["perf/mfu"] == pytest.approx(values["perf/tflops"] / 989.4)
    assert "MFU" in run.callback.line
    run.trainer.precision = "64-true"
    run.hook("on_validation_end")
    run.step()
    run.step()
    assert "perf/mfu" not in run.logged[1], "unknown"


def test_the_line_shows_what_is_known():
    values = {"perf/images_per_s": 1234.5, "perf/tokens_per_s": 98765.4, "perf/data_wait": 0.0123, "perf/padding": 0.05}
    assert speed_line(values) == "1,234 images/s · 98,765 tokens/s · data wait 1.2% · padding 5.0%"
    assert speed_line(values | {"perf/mfu": 0.4567, "perf/peak_memory_gb": 61.24}).endswith("· MFU 45.7% · 61.24 GB")


def test_a_real_run_logs_what_its_batches_held(tmp_path):
    """Accumulated by two, logged every second step, validation in between."""
    shards = write_shards(tmp_path / "train", [40, 24])
    tokenizer = train_tokenizer(["rose", "lemon", "leaf", "ocean", "stone"], vocab_size=400)
    data = WebDatasetDataModule(
        DataConfig(train=str(shards), val={"val": str(shards)}, batch_size=4, num_workers=0),
        tokenizer,
        transform=ImageTransform(32),
        num_image_tokens=16,
    )
    module = RecognitionModule(tiny_config(), tokenizer, OptimConfig(), val_names=["val"])
    seen = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((len(batch), batch.layout.num_tokens, batch.layout.segments_BT.numel()))

    speed, bar = Throughput(), Progress()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        val_check_interval=0.5,
        limit_val_batches=1,
        callbacks=[Keep(), speed, bar],
        logger=CSVLogger(tmp_path, name="csv", version=""),
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    rows = [row for row in csv.DictReader((tmp_path / "csv" / "metrics.csv").open()) if row.get("perf/padding")]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    assert len(seen) == 16
    for number, row in enumerate(rows):
        images, tokens, positions = map(sum, zip(*seen[4 * number : 4 * number + 4], strict=True))
        assert float(row["perf/padding"]) == pytest.approx(1 - tokens / positions, abs=1e-6)
        rates = [float(row[f"perf/{name}_per_s"]) for name in ("tokens", "images")]
        assert rates[0] / rates[1] == pytest.approx(tokens / images, rel=1e-5)
        assert float(row["perf/data_wait"]) < 1
        assert all(math.isfinite(float(row[name])) for name in PERF)
    assert all(float(row["perf/data_wait"]) > 0 for row in rows), "without workers every batch is waited for"
    assert speed.line
    assert bar.line.endswith(speed.line)


@pytest.mark.slow
def test_two_processes_log_together(tmp_path):
    write_shards(tmp_path / "train", [32, 32], labels=True)
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    steps = ["data.batch_size=4", "trainer.max_steps=3", "trainer.log_every_n_steps=1"]
    command = ["train", "name=two", "data.train=train", "data.num_workers=1", "trainer.accumulate_grad_batches=2"]
    done = run_nxtp(*command, *TINY_OVERRIDES, *two, *steps, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "runs" / "two" / "csv" / "version_0" / "metrics.csv").open()))
    rows = [row for row in rows if row.get("perf/images_per_s")]
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    assert all(float(row[name]) >= 0 for row in rows for name in PERF)
    lines = [line for line in done.stderr.splitlines() if " images/s · " in line]
    assert len(lines) == 3, "only one process logs"


def test_the_progress_bar_counts_no_epochs_where_only_steps_are_limited(monkeypatch):
    bar = Progress()
    for epochs, text in ((-1, "Epoch 3"), (12, "Epoch 3/11")):
        monkeypatch.setattr(bar, "_trainer", L.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False))
        assert bar._get_train_description(3).strip() == text


def test_what_lightning_says_of_a_gpu_and_no_user_needs_is_left_out(caplog):
    filter_lightning_messages()
    said = {
        "lightning.pytorch.accelerators.cuda": "LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: [0]",
        "lightning.fabric.utilities.rank_zero": "You are using a CUDA device ('NVIDIA H200') that has Tensor Cores.",
        "lightning.pytorch.utilities.rank_zero": "GPU available: True (cuda), used: True",
    }
    with caplog.at_level(logging.INFO):
        for name, message in said.items():
            logging.getLogger(name).info(message)
    assert caplog.messages == ["GPU available: True (cuda), used: True"]
