"""The published recipes say what the paper's system was trained with, and ours differ in the objective alone."""

import logging
from dataclasses import replace

import pytest
import torch
from helpers import TINY_OVERRIDES, composed, write_shards
from omegaconf import OmegaConf

from nxtp.config import to_dataclass
from nxtp.cost.describe import description
from nxtp.cost.memory import step_of
from nxtp.data.config import DataConfig
from nxtp.data.mixture import open_set
from nxtp.errors import UserError
from nxtp.model.layout import MATCHED, PUBLISHED, Objective
from nxtp.model.meta import count_parameters, meta_model
from nxtp.model.model import ModelConfig
from nxtp.train.checks import check_settings
from nxtp.train.command import build
from nxtp.train.optim import OptimConfig, build_optimizer

RECIPES = ("g3m", "g70m", "in1k")


def recipe(tmp_path, name, *overrides):
    return OmegaConf.to_container(composed(tmp_path, f"experiment={name}", *overrides), resolve=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_matched_recipe_differs_only_in_the_objective(tmp_path, name):
    published, matched = recipe(tmp_path, name), recipe(tmp_path, f"{name}_matched")
    objectives = [Objective(**cfg.pop("objective")) for cfg in (published, matched)]
    assert objectives[0].prompts == objectives[1].prompts
    assert [replace(each, prompts=[]) for each in objectives] == [PUBLISHED, MATCHED]
    assert published == matched


def test_g3m_is_the_published_recipe(tmp_path):
    cfg = recipe(tmp_path, "g3m")
    counts = {name: source["expected_samples"] for name, source in cfg["data"]["train"].items()}
    assert counts == {"cc3m": 2_698_118, "sbu": 828_816, "coco": 118_287}
    assert sum(counts.values()) == 3_645_221
    trainer = cfg["trainer"]
    assert cfg["data"]["batch_size"] * trainer["devices"] * trainer["num_nodes"] == 512
    assert (trainer["precision"], trainer["max_epochs"], trainer["gradient_clip_val"]) == ("16-mixed", 3, None)
    prompts = cfg["objective"]["prompts"]
    assert len(set(prompts)) == 10
    assert all(prompt.split()[-1] == "are" and prompt != cfg["model"]["prompt"] for prompt in prompts)
    assert cfg["model"]["prompt"] == "The objects in the image are"


@pytest.mark.parametrize(
    ("machines", "batches"),
    [
        (["trainer.num_nodes=1"], 4),
        (["trainer.num_nodes=2", "data.batch_size=8"], 4),
        (["trainer=fsdp", "trainer.num_nodes=1", "trainer.devices='0,1'", "trainer.precision=bf16-mixed"], 16),
        (["trainer=auto", "trainer.num_nodes=1", "trainer.devices=1", "trainer.precision=32-true"], 32),
        (["trainer.num_nodes=1", "global_batch=null"], 1),
        (["trainer.num_nodes=1", "global_batch=256"], 2),
        (["trainer.num_nodes=1", "trainer.accumulate_grad_batches=4"], 4),
    ],
)
def test_a_recipe_keeps_its_images_per_step(tmp_path, machines, batches):
    cfg = composed(tmp_path, "experiment=g3m", *machines)
    assert cfg.trainer.accumulate_grad_batches == batches
    check_settings(cfg)
    assert step_of(cfg).accumulates == (batches > 1)


@pytest.mark.parametrize(
    "machines", [["trainer.devices=3"], ["trainer.num_nodes=64"], ["trainer.accumulate_grad_batches=2"]]
)
def test_other_images_per_step_are_refused(tmp_path, machines):
    for refuses in (check_settings, description):
        with pytest.raises(UserError, match=r"^global_batch=512 is not data.batch_size=16 × \d+ ranks × .* = \d+: "):
            refuses(composed(tmp_path, "experiment=g3m", *machines))


def test_the_other_recipes_differ_from_g3m_as_published(tmp_path):
    g3m, g70m, in1k = (recipe(tmp_path, name) for name in RECIPES)
    assert sum(source["expected_samples"] for source in g70m["data"]["train"].values()) == 70_679_389
    for cfg in (g70m, in1k):
        assert all(cfg[part] == g3m[part] for part in ("model", "optim", "objective"))
    assert g70m["trainer"] == g3m["trainer"]
    assert (in1k["data"]["batch_size"], in1k["global_batch"], in1k["trainer"]["max_epochs"]) == (4, 128, 5)


@pytest.mark.parametrize(("depth", "millions"), [(6, 1783.84), (1, 771.93), (32, 7045.81)])
def test_the_published_sizes_and_what_trains(tmp_path, depth, millions):
    cfg = composed(tmp_path, "experiment=g3m", f"model.decoder.depth={depth}")
    model_config = to_dataclass(ModelConfig, cfg.model, "model")
    optim = to_dataclass(OptimConfig, cfg.optim, "optim")
    model = meta_model(model_config, None, optim.trainable)
    counts = count_parameters(model)
    assert counts["total"] / 1e6 == pytest.approx(millions, abs=0.01)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = {name.split(".")[4] for name in trained if ".resblocks." in name}
    assert blocks == {"18", "19", "20", "21", "22", "23"}
    assert {"encoder.visual.ln_post.weight", "projection.weight", "image_token", "decoder.lm.lm_head.weight"} <= trained
    assert "decoder.lm.model.embed_tokens.weight" not in trained
    assert counts["decoder"] - counts["decoder_trained"] == 32002 * 4096


def test_weight_decay_acts_as_published(tmp_path):
    cfg = composed(tmp_path, "experiment=g3m", "model.decoder.depth=1")
    optim = to_dataclass(OptimConfig, cfg.optim, "optim")
    model = meta_model(to_dataclass(ModelConfig, cfg.model, "model"), None, optim.trainable)
    optimizer, schedule = build_optimizer(model, optim, 21_360, fused=False)
    name_of = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({name_of[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert "decoder.lm.model.norm.weight" in decayed
    assert {"image_token", "encoder.visual.ln_post.weight", "decoder.lm.model.layers.0.input_layernorm.weight"} <= plain
    assert all(model.get_parameter(n).ndim < 2 for n in plain)
    factor = schedule.lr_lambdas[0]
    assert factor(0) < 1e-3
    assert factor(1999) < factor(2000) == 1.0
    assert factor(21_359) == pytest.approx(0, abs=1e-6)
    assert torch.tensor([factor(i) for i in range(2000, 21_360)]).diff().max() <= 0


def test_sources_are_read_as_one_set_and_counted(tmp_path, caplog):
    a, b = write_shards(tmp_path / "a", [3, 2]), write_shards(tmp_path / "b", [4])
    spec = {"a": {"shards": str(a), "expected_samples": 5}, "b": {"shards": str(b), "expected_samples": 6}}
    with caplog.at_level(logging.WARNING, "nxtp"):
        shards = open_set("train", spec, DataConfig())
    assert len(shards) == 9
    assert [record.getMessage() for record in caplog.records] == ["data.train.b has 4 samples; the recipe expects 6."]
    with pytest.raises(UserError, match=r"data.train.a.expected_sample'. Did you mean 'data.train.a.expected_samples'"):
        open_set("train", {"a": {"shards": str(a), "expected_sample": 5}}, DataConfig())


def test_a_difference_is_told_once_a_run(tmp_path, caplog):
    shards = write_shards(tmp_path / "a", [8])
    train = f"data.train={{a: {{shards: {shards}, expected_samples: 9}}}}"
    cfg = composed(tmp_path, *TINY_OVERRIDES, "data.batch_size=2", train)
    with caplog.at_level(logging.WARNING, "nxtp"):
        data, _ = build(cfg, tmp_path / "run")
        data.train_dataloader()
    assert sum("the recipe expects 9" in record.getMessage() for record in caplog.records) == 1
