"""Adapters, averages and early stopping: a run that goes on from a checkpoint is the run that was never stopped."""

import csv
import json
import re

import lightning as L
import pytest
import torch
from helpers import TINY_OVERRIDES, call_nxtp, curve, tiny_config, write_shards
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.transforms import ImageTransform
from nxtp.distributed.checkpoints import read_file
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.lora import is_adapter
from nxtp.model.tokenizer import train_tokenizer
from nxtp.train.callbacks.early_stopping import EarlyStopping
from nxtp.train.callbacks.model_checkpoint import ModelCheckpoint
from nxtp.train.callbacks.preemption import _validation_follows
from nxtp.train.command import find_tokenizer
from nxtp.train.module import RecognitionModule
from nxtp.train.optim import OptimConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("continued")
    write_shards(root / "train", [16], labels=True)
    write_shards(root / "val", [6], labels=True)
    return root


def run(root, name: str, *overrides: str, code: int = 0) -> str:
    """Epochs of two steps."""
    arguments = [
        "train",
        f"name={name}",
        "data.train=train",
        "+data.val.val=val",
        *TINY_OVERRIDES,
        "data.num_workers=0",
    ]
    arguments += ["data.batch_size=8", "data.val_batch_size=6", "trainer.log_every_n_steps=1", "optim.lr=3e-2"]
    done = call_nxtp(*arguments, *overrides, cwd=root)
    assert done.returncode == code, done.stderr
    return done.stderr


def record(root, name: str) -> dict:
    return json.loads((root / "runs" / name / "run.json").read_text())


def exported(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapters_and_averages_resume_and_are_exported_merged(root):
    lora = ["model.decoder.lora={r: 4, dropout: 0.5}", "callbacks=ema", "callbacks.ema.decay=0.5"]
    lora += ["trainer.max_epochs=2", "export=last"]
    middle = "+callbacks.middle={_target_: nxtp.train.callbacks.preemption.LastCheckpoint, path: middle.ckpt"
    run(root, "whole", *lora, middle + ", every_n_train_steps: 3}")
    run(root, "resumed", *lora, "resume=middle.ckpt")
    whole, resumed = (root / "runs" / name for name in ("whole", "resumed"))
    assert curve(resumed) == curve(whole)[3:]
    expected, found = (read_file(path / "checkpoints" / "last.ckpt") for path in (whole, resumed))
    assert_equal(found["state_dict"], expected["state_dict"])  # the averages
    for number, parts in expected["optimizer_states"][0]["state"].items():
        assert_equal(found["optimizer_states"][0]["state"][number], parts)
    assert_equal(exported(resumed / "model"), exported(whole / "model"))

    stopped = read_file(root / "middle.ckpt")
    start, end = stopped["state_dict"], expected["state_dict"]
    blocks = [name for name in start if ".layers." in name]
    assert {name for name in blocks if not torch.equal(start[name], end[name])} == set(filter(is_adapter, blocks))
    assert any(not torch.equal(end[name], stopped["current_model_state"][name]) for name in blocks)
    assert call_nxtp("export", str(whole / "checkpoints" / "last.ckpt"), "--out", "again", cwd=root).returncode == 0
    assert_equal(exported(root / "again"), exported(whole / "model"))
    assert not any("lora" in name or "base_layer" in name for name in exported(root / "again"))
    assert Recognizer.from_pretrained(root / "again", device="cpu").config.decoder.lora is None


def test_early_stopping_ends_a_run_and_keeps_it_ended(root):
    stop = ["callbacks=[ema,early_stopping]", "callbacks.ema.decay=0.5", "callbacks.early_stopping.patience=1"]
    stop += [
        "trainer.max_epochs=9",
        "callbacks.early_stopping.min_delta=2",
    ]  # no recall is so much better than the first
    output = run(root, "stopped", *stop)
    made = record(root, "stopped")
    assert (made["status"], made["step"], made["steps"]) == ("finished", 4, 4)
    assert made["ended_by"].startswith("early stopping: Monitored metric val/recall@10 did not improve in the last 1")
    assert f"Ended at step 4 by {made['ended_by']}" in output
    assert "finished: nothing to do" in run(root, "stopped", *stop)

    weights, best = (
        exported(root / "runs" / "stopped" / "model"),
        root / "runs" / "stopped" / "checkpoints" / "best.ckpt",
    )
    averages = {name.removeprefix("model."): tensor for name, tensor in read_file(best)["state_dict"].items()}
    assert_equal(weights, averages)
    assert call_nxtp("export", str(best), "--out", "best", cwd=root).returncode == 0
    assert_equal(exported(root / "best"), averages)
    *during, final = curve(root / "runs" / "stopped", "val/loss")
    assert final == made["metrics"]["val/loss"]
    assert final in during, "validated with the averages, too"
    assert "WeightAveraging" not in output

    made["status"] = "running"  # killed before it had written its model
    (root / "runs" / "stopped" / "run.json").write_text(json.dumps(made | {"ended_by": None}))
    run(root, "stopped", *stop)
    assert (record(root, "stopped")["step"], record(root, "stopped")["ended_by"]) == (4, made["ended_by"])
    assert_equal(exported(root / "runs" / "stopped" / "model"), weights)


def test_early_stopping_needs_a_metric(root):
    output = run(root, "blind", "callbacks=early_stopping", "data.val={}", "~data.val.val", code=1)
    assert output.splitlines()[-1].startswith("error: callbacks.early_stopping needs a validation set (data.val)")


def test_a_longer_run_begins_with_the_rest_of_the_epoch(root):
    run(root, "short", "trainer.max_steps=1")
    run(root, "longer", "resume=runs/short/checkpoints/last.ckpt", "trainer.max_epochs=2")
    assert [record(root, "longer")[key] for key in ("step", "samples_seen")] == [4, 32]


@pytest.fixture(scope="module")
def one(root) -> str:
    """A finished run of an epoch, with averages, and how to go on from it."""
    run(root, "one", "trainer.max_epochs=1", "callbacks=ema")
    return "resume=runs/one/checkpoints/last.ckpt"


@pytest.mark.parametrize("schedule", ["nxtp.train.optim.warmup_cosine", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_a_run_that_goes_on_has_its_own_rates_and_its_own_schedule(root, one, schedule):
    """As if it had had them from the start, not those of the run that saved the checkpoint."""
    own = [
        "trainer.max_epochs=3",
        "optim.lr=1e-4",
        "optim.weight_decay=0.05",
        f"optim.schedule={{_target_: {schedule}}}",
    ]
    name = schedule.rpartition(".")[2]
    run(root, f"{name}_fresh", *own)
    run(root, f"{name}_longer", *own, one)
    fresh, longer = (root / "runs" / f"{name}_{kind}" for kind in ("fresh", "longer"))
    rates = curve(fresh, "lr-AdamW/pg1")
    assert len(rates) == 6
    assert max(rates) <= 1e-4
    assert curve(longer, "lr-AdamW/pg1") == rates[2:]
    saved = read_file(longer / "checkpoints" / "last.ckpt")
    assert [group["weight_decay"] for group in saved["optimizer_states"][0]["param_groups"]] == [0.05, 0.0]


def test_a_finished_run_with_averages_goes_on_with_the_weights_themselves(root, one):
    saved = read_file(root / "runs/one/checkpoints/last.ckpt")
    average, weights = saved["state_dict"], saved["current_model_state"]
    assert any(not torch.equal(average[name], weights[name]) for name in average)
    assert_equal(exported(root / "runs/one/model"), {n.removeprefix("model."): t for n, t in average.items()})
    assert "not created with WeightAveraging" not in run(root, "on", "callbacks=ema", "trainer.max_epochs=2", one)


def test_what_cannot_go_on_is_one_line(root):
    run(root, "plain", "trainer.max_epochs=1")
    output = run(root, "from_best", "resume=runs/plain/checkpoints/best.ckpt", code=1)
    assert output.splitlines()[-1] == (
        "error: The checkpoint has the weights alone, as best.ckpt: resume from last.ckpt."
    )
    output = run(root, "other_groups", "resume=runs/plain/checkpoints/last.ckpt", "optim.encoder_lr=1e-3", code=1)
    assert re.search(
        r"error: The checkpoint's optimizer has groups of \[\d+, \d+\] parameters, that of this run \[(\d+, ){3}\d+\]: "
        r"set optim\.trainable, optim\.encoder_lr, .* as the run that saved it did",
        output.splitlines()[-1],
    )
    files = [root / "runs" / "plain" / name for name in ("run.json", "config.yaml")]
    before = [file.read_bytes() for file in files]
    run(root, "plain", "resume=runs/plain/checkpoints/last.ckpt", "optim.encoder_lr=1e-3", code=1)
    assert [file.read_bytes() for file in files] == before, "the finished run keeps its record"
    module = RecognitionModule(tiny_config(), train_tokenizer(["a rose"], vocab_size=400), OptimConfig())
    tokenizer = train_tokenizer(["an ocean"], vocab_size=400)
    with pytest.raises(UserError, match=r"another tokenizer, .*: model\.tokenizer=runs/NAME/tokenizer takes that of"):
        module.on_load_checkpoint({"counts": {"samples_read": 1}, "recognizer": {"tokenizer": tokenizer.files()}})


def test_the_tokenizer_of_a_start_that_failed_is_not_taken(root, tmp_path):
    config, data = tiny_config(), DataConfig(train=str(root / "train"))
    train_tokenizer(["zebra"], vocab_size=300).save(tmp_path / "tokenizer")
    old, new = (find_tokenizer(config, data, tmp_path, {}, Ranks(), reuse=reuse) for reuse in (True, False))
    assert old.files() != new.files()
    assert find_tokenizer(config, data, tmp_path, {}, Ranks(), reuse=True).files() == new.files()


def test_patience_may_change(tmp_path):
    state = EarlyStopping("val/loss", patience=2).state_dict()
    stopping = EarlyStopping("val/loss", patience=7)
    stopping.load_state_dict(state | {"wait_count": 1})
    assert (stopping.patience, stopping.wait_count) == (7, 1)


@pytest.mark.parametrize("moved", [True, False])
def test_a_run_that_was_moved_knows_its_best_weights(tmp_path, moved):
    old, new = tmp_path / "old", tmp_path / "new"
    for directory in (new,) if moved else (old, new):
        directory.mkdir()
        (directory / "best.ckpt").touch()
    state = ModelCheckpoint(dirpath=old, monitor="val/loss").state_dict()
    path = str(old / "best.ckpt")
    score = torch.tensor(0.5)
    state |= {"best_model_score": score, "best_model_path": path, "best_k_models": {path: score}}
    keeping = ModelCheckpoint(dirpath=new, monitor="val/loss")
    keeping.load_state_dict(state | {"kth_best_model_path": path, "kth_value": score})
    assert keeping.best_model_path == str((new if moved else old) / "best.ckpt")
    assert keeping.best_k_models == ({str(new / "best.ckpt"): score} if moved else {})
    assert keeping.best_model_score == (score if moved else None)


def fit(root, *callbacks, logger=False, **trainer) -> RecognitionModule:
    """In this process; eight batches an epoch."""
    tokenizer = train_tokenizer(["rose", "lemon", "leaf", "ocean", "stone"], vocab_size=400)
    config = DataConfig(train=str(root / "train"), val={"v": str(root / "val")}, batch_size=2, num_workers=0)
    data = WebDatasetDataModule(config, tokenizer, transform=ImageTransform(32), num_image_tokens=16)
    module = RecognitionModule(tiny_config(), tokenizer, OptimConfig(), val_names=["v"])
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=logger, default_root_dir=root,
        use_distributed_sampler=False, **quiet, **trainer,
    ).fit(module, datamodule=data)  # fmt: skip
    return module


class Follows(L.Callback):
    """Before which batches a validation ran, and where it was expected."""

    def __init__(self):
        self.batches, self.expected, self.ran = 0, [], []

    def on_train_batch_end(self, trainer, *_):
        self.batches += 1
        if _validation_follows(trainer):
            self.expected.append(self.batches)

    def on_validation_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self.ran.append(self.batches)


@pytest.mark.parametrize(
    "options",
    [
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
        {"val_check_interval": 3},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 0.5},
    ],
)
def test_it_is_known_where_lightning_validates(root, options):
    follows = Follows()
    fit(root, follows, max_epochs=2, **options)
    assert follows.ran
    assert follows.expected == follows.ran


def test_the_loss_of_accumulated_batches_is_that_of_the_step(root, tmp_path, monkeypatch):
    sums, forward = [], RecognitionModule.forward

    def watched(self, batch):
        loss = forward(self, batch)
        if self.training:
            sums.append((float(loss.total.detach()), float(loss.count)))
        return loss

    monkeypatch.setattr(RecognitionModule, "forward", watched)
    logger = CSVLogger(tmp_path)
    fit(root, logger=logger, max_epochs=1, accumulate_grad_batches=4, log_every_n_steps=1, limit_val_batches=0)
    rows = list(csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").open()))
    found = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    steps = [sums[:4], sums[4:]]
    assert found == pytest.approx([sum(t for t, _ in step) / sum(n for _, n in step) for step in steps], rel=1e-5)
