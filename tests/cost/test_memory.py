"""Memory before a run, against PyTorch's account of real training steps and against arithmetic."""

import json
from dataclasses import replace

import pytest
import torch
from allocations import PUBLISHED_LIKE, config, measured_peak, rank_peak
from click.testing import CliRunner
from helpers import TINY_OVERRIDES, fork
from omegaconf import OmegaConf

from nxtp.cost.command import describe
from nxtp.cost.memory import Memory, Step, memory, step_of
from nxtp.distributed.parallelize import ParallelConfig
from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.train.optim import MUON, OptimConfig, state_bytes

pytestmark = pytest.mark.costly


@pytest.mark.parametrize(
    ("trainable", "checkpointing", "accumulates", "precision"),
    [
        (TrainableConfig(), False, False, "32-true"),
        (PUBLISHED_LIKE, False, False, "32-true"),
        (PUBLISHED_LIKE, True, False, "32-true"),
        (TrainableConfig(), True, True, "32-true"),
        pytest.param(PUBLISHED_LIKE, False, False, "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_prediction_is_what_a_real_step_allocates(trainable, checkpointing, accumulates, precision):
    optim, parallel = OptimConfig(trainable=trainable), ParallelConfig(activation_checkpointing=checkpointing)
    step = Step(batch=4, precision=precision, accumulates=accumulates)
    predicted = memory(config(), None, optim, step, parallel).total
    assert predicted == pytest.approx(measured_peak(optim, step, parallel), rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_prediction_is_what_a_real_validation_allocates(precision):
    optim, step = OptimConfig(trainable=PUBLISHED_LIKE), Step(batch=1, precision=precision, val_batch=32)
    predicted = memory(config(), None, optim, step)
    assert predicted.when == "validation"
    assert predicted.total > 1.2 * of(replace(step, val_batch=0)).total
    assert predicted.total == pytest.approx(measured_peak(optim, step, ParallelConfig()), rel=0.02)


def test_validation_gathers_all_weights():
    weights = of(Step(batch=1)).peak["weights"]
    sharded = of(Step("fsdp", ranks=8, batch=1, val_batch=4))
    assert sharded.when == "validation"
    assert sharded.peak["weights"] == pytest.approx(weights * (1 + 1 / 8), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "within"), [("ddp", 0.02), ("fsdp", 0.15)])  # gloo needs room of its own
def test_prediction_is_what_each_of_two_processes_allocates(strategy, within, tmp_path):
    step = Step(strategy, ranks=2, batch=4)
    processes = [fork(rank_peak, rank, step, str(tmp_path)) for rank in range(2)]
    for rank, process in enumerate(processes):
        process.join(120)
        measured = int((tmp_path / str(rank)).read_text())
        assert of(step, blocks=2).total == pytest.approx(measured, rel=within)


def of(step: Step, trainable: TrainableConfig = PUBLISHED_LIKE, blocks: int = 2) -> Memory:
    return memory(config(blocks), None, OptimConfig(trainable=trainable), step)


def test_parts_equal_arithmetic():
    with torch.device("meta"):
        model = Model(config())
    choose_trainable(model, PUBLISHED_LIKE)
    weights = 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)

    single = of(Step(batch=2))
    assert single.most["weights"] == pytest.approx(weights, rel=1e-3)  # and a few buffers
    assert single.most["gradients"] == trained
    assert single.most["optimizer"] == single.peak["optimizer"] == 2 * trained
    assert single.most["activations"] == pytest.approx(of(Step(batch=1)).most["activations"] * 2, rel=0.02)
    assert single.total == sum(single.peak.values())

    ddp = of(Step("ddp", ranks=8, batch=2))
    assert ddp.most["gradients"] == trained  # the buckets that send them
    assert ddp.total == single.total

    sharded, more = (of(Step("fsdp", ranks=ranks, batch=2)) for ranks in (8, 16))
    assert sharded.most["optimizer"] == pytest.approx(2 * trained / 8, rel=0.01)
    assert more.most["gradients"] == pytest.approx(trained / 16, rel=0.01)
    assert more.most["weights"] < sharded.most["weights"] < weights

    scaled = of(Step("ddp", ranks=8, batch=1, precision="16-mixed", on_gpu=True))
    assert scaled.total == single.most["weights"] + 3 * trained + trained  # the update's square roots
    assert scaled.peak["working"] == trained

    def optimizer_bytes(target: str) -> int:
        return state_bytes(model, OptimConfig(trainable=PUBLISHED_LIKE, optimizer={"_target_": target}))

    assert optimizer_bytes("torchao.optim.AdamW8bit") == pytest.approx(2 * trained / 4 * (1 + 1 / 64), rel=0.02)
    assert optimizer_bytes("torch.optim.SGD") == 0
    head = 4 * 4000 * 192  # Muon leaves it to AdamW
    assert optimizer_bytes(MUON) == pytest.approx(trained + head, rel=0.02)


def test_frozen_leading_blocks_store_nothing_and_checkpoints_little():
    step = Step(batch=2)
    all_trained, last_only = of(step, TrainableConfig(), 3), of(step, TrainableConfig(encoder="none"), 3)
    none = TrainableConfig(encoder="none", projection=False, image_token=False, embedding=False, decoder=1)
    assert of(step, none, 3).most["activations"] < 0.5 * last_only.most["activations"]
    assert last_only.most["activations"] < 0.9 * all_trained.most["activations"]
    cached = of(Step(batch=2, features=True), TrainableConfig(encoder="none"), 3)
    assert cached.most["weights"] == last_only.most["weights"]
    assert cached.most["activations"] <= last_only.most["activations"]
    assert cached.total <= last_only.total
    checkpointed = memory(config(3), None, OptimConfig(), step, ParallelConfig(activation_checkpointing=True))
    assert checkpointed.most["activations"] < 0.4 * all_trained.most["activations"]


def test_cuda_stores_the_inputs_of_norms_in_float32_under_autocast():
    cpu, cuda = (of(Step(batch=2, precision="bf16-mixed", on_gpu=gpu)).most["activations"] for gpu in (False, True))
    of_a_norm = 2 * (36 + 1) * 128  # images, tokens, width; two norms per trained encoder block and the last
    assert cuda - cpu == pytest.approx((2 * 1 + 1) * of_a_norm * 2, rel=0.03)


def trainer(val=None, **changes):
    fields = {
        "accelerator": "gpu",
        "devices": 8,
        "num_nodes": 1,
        "strategy": "ddp",
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 1,
    }
    data = {"batch_size": 16, "val": val, "val_batch_size": 128}
    return OmegaConf.create({"trainer": fields | changes, "data": data, "validation": {"top_k": 5}})


def test_the_strategy_is_read_from_the_trainer():
    sharded = {"_target_": "nxtp.distributed.fsdp2.FSDP2Strategy"}
    expected = Step("ddp", 32, batch=16, precision="bf16-mixed", on_gpu=True, top_k=5)
    assert step_of(trainer(num_nodes=4)) == step_of(trainer({"val": "x"}, num_nodes=4, limit_val_batches=0)) == expected
    assert step_of(trainer({"val": "x"}, num_nodes=4, limit_val_batches=None)) == replace(expected, val_batch=128)
    found = step_of(trainer(strategy=sharded, devices="0,1,2,3", accumulate_grad_batches=2))
    assert (found.strategy, found.ranks, found.accumulates) == ("fsdp", 4, True)
    assert step_of(trainer(strategy="auto", devices=1, accelerator="cpu")).strategy == "single"
    with pytest.raises(UserError, match="deepspeed"):
        step_of(trainer(strategy="deepspeed_stage_3"))


def test_describe_prints_memory_per_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        return CliRunner().invoke(describe, ["trainer=fsdp", *arguments])

    done = run("trainer.devices=8", "trainer.num_nodes=2", *TINY_OVERRIDES, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["image_tokens"] == 16
    assert (found["step"]["strategy"], found["step"]["ranks"]) == ("fsdp", 16)
    assert found["memory_bytes"]["total"] == sum(found["memory_bytes"]["peak"].values()) > 0
    with monkeypatch.context() as patch:  # it takes seconds
        patch.setattr("nxtp.cost.describe.description", lambda cfg: found)
        done = run()
    assert f"{found['parameters']['total'] / 1e6:.2f}" in done.output
    assert "Memory per rank (GB)" in done.output
    assert "16 ranks, fsdp, 64 images each, bf16-mixed" in " ".join(done.output.split())
    assert "a GPU of 16 GB" in done.output
    wrong = run("trainer.devises=8").exception
    assert isinstance(wrong, UserError)
    assert "devices" in str(wrong)
    wrong = run("trainer.precision=bf61-mixed", *TINY_OVERRIDES).exception
    assert isinstance(wrong, UserError)
    assert "bf16-mixed" in str(wrong)
    refused = run("trainer.precision=16-mixed", *TINY_OVERRIDES)
    assert isinstance(refused.exception, UserError)
    assert refused.stdout == "", "the mistake comes first, not after tables"
