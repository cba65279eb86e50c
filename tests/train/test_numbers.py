"""Impossible numbers in a configuration: one line that names the key, not a traceback of what divides by it."""

import shutil

import pytest
from helpers import TINY_OVERRIDES, call_nxtp, write_shards


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbers")
    write_shards(root / "train", [24], labels=True)
    write_shards(root / "val", [4], labels=True)
    return root


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "optim.lr must be ≥ 0, got -1.0."),
        ("optim.lr=nan", "optim.lr must be ≥ 0, got nan."),
        ("optim.weight_decay=inf", "optim.weight_decay must be ≥ 0, got inf."),
        ("optim.betas=[2,1]", "optim.betas must be two numbers ≥ 0 and < 1, got [2.0, 1.0]."),
        ("optim.betas=[0.9]", "optim.betas must be two numbers ≥ 0 and < 1, got [0.9]."),
        ("data.cache_gb=-1", "data.cache_gb must be ≥ 0, got -1.0."),
        ("parallel.start_timeout=0", "parallel.start_timeout must be ≥ 1, got 0.0."),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be ≥ 1, got 0."),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be ≥ 1, got 0."),
        ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be ≥ 1, got 0."),
        ("trainer.val_check_interval=0", "trainer.val_check_interval must be > 0, got 0."),
        ("trainer.val_check_interval=100", "trainer.val_check_interval: `val_check_interval` (100) must be less than"),
        ("matmul_precision=5", "matmul_precision must be highest, high, medium or null, got 5."),
        ("model.vocab_size=-1", "model.vocab_size must be ≥ 1, got -1."),
        ("model.encoder.image_size=-32", "model.encoder.image_size must be ≥ 1"),
        ("model.encoder.vision.width=0", "model cannot be built with these numbers: "),
        ("model.encoder.vision.layers=0", "model cannot be built with these numbers: "),
        ("model.decoder.config.hidden_size=-32", "model cannot be built with these numbers: "),
        ("model.decoder.config.num_key_value_heads=0", "model cannot be built with these numbers: "),
    ],
)
def test_an_impossible_number_is_one_line(root, override, message):
    shutil.rmtree(root / "runs", ignore_errors=True)
    arguments = ["name=x", "data.train=train", "+data.val.val=val", *TINY_OVERRIDES, "data.num_workers=0"]
    done = call_nxtp("train", *arguments, "data.batch_size=8", "trainer.max_epochs=1", override, cwd=root)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not (root / "runs" / "x" / "checkpoints").exists()
