"""FLOPs by formula against PyTorch's operator counter, the peaks of GPUs, and what frozen blocks keep for autograd."""

import copy
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers import tiny_config
from hydra import compose, initialize_config_dir
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode

from nxtp.config import conf_dir, to_dataclass
from nxtp.errors import UserError
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.flops import Flops, ModelFlops, compute_dtype, peak_flops, training_flops
from nxtp.model.layout import MATCHED, PUBLISHED, Objective, lay_out
from nxtp.model.lora import LoraConfig
from nxtp.model.meta import count_parameters, meta_model
from nxtp.model.model import Model, ModelConfig
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.train.optim import OptimConfig

LABELS = [[(5, 6)] * 3, [(5,)] * 7, [(7, 8, 9)]]  # of three images; 9, 14 and 4 positions


def batch_layout(model: Model, objective=PUBLISHED):
    return lay_out(
        LABELS, prompt=[1] * 7, delimiter=4, num_image_tokens=model.num_image_tokens, objective=objective
    ).to("meta")


def counted(model: Model, objective: Objective = PUBLISHED) -> Flops:
    """Operator by operator, on the meta device."""
    size = model.config.encoder.image_size
    images = torch.zeros(len(LABELS), 3, size, size, device="meta")
    with FlopCounterMode(display=False) as forward:
        loss = model(images, batch_layout(model, objective)).total
    with FlopCounterMode(display=False) as backward:
        if loss.requires_grad:
            loss.backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def by_formula(model: Model, objective: Objective = PUBLISHED) -> Flops:
    layout = batch_layout(model, objective)
    return ModelFlops(model).step(*layout.segments_BT.shape, len(layout.sources))


@cache
def published(depth: int) -> Model:
    """The model of experiment g3m with ``depth`` decoder blocks, on the meta device."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        recipe = compose("train", ["experiment=g3m"])
    config = to_dataclass(ModelConfig, recipe.model, "model")
    config.decoder.source, config.decoder.depth = None, depth
    return meta_model(config, None, to_dataclass(OptimConfig, recipe.optim, "optim").trainable)


@pytest.mark.parametrize("depth", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 32))])  # both linear
def test_published_model_costs_what_the_counter_counts(depth):
    model = published(depth)
    formula, counter = by_formula(model), counted(model)
    assert formula.forward == pytest.approx(counter.forward, rel=1e-3)
    assert formula.backward == pytest.approx(counter.backward, rel=1e-3)


TRAINABLE = {
    "all": TrainableConfig(),
    "published": TrainableConfig(encoder=1, embedding=False),
    "encoder frozen": TrainableConfig(encoder="none"),
    "projection only": TrainableConfig("none", True, False, False, "none", False),
    "image token only": TrainableConfig("none", False, True, False, "none", False),
    "encoder only": TrainableConfig("all", False, False, False, "none", False),
    "head only": TrainableConfig("none", False, False, False, "none", True),
    "last decoder block only": TrainableConfig("none", False, False, False, 1, False),
    "last blocks": TrainableConfig(1, False, False, False, 1, True),
}


@pytest.mark.parametrize(
    ("trainable", "objective"),  # the objective changes what the head reads, whatever trains
    [("all", PUBLISHED), ("last blocks", PUBLISHED), *((trainable, MATCHED) for trainable in TRAINABLE)],
)
def test_only_what_trains_costs_backward(trainable, objective):
    model = meta_model(tiny_config(), None, TRAINABLE[trainable])
    formula, counter = by_formula(model, objective), counted(model, objective)
    assert formula.forward == pytest.approx(counter.forward, rel=1e-3)
    assert formula.backward == pytest.approx(counter.backward, rel=1e-3)


@pytest.mark.parametrize("trainable", ["all", "projection only", "last blocks"])
def test_adapters_cost_their_own_backward_and_none_of_the_weights_beside_them(trainable):
    config = tiny_config()
    config.decoder.lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = meta_model(config, None, replace(TRAINABLE[trainable], decoder="all"))
    formula, counter = by_formula(model), counted(model)
    assert formula.forward == pytest.approx(counter.forward, rel=1e-3)
    assert formula.backward == pytest.approx(counter.backward, rel=1e-3)


def test_a_frozen_model_costs_no_backward():
    model = meta_model(tiny_config(), None).requires_grad_(False)
    assert by_formula(model).backward == counted(model).backward == 0
    assert by_formula(model).forward == pytest.approx(counted(model).forward, rel=1e-4)  # PyTorch's counts vary


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 16},
        {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
        {"model_type": "olmo2"},
        {"model_type": "qwen2"},
    ],
)
def test_other_decoders(fields):
    config = tiny_config(**fields)
    model = meta_model(config, None, TrainableConfig())
    assert count_parameters(model) == count_parameters(Model(config, None))  # tied where they are
    assert tuple(by_formula(model)) == pytest.approx(tuple(counted(model)), rel=1e-2)


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("test_resnet", "all"),
        ("test_vit", "last blocks"),
        ("test_vit", "encoder frozen"),
        *(pytest.param("test_resnet", part, marks=pytest.mark.slow) for part in ("last blocks", "encoder frozen")),
        pytest.param("test_vit", "all", marks=pytest.mark.slow),
    ],
)
def test_towers_without_a_formula_are_counted(name, trainable):
    encoder = EncoderConfig(vision={"timm_model_name": name}, image_size=64)
    config = ModelConfig(encoder=encoder, decoder=tiny_config().decoder, vocab_size=400)
    model = meta_model(config, 400, TRAINABLE[trainable])
    formula, counter = by_formula(model), counted(model)
    assert formula.forward == pytest.approx(counter.forward, rel=1e-3)
    assert formula.backward == pytest.approx(counter.backward, rel=1e-3)


def test_counting_leaves_a_real_model_as_it_was():
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=EncoderConfig(vision={"timm_model_name": "test_resnet"}, image_size=64),
        decoder=DecoderConfig(config=tiny_config().decoder.config | {"vocab_size": 400}),
    )
    model = Model(config).train()
    before = copy.deepcopy(model.state_dict())
    assert ModelFlops(model).encoder.backward > ModelFlops(model).encoder.forward > 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.encoder.training


def test_training_flops_of_a_typical_image():
    model = published(6)
    flops = training_flops(model)
    positions, sources = 256 + 1 + 7 + 8 * 3, 1 + 8 * 2
    assert flops == ModelFlops(model).step(1, positions, sources)
    blocks = 6 * 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert ModelFlops(model).parts(1, positions, sources)["decoder"] == Flops(
        blocks * positions, 2 * blocks * positions
    )
    assert 0.87e12 < flops.forward < 0.88e12


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165.2,
    "AMD Instinct MI300X": 1307.4,
}


@pytest.mark.parametrize("name", list(PEAKS))
def test_dense_peaks_by_name(name):
    assert peak_flops(name, torch.bfloat16) == pytest.approx(PEAKS[name] * 1e12)
    assert peak_flops(name, torch.float16) == peak_flops(name, torch.bfloat16)
    assert peak_flops(name, torch.float32) < peak_flops(name, torch.bfloat16)


@pytest.mark.parametrize(
    "name", ["", "NVIDIA H20", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_an_unknown_peak_is_none(name):
    assert peak_flops(name, torch.bfloat16) is None


def test_peaks_by_type(monkeypatch):
    assert peak_flops("Tesla V100-SXM2-16GB", torch.float16) == 125e12
    assert peak_flops("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float64) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", None) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    assert peak_flops("Tesla T4", torch.float32) == 8.1e12
    names = ("16-mixed", "16-true", "bf16-mixed", "bf16-true", "32-true", "64-true", "transformer-engine")
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert [compute_dtype(name) for name in names] == [half, half, brain, brain, single, None, None]


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "Tesla V100-SXM2-16GB"]
)
def test_where_lightning_is_right_we_agree(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    theirs = get_available_flops(torch.device("cuda", 0), torch.float16)
    assert peak_flops(name, torch.float16) == pytest.approx(theirs, rel=1e-3)


def saved_by_block(model: Model) -> list[int]:
    """Tensors kept for the backward pass before the encoder's first block, in each of its blocks, and after them."""
    blocks = model.encoder.blocks()
    kept = [0] * (len(blocks) + 2)
    at = 0

    def enter(number):
        nonlocal at
        at = number

    for number, block in enumerate(blocks, start=1):
        block.register_forward_pre_hook(lambda *_, n=number: enter(n))
    blocks[-1].register_forward_hook(lambda *_: enter(len(blocks) + 1))

    def pack(tensor):
        kept[at] += 1
        return tensor

    size = model.config.encoder.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.encoder(images)
    return kept


def vit(layers: int = 4) -> Model:
    config = tiny_config(vocab_size=400)
    config.encoder.vision["layers"] = layers
    return Model(config)


def resnet() -> Model:
    encoder = EncoderConfig(vision={"timm_model_name": "test_resnet"}, image_size=64)
    return Model(ModelConfig(encoder=encoder, decoder=tiny_config(vocab_size=400).decoder))


@pytest.mark.parametrize("build", [vit, resnet])
def test_frozen_leading_blocks_keep_nothing_for_autograd(build):
    model = build()
    choose_trainable(model, TrainableConfig(encoder=2))
    before, *blocks, _ = saved_by_block(model.train())
    assert before == 0
    assert [kept > 0 for kept in blocks] == [False] * (len(blocks) - 2) + [True] * 2


@pytest.mark.parametrize("build", [vit, resnet])
def test_a_wholly_frozen_encoder_keeps_nothing(build):
    model = build()
    choose_trainable(model, TrainableConfig(encoder="none"))
    assert sum(saved_by_block(model.train())) == 0
    choose_trainable(model, TrainableConfig(encoder="all"))
    assert np.all(np.array(saved_by_block(build().train())[:-1]) > 0), "everything trained keeps something everywhere"


def test_a_torchvision_of_another_pytorch_is_named(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(UserError, match=r"^PyTorch and torchvision do not fit each other \(operator torchvision::nms"):
        meta_model(tiny_config(), 100)
