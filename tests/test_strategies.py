"""The same mathematics everywhere: one process with the whole batch, DDP, FSDP, tensor parallelism, accumulation."""

import json

import pytest
import torch
from helpers import TINY_OVERRIDES, curve, nxtp_runs, write_shards
from safetensors.torch import load_file

CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
WAYS = {  # overrides and ranks: eight images a step in each
    "one": (["data.batch_size=8"], 1),
    "accumulated": (["data.batch_size=2", "trainer.accumulate_grad_batches=4"], 1),
    "ddp": (["trainer=ddp", *CPU, "data.batch_size=4"], 2),
    "ddp_accumulated": (["trainer=ddp", *CPU, "data.batch_size=2", "trainer.accumulate_grad_batches=2"], 2),
    "fsdp": (["trainer=fsdp", *CPU, "data.batch_size=4"], 2),
    "fsdp_accumulated": (["trainer=fsdp", *CPU, "data.batch_size=2", "trainer.accumulate_grad_batches=2"], 2),
    "tensor_parallel": (["trainer=fsdp_tp", *CPU, "data.batch_size=8", "trainer.devices=2"], 2),
    "checkpointed": (["parallel.activation_checkpointing=true", "data.batch_size=8"], 1),
}
PARTS = {
    "all": [],
    "mixed": ["optim.trains.encoder=1", "optim.trains.embedding=false"],
}
STEPS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards; thirteen validation images, which two ranks cannot share evenly."""
    root = tmp_path_factory.mktemp("strategies")
    write_shards(root / "train", [80, 80])
    write_shards(root / "val", [9, 4], labels=True)
    return root


def train(root, name: str, way: str, *overrides: str):
    more, ranks = WAYS[way]
    nxtp_runs(
        "train",
        f"name={name}",
        "data.train=train",
        "+data.val.val=val",
        *TINY_OVERRIDES,
        "data.workers=0",
        "data.val_batch_size=4",
        "trainer.log_every_n_steps=1",
        f"trainer.max_steps={STEPS}",
        "optim.lr=3e-3",
        "export=last",
        *overrides,
        *more,
        cwd=root,
        ranks=ranks,
    )
    return root / "runs" / name


@pytest.fixture(scope="module", params=[("matched", "all"), ("published", "mixed")], ids=lambda p: "-".join(p))
def reference(request, root):
    """One process with the whole batch: its name, its overrides, its run."""
    objective, parts = request.param
    overrides = [f"objective={objective}", *PARTS[parts]]
    return objective, overrides, train(root, f"{objective}_one", "one", *overrides)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one"])
def test_every_way_of_computing_gives_the_same_run(root, reference, way):
    objective, overrides, one = reference
    run = train(root, f"{objective}_{way}", way, *overrides)
    accumulated = {"accumulated": 4}.get(way, 2 if way.endswith("accumulated") else 1)
    losses = curve(run)
    if accumulated == 1:
        assert losses == pytest.approx(curve(one), rel=1e-5)
    assert len(losses) == STEPS
    expected, found = (load_file(path / "model" / "model.safetensors") for path in (one, run))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    metrics, same = (json.loads((path / "run.json").read_text())["metrics"] for path in (one, run))
    for name in ("val/recall@10", "val/precision@10", "val/f1@10", "val/loss"):
        assert same[name] == pytest.approx(metrics[name], rel=1e-4), name
