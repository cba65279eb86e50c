"""Adapters, averages and early stopping: a run that goes on from a checkpoint is the run that was never stopped."""

import json

import pytest
import torch
from helpers import TINY_OVERRIDES, call_nxtp, curve, write_shards
from safetensors.torch import load_file

from nxtp.distributed.checkpoints import read_file
from nxtp.inference.recognizer import Recognizer
from nxtp.model.lora import is_adapter


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
