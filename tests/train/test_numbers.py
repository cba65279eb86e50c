"""Impossible numbers in a configuration: one line that names the key, not a traceback of what divides by it."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from helpers import TINY_OVERRIDES, call_nxtp, composed, write_shards
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nxtp.errors import UserError
from nxtp.train.checks import check_settings
from nxtp.train.command import train


@pytest.fixture(scope="module")
def composed_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbers")
    write_shards(root / "train", [24], labels=True)
    write_shards(root / "val", [4], labels=True)
    sets = [f"data.train={root}/train", f"+data.val.val={root}/val", "data.num_workers=0", "data.batch_size=8"]
    return composed(root / "run", *sets, *TINY_OVERRIDES, "trainer.max_epochs=1"), HydraConfig.get()


@pytest.fixture
def recipe(composed_once):
    cfg, hydra = copy.deepcopy(composed_once)
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": hydra})
    shutil.rmtree(hydra.runtime.output_dir, ignore_errors=True)
    return cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "optim.lr must be ≥ 0, got -1.0."),
        ("optim.lr=nan", "optim.lr must be ≥ 0, got nan."),
        ("optim.weight_decay=inf", "optim.weight_decay must be ≥ 0, got inf."),
        ("optim.optimizer.betas=[2,1]", "optim.optimizer cannot be instantiated: Invalid beta parameter at index 0: 2"),
        ("optim.schedule.warmup=-1", "optim.schedule.warmup must be ≥ 0, got -1."),
        ("optim.schedule.final_lr=-0.1", "optim.schedule.final_lr must be ≥ 0, got -0.1."),
        ("data.cache_gb=-1", "data.cache_gb must be ≥ 0, got -1.0."),
        ("parallel.start_timeout=0", "parallel.start_timeout must be ≥ 1, got 0.0."),
        ("trainer.max_steps=many", "trainer.max_steps must be a number, got 'many'."),
        ("trainer.max_epochs=ten", "trainer.max_epochs must be a number, got 'ten'."),
        ("trainer.limit_val_batches=[1]", "trainer.limit_val_batches must be a number, got '[1]'."),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be ≥ 1, got 0."),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be ≥ 1, got 0."),
        ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be ≥ 1, got 0."),
        (
            "trainer.val_check_interval=0",
            "trainer.val_check_interval must be a number of batches or a share of an epoch",
        ),
        ("trainer.val_check_interval='00:00:10:00'", "trainer.val_check_interval must be a number of batches or"),
        ("trainer.val_check_interval=100", "trainer.val_check_interval: `val_check_interval` (100) must be less than"),
        ("matmul_precision=5", "matmul_precision must be highest, high, medium or null, got 5."),
        ("trainer.precision=bf61-mixed", "trainer.precision=bf61-mixed is unknown. Did you mean 'bf16-mixed'? Known: "),
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed needs a GPU: on a CPU use bf16-mixed or 32-true."),
        ("trainer.precision=16-true", "trainer.precision=16-true needs a GPU: on a CPU use bf16-mixed or 32-true."),
        ("optim.schedule={_target_: torch.optim.lr_scheduler.NoLR}", "optim.schedule cannot be instantiated: "),
        ("optim.optimizer={_target_: torch.optim.Rprop, fused: true}", "optim.optimizer cannot be instantiated: Rprop"),
        ("optim.optimizer={_target_: torch.optim.SDG}", "optim.optimizer cannot be instantiated: "),
        ("global_batch=0", "global_batch must be ≥ 1, got 0."),
        ("global_batch=20", "global_batch=20 is not data.batch_size=8 × 1 ranks × "),
        ("model.vocab_size=-1", "model.vocab_size must be ≥ 1, got -1."),
        ("model.encoder.image_size=-32", "model.encoder.image_size must be ≥ 1"),
        ("model.encoder.vision.width=0", "model cannot be built with these numbers: "),
        ("model.encoder.vision.layers=0", "model.encoder: VisionTransformer gives no patch tokens of an image of 32"),
        ("model.decoder.config.hidden_size=-32", "model cannot be built with these numbers: "),
        ("model.decoder.config.num_key_value_heads=0", "model cannot be built with these numbers: "),
    ],
)
def test_an_impossible_number_is_one_line(recipe, override, message):
    """As a command composes it, but for the time that this takes."""
    cfg, (key, value) = recipe, override.split("=", 1)
    node, run_dir = yaml.safe_load(value), Path(HydraConfig.get().runtime.output_dir)
    OmegaConf.update(cfg, key, node, merge=False)
    with pytest.raises(UserError) as caught:
        train(cfg)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (run_dir / "checkpoints").exists()


def test_a_model_larger_than_the_memory_is_one_line(recipe, monkeypatch):
    total = psutil.virtual_memory().total
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=4 * 150_000))
    sizes = r"Training needs at least 0.0 GB \(weights, gradients, optimizer state\), and this machine for each process"
    with pytest.raises(UserError, match=sizes):
        train(recipe)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=total))
    recipe.model.decoder.config.hidden_size = 65536
    with pytest.raises(UserError, match=r"keep fewer blocks"):
        train(recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.precision=bf61-mixed"], "is unknown"),
        (["model.decoder.lora={target_modules: [qproj]}"], "no block has a linear layer 'qproj'"),
        (["trainer.accelerator=auto", "trainer.precision=16-mixed"], "needs a GPU"),
        (["optim.optimizer={_target_: torch.optim.Rprop, fused: true}"], "'fused'"),
        (["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=64-true"], "trainer=fsdp supports"),
        (["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "optim=adamw8bit"], "use adamw"),
    ],
)
def test_nothing_is_built_of_what_cannot_work(tmp_path, monkeypatch, overrides, message):
    """Not even data is looked for: this one does not exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call_nxtp("train", "name=x", "data.train=nowhere", *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.count("\n") == 1


def test_a_fused_optimizer_of_ones_own_cannot_clip_under_float16(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    half = ["trainer=gpu", "trainer.precision=16-mixed"]
    check_settings(composed(tmp_path, *half))
    fused = "optim.optimizer={_target_: torch.optim.Adam, fused: true}"
    check_settings(composed(tmp_path, fused, *half, "trainer.gradient_clip_val=null"))
    with pytest.raises(UserError, match=r"^optim.optimizer is fused, and trainer.precision=16-mixed cannot clip"):
        check_settings(composed(tmp_path, fused, *half))
