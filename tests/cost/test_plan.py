"""The plan's formulas against small cases computed by hand and against what FSDP sends."""

import io
import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from helpers import TINY_OVERRIDES, tiny_config
from omegaconf import OmegaConf
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from nxtp.config import composed
from nxtp.cost.command import describe
from nxtp.cost.memory import Step, _fake_mesh, memory, sections, step_of
from nxtp.cost.plan import (
    A100,
    Cluster,
    check_published,
    images_of,
    plan_table,
    published_flops,
    published_model,
    sent_bytes,
)
from nxtp.data.config import DataConfig
from nxtp.distributed.fsdp2 import FSDP2Strategy
from nxtp.distributed.parallelize import ParallelConfig, parallelize
from nxtp.errors import UserError
from nxtp.model.layout import lay_out
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig, choose_trainable


def model(**trainable) -> Model:
    tiny = Model(tiny_config(), 400)
    choose_trainable(tiny, TrainableConfig(**trainable))
    return tiny


class Sent(TorchDispatchMode):
    """Bytes that a ring sends for each collective."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.bytes, self.of = ranks, 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith("c10d::"):
            self.of[name.split("::")[1]] += 1
            whole = {"_allgather_base_": args[0], "_reduce_scatter_base_": args[1]}[name.split("::")[1]]
            self.bytes += whole.numel() * whole.element_size() * (self.ranks - 1) / self.ranks
        return result


@pytest.mark.parametrize(
    "trainable",
    [
        {},
        {"encoder": 1, "embedding": False},
        {"encoder": "none", "embedding": False},
        {"encoder": "none", "projection": False, "image_token": False, "embedding": False, "decoder": 1},
    ],
)
def test_bytes_are_what_fsdp_sends(trainable):
    whole = model(**trainable)
    expected = sent_bytes(whole, "fsdp", 4)
    with _fake_mesh(Step("fsdp", ranks=4)) as mesh:
        sharded = parallelize(whole, ParallelConfig(), mesh, "bf16-mixed")
        layout = lay_out([[(5, 6)]], prompt=[1, 2], delimiter=4, num_image_tokens=sharded.num_image_tokens)
        with Sent(4) as sent, torch.autocast("cpu", torch.bfloat16):
            sharded(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), layout).total.backward()
    assert not dist.is_initialized()
    assert sent.bytes == pytest.approx(expected, rel=0.02)  # vectors are padded to a multiple of four


def test_fsdp_reduces_gradients_with_the_last_accumulated_batch_only():
    with _fake_mesh(Step("fsdp", ranks=4)) as mesh:
        sharded = parallelize(model(), ParallelConfig(), mesh)
        layout = lay_out([[(5, 6)]], prompt=[1, 2], delimiter=4, num_image_tokens=sharded.num_image_tokens)
        strategy = FSDP2Strategy()
        strategy._lightning_module = SimpleNamespace(model=sharded)
        batches = []
        for syncs in (strategy.block_backward_sync, nullcontext):
            with syncs(), Sent(4) as sent:
                sharded(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), layout).total.backward()
            batches.append(sent.of)
    units = 2 + 2 + 2 + 1  # blocks of encoder and decoder, embedding and output layer, and the rest
    assert [of["_reduce_scatter_base_"] for of in batches] == [0, units]
    whole = model()
    one, two = (sent_bytes(whole, "fsdp", 4, batches) for batches in (1, 2))
    gradients = 3 / 4 * 4 * sum(p.numel() for p in whole.parameters())
    assert two == 2 * one - gradients
    assert sent_bytes(whole, "ddp", 4, 2) == sent_bytes(whole, "ddp", 4) == 2 * gradients


def test_ddp_sends_its_gradients_twice_around_the_ring():
    trained = sum(p.numel() for p in model(encoder="none").parameters() if p.requires_grad)
    assert sent_bytes(model(encoder="none"), "ddp", 8) == 2 * 7 / 8 * 4 * trained
    assert sent_bytes(model(), "ddp", 1) == sent_bytes(model(), "fsdp", 1) == 0


H100 = Cluster("H100 SXM", inside=450e9, between=50e9)


def test_a_step_takes_what_its_slower_half_takes():
    computing, sending, step = H100.step_seconds(flops=989.4e12 * 0.1, sent=5e9, ranks=16, mfu=0.5)
    assert (computing, sending, step) == pytest.approx((0.2, 0.1, 0.2))
    assert H100.step_seconds(flops=0, sent=9e9, ranks=8, mfu=0.5)[2] == pytest.approx(0.02)
    assert Cluster("L4", 1, 1).step_seconds(121e12, sent=0, ranks=1, mfu=0.5)[0] == pytest.approx(2)
    assert A100.step_seconds(flops=0, sent=5e9, ranks=9, mfu=0.5)[2] == pytest.approx(0.2)


@pytest.mark.slow  # 7 s of a real model's operators; the arithmetic is tested with small ones
def test_the_recipe_of_open_parts_fits_a_gpu_of_24_gb():
    cfg = composed("train", ["experiment=open"])
    config, vocabulary, optim, parallel = sections(cfg)
    assert memory(config, vocabulary, optim, step_of(cfg), parallel).total == pytest.approx(11.9e9, rel=0.01)


def test_images_are_samples_times_repeat_times_epochs_or_those_of_all_steps():
    train = {"a": {"shards": "x", "expected_samples": 100}, "b": {"shards": "y", "expected_samples": 10, "repeat": 2.0}}

    def cfg(global_batch=None, max_epochs=3, max_steps=-1, **data):
        trainer = {"max_epochs": max_epochs, "max_steps": max_steps}
        data = OmegaConf.structured(DataConfig(**data))
        return OmegaConf.create({"data": data, "trainer": trainer, "global_batch": global_batch})

    assert images_of(cfg(train=train)) == 360
    assert images_of(cfg(train=train, fraction=0.5)) == 180
    assert images_of(cfg(train=train, max_samples=50)) == 150
    assert images_of(cfg(train=train, max_steps=10, global_batch=16)) == 160
    assert images_of(cfg(train=train, max_steps=100, global_batch=16)) == 360
    for unlimited in (None, -1):
        assert images_of(cfg(train=train, max_epochs=unlimited, max_steps=100, global_batch=16)) == 1600
        with pytest.raises(UserError, match="set no end: set one, or use --images"):
            images_of(cfg(train=train, max_epochs=unlimited))
    with pytest.raises(UserError, match="depends on the number of GPUs"):
        images_of(cfg(train=train, max_steps=100))
    with pytest.raises(UserError, match="--images"):
        images_of(cfg(train="some/shards"))
    with pytest.raises(UserError, match=r"data\.train"):
        images_of(cfg())


def test_the_published_runs_are_predicted():
    paper = published_model()
    assert published_flops(paper) / 1e12 == pytest.approx(8.7, abs=0.05)  # its code needs about 8.7 TFLOP per image
    g3m, g70m = check_published(paper)
    assert 0.3 < g3m["mfu"] < 0.6
    assert g3m["sending_s"] < g3m["step_s"]
    assert g70m["step_s"] == pytest.approx(g70m["published_step_s"], rel=0.01)
    assert g3m["hours"] == pytest.approx(g3m["published_hours"], rel=0.02)
    assert g70m["hours"] == pytest.approx(g70m["published_hours"], rel=0.02)


SMALL = ("model=small", "optim=adamw", *TINY_OVERRIDES)


def run(*arguments: str):
    return CliRunner().invoke(describe, ["--plan", *arguments], catch_exceptions=True)


def test_the_command_prints_one_object_or_tables_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("experiment=g3m", *SMALL, "--gpus", "2", "global_batch=64", "trainer.limit_val_batches=0", "--json")
    assert done.exit_code == 0, done.output
    assert "planning fsdp on 2 GPUs" in done.stderr
    result = json.loads(done.stdout)
    assert batches(result) == [(2, "ddp", 16, 2, 64), (2, "fsdp", 16, 2, 64)], "as `nxtp train` accumulates"
    first = result["rows"][0]
    assert first["hours"] == pytest.approx(3_645_221 * 3 / 64 * first["step_s"] / 3600)
    console = Console(width=80, file=io.StringIO())
    console.print(plan_table(result))
    assert "The published runs" in console.file.getvalue()
    assert "…" not in console.file.getvalue()


def batches(result) -> list[tuple]:
    numbers = ("gpus", "strategy", "images_per_gpu", "batches", "global_batch")
    return [tuple(row[key] for key in numbers) for row in result["rows"]]


def test_the_recipes_images_per_step_are_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = []
    monkeypatch.setattr("nxtp.cost.plan.memory", lambda *a: steps.append(a[3]) or SimpleNamespace(total=0))

    def ddp(*arguments):
        return batches(json.loads(run("experiment=g3m", *arguments, *SMALL, "--json").stdout))[::2]

    assert ddp() == [(8, "ddp", 16, 4, 512), (32, "ddp", 16, 1, 512), (256, "ddp", 2, 1, 512)]
    assert [step.accumulates for step in steps] == [True, True, False, False, False, False]
    assert ddp("global_batch=null", "--gpus", "256") == [(256, "ddp", 16, 1, 4096)]


def test_what_cannot_be_planned_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Did you mean '--gpus'?" in run("--gpuss", "8").output
    assert "8,32,256" in run("--gpus", "8,many").output
    assert "'RTX 4091'. Did you mean 'RTX 4090'?" in str(run("experiment=g3m", "--gpu", "RTX 4091").exception)
    alone = CliRunner().invoke(describe, ["experiment=g3m", "--mfu", "0.5"])
    assert alone.exit_code == 2
    assert "--mfu needs --plan" in alone.output
    for gpus, batch in ((3, 16), (2, 24), (1024, 16)):
        uneven = run("experiment=g3m", "--gpus", str(gpus), f"data.batch_size={batch}").exception
        assert isinstance(uneven, UserError)
        assert str(uneven).startswith(f"global_batch=512 cannot be divided among {gpus} GPUs with data.batch_size=")
    unknown = run("experiment=g70").exception
    assert isinstance(unknown, UserError)
    assert "g70m" in str(unknown)
