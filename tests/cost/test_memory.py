"""Memory before a run, against PyTorch's account of real training steps and against arithmetic."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from click.testing import CliRunner
from helpers import TINY_OVERRIDES
from omegaconf import OmegaConf
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from nxtp.cost.command import describe
from nxtp.cost.memory import Memory, Step, memory, step_of
from nxtp.distributed.parallelize import ParallelConfig, parallelize, unsharded
from nxtp.errors import UserError
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.layout import lay_out
from nxtp.model.model import Model, ModelConfig
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.sampling.one_shot import one_shot
from nxtp.train.optim import MUON, OptimConfig, build_optimizer, state_bytes

pytestmark = pytest.mark.costly

SIDE = 84
PUBLISHED_LIKE = TrainableConfig(encoder=1, embedding=False)


def config(blocks: int = 2) -> ModelConfig:
    """5 M parameters in narrow blocks, so that activations are no smaller than weights."""
    fields = {
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "num_hidden_layers": blocks,
        "vocab_size": 4000,
        "pad_token_id": None,
    }
    vision = {"layers": blocks, "width": 128, "head_width": 32, "patch_size": 14}
    return ModelConfig(encoder=EncoderConfig(vision=vision, image_size=SIDE), decoder=DecoderConfig(config=fields))


def measured_peak(optim: OptimConfig, step: Step, parallel: ParallelConfig, mesh: DeviceMesh | None = None) -> int:
    """Peak of the bytes allocated in two real steps and before them, by PyTorch's account."""
    gc.collect()  # what another test has left would be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = Model(config()).train()
        choose_trainable(model, optim.trainable)
        parallelize(model, parallel, mesh, step.precision)
        optimizer, _ = build_optimizer(model, optim, total_steps=10)
        layout = lay_out(
            [[(5, 6)] * 8] * step.batch, prompt=[1] * 7, delimiter=4, num_image_tokens=model.num_image_tokens
        )
        images = torch.zeros(step.batch, 3, SIDE, SIDE, dtype=torch.uint8)
        called = DistributedDataParallel(model, gradient_as_bucket_view=True) if step.strategy == "ddp" else model
        with record_function("steps"):
            for _ in range(2):
                for is_first in (True, False) if step.accumulates else (True,):
                    with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bf16-mixed"):
                        loss = called(images, layout).total
                    if is_first:
                        optimizer.zero_grad()  # where Lightning does
                    loss.backward()
                    del loss
                optimizer.step()
            if step.val_batch:  # as RecognitionModule validates
                validated, prompt = torch.zeros(step.val_batch, 3, SIDE, SIDE, dtype=torch.uint8), [1] * 7
                layout = lay_out(
                    [[(5, 6)] * 8] * step.val_batch, prompt=prompt, delimiter=4, num_image_tokens=model.num_image_tokens
                )
                dtype = torch.bfloat16 if step.precision == "bf16-mixed" else None
                with unsharded(model), torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                    _, prefilled = model.eval().evaluate(validated, layout, prompt)
                    one_shot(model, validated, prompt=prompt, delimiter=4, top_k=10, max_tokens=3, prefilled=prefilled)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begun = next(event.start_ns() for event in events if event.name() == "steps")
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive) if event.start_ns() >= begun else 0
    return peak


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


def _rank(rank: int, step: Step, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=step.ranks)
    mesh = None
    if step.strategy == "fsdp":
        mesh = dist.init_device_mesh("cpu", (step.ranks,))
    peak = measured_peak(OptimConfig(trainable=PUBLISHED_LIKE), step, ParallelConfig(), mesh)
    Path(directory, str(rank)).write_text(str(peak))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "within"), [("ddp", 0.02), ("fsdp", 0.15)])  # gloo needs room of its own
def test_prediction_is_what_each_of_two_processes_allocates(strategy, within, tmp_path):
    step = Step(strategy, ranks=2, batch=4)
    mp.start_processes(_rank, (step, str(tmp_path)), nprocs=2, start_method="fork")  # by name it is not importable
    for rank in range(2):
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
