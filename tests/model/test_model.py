"""Loss against an unpacked computation, what trains, towers and decoders of every supported kind."""

import copy
import itertools
import json

import pytest
import torch
import yaml
from by_definition import one_label_at_a_time
from helpers import call_nxtp, tiny_config
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nxtp.config import composed, conf_dir, to_dataclass
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.attention_rule import ATTENTION
from nxtp.model.decoder import FAMILY, Decoder, DecoderConfig, choose_blocks, plain_config, resolve
from nxtp.model.encoder import CLIP_MEAN, CLIP_STD, Encoder, EncoderConfig
from nxtp.model.layout import MATCHED, PUBLISHED, Objective, lay_out
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import train_tokenizer
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.paper.reference import published_loss
from nxtp.sampling.one_shot import one_shot

VOCABULARY, DELIMITER, PROMPT = 60, 4, [1, 7, 8, 9]
LABELS = [[[11, 12], [13], [14, 15, 16]], [[21]], [], [[31, 31, 31], [31]]]


@pytest.fixture
def model() -> Model:
    return random_model()


def random_model(seed: int = 0, **decoder) -> Model:
    torch.manual_seed(seed)
    model = Model(tiny_config(**decoder), VOCABULARY).eval()
    with torch.no_grad():  # far from a uniform distribution
        model.decoder.lm.model.embed_tokens.weight.normal_()
        model.decoder.lm.lm_head.weight.normal_(std=0.3)
    return model


def random_images(batch: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def layout_of(model: Model, labels, objective=MATCHED):
    return lay_out(
        labels,
        prompt=PROMPT,
        delimiter=DELIMITER,
        num_image_tokens=model.num_image_tokens,
        objective=objective,
    )


def gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the loss


both = pytest.mark.parametrize("objective", [MATCHED, PUBLISHED], ids=["matched", "published"])


@both
@pytest.mark.parametrize("rows", [1, 4])
def test_a_loss_in_parts_is_the_whole_loss(model, monkeypatch, objective, rows):
    layout, images = layout_of(model, LABELS, objective), random_images(4)
    whole = model(images, layout)
    expected = gradients(model, whole.total)
    assert rows < len(layout.sources)
    monkeypatch.setattr("nxtp.model.model.LOGITS", rows * VOCABULARY)
    parts = model(images, layout)
    torch.testing.assert_close(parts.nll_S, whole.nll_S, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients(model, parts.total), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("objective", "attention"), [(MATCHED, "independent"), *((PUBLISHED, rule) for rule in ATTENTION)]
)
def test_loss_and_labels_of_one_prefix_are_those_of_two(objective, attention):
    model = random_model()
    model.config.attention = attention
    layout, images = layout_of(model, LABELS, objective), random_images(4)
    settings = {"prompt": PROMPT, "delimiter": DELIMITER, "top_k": 5}
    with torch.inference_mode():
        loss, prefilled = model.evaluate(images, layout, PROMPT)
        expected = model(images, layout)
    torch.testing.assert_close(loss.nll_S, expected.nll_S, rtol=0, atol=1e-5)
    apart, together = (one_shot(model, images, prefilled=p, **settings) for p in (None, prefilled))
    assert torch.equal(apart.tokens_BKL, together.tokens_BKL)
    torch.testing.assert_close(apart.probs_BKL, together.probs_BKL, rtol=1e-5, atol=1e-7)


def log_probs_behind(model: Model, image: torch.Tensor, label: list[int], shift: int) -> torch.Tensor:
    """One label alone behind its prefix, its positions moved on by ``shift``: log-probabilities [T, V]."""
    count = model.num_image_tokens
    embeddings = model.embed(model.encode(image), torch.tensor([PROMPT + label]), len(PROMPT))
    length, prefix = embeddings.shape[1], count + 1 + len(PROMPT)
    mask = torch.ones(length, length).tril().bool()
    mask[:count, :count] = True
    positions = torch.arange(length) + shift * (torch.arange(length) >= prefix)
    return model.decoder.logits(model.decoder(embeddings, positions[None], mask[None, None]))[0].log_softmax(-1)


def unpacked_nlls(model: Model, images: torch.Tensor, labels, objective: Objective) -> list[list[torch.Tensor]]:
    """For each image the negative log-likelihood of every supervised token, one sequence a label."""
    result = []
    prefix = model.num_image_tokens + 1 + len(PROMPT)
    for image, image_labels in zip(images.split(1), labels, strict=True):
        nlls, shift = [], 0
        alone = log_probs_behind(model, image, [], 0)
        before = alone[-1]
        if objective.supervise_prompt:
            nlls += [-alone[prefix - len(PROMPT) - 1 + i, token] for i, token in enumerate(PROMPT)]
        for label in image_labels:
            tokens = [*label, DELIMITER]
            log_probs = log_probs_behind(model, image, tokens, shift)[prefix:]
            nlls.append(-before[tokens[0]])
            nlls += [-log_probs[i, token] for i, token in enumerate(tokens[1:])]
            if objective.first_token == "delimiter":
                before = log_probs[-1]
            if objective.positions == "continued":
                shift += len(tokens)
        result.append(nlls)
    return result


PARTS = itertools.product(["parallel", "continued"], ["prompt", "delimiter"], [False, True])


@pytest.mark.parametrize("objective", [Objective(*parts) for parts in PARTS])
def test_loss_is_that_of_every_label_alone(model, objective):
    images = random_images(len(LABELS))
    loss = model(images, layout_of(model, LABELS, objective))
    expected = [nll for image in unpacked_nlls(model, images, LABELS, objective) for nll in image]
    assert loss.count == len(expected)
    plain = torch.stack(expected)
    torch.testing.assert_close(loss.nll_S.sort().values, plain.sort().values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.mean, plain.mean(), rtol=1e-5, atol=0)
    ours, theirs = gradients(model, loss.mean), gradients(model, plain.mean())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@both
def test_a_pooled_image_is_in_the_last_prompt_token_of_training_of_the_cache_and_of_the_plain_way(objective):
    plain, images = random_model(), random_images(len(LABELS))
    model = random_model()
    model.config.pool = True
    layout, count = layout_of(model, LABELS, objective), model.num_image_tokens
    with torch.inference_mode():
        tokens = model.encode(images)
        added = model.embed(tokens, layout.tokens_BU, len(PROMPT)) - plain.embed(tokens, layout.tokens_BU, len(PROMPT))
        torch.testing.assert_close(added[:, count + len(PROMPT)], tokens.mean(dim=1))
        assert added.abs().sum(dim=2).count_nonzero() == len(images), "and in no other"
        loss, prefilled = model.evaluate(images, layout, PROMPT)
        torch.testing.assert_close(loss.nll_S, model(images, layout).nll_S, rtol=0, atol=1e-5)
        labels = unpacked_nlls(model, images, LABELS, objective)
        torch.testing.assert_close(loss.mean, torch.stack([nll for image in labels for nll in image]).mean())
        assert not torch.allclose(prefilled[0], plain.prefill(images, PROMPT)[0], atol=0.1)
    settings = {"prompt": PROMPT, "delimiter": DELIMITER, "top_k": 3}
    found, expected = one_shot(model, images[:2], **settings), one_label_at_a_time(model, images[:2], **settings)
    for probs_KL, image in zip(found.probs_BKL, expected, strict=True):
        for probs, (_, known) in zip(probs_KL.tolist(), image, strict=True):
            assert probs[: len(known)] == pytest.approx(known, rel=1e-4)


def test_published_objective_is_the_published_step(model):
    images = random_images(len(LABELS))
    loss = model(images, layout_of(model, LABELS, PUBLISHED)).mean
    theirs = published_loss(model, images, LABELS, prompt=PROMPT, delimiter=DELIMITER, pad_to=40)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    ours, plain = gradients(model, loss), gradients(model, theirs)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="does not fit"):
        published_loss(model, images, LABELS, prompt=PROMPT, delimiter=DELIMITER, pad_to=29)


@both
def test_loss_does_not_depend_on_padding_or_company(model, objective):
    images = random_images(len(LABELS))
    together = model(images, layout_of(model, LABELS, objective)).total
    alone = sum(
        model(images[i : i + 1], layout_of(model, LABELS[i : i + 1], objective)).total for i in range(len(LABELS))
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    longer = [*LABELS[:-1], [*LABELS[-1], [5] * 30]]  # pads all others
    nll = [model(images[:3], layout_of(model, labels[:3], objective)).total for labels in (LABELS, longer)]
    padded = model(images, layout_of(model, longer, objective)).total
    own = model(images[3:], layout_of(model, longer[3:], objective)).total
    torch.testing.assert_close(padded - own, nll[0], rtol=1e-4, atol=1e-4)


def test_matched_labels_can_change_places(model):
    images = random_images(1)
    orders = [LABELS[0], LABELS[0][::-1]]
    first, second = (model(images, layout_of(model, [order])).nll_S.sort().values for order in orders)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_bytes_are_normalised_as_the_encoder_expects(model):
    images = random_images(2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(model.encode(images), model.encode((images / 255 - mean) / std))


def test_first_logits_are_those_of_the_whole_sequence(model):
    images = random_images(2)
    logits, _ = model.prefill(images, PROMPT)
    layout = layout_of(model, LABELS[:2])
    prefix = model.num_image_tokens + 1 + len(PROMPT)
    whole = model.decoder.logits(model.hidden(images, layout))[:, prefix - 1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


def test_hidden_states_of_real_tokens_do_not_see_padding(model):
    images = random_images(2)
    hidden = model.hidden(images, layout_of(model, LABELS[:2]))
    assert hidden.isfinite().all()
    for i in range(2):
        alone = layout_of(model, LABELS[i : i + 1])
        expected = model.hidden(images[i : i + 1], alone)[0]
        torch.testing.assert_close(hidden[i, : len(expected)], expected, rtol=1e-4, atol=1e-5)


# ---- what trains


@pytest.mark.parametrize(
    "trainable",
    [
        TrainableConfig(),
        TrainableConfig(encoder=1, embedding=False),
        TrainableConfig(encoder="none", embedding=False, decoder=1),
        TrainableConfig(encoder=0, projection=False, image_token=False, embedding=False, decoder="none", head=True),
        TrainableConfig(
            encoder="none", projection=False, image_token=True, embedding=False, decoder="none", head=False
        ),
    ],
    ids=["all", "published", "no tower", "head", "image token"],
)
def test_gradients_reach_exactly_what_trains(model, trainable):
    choose_trainable(model, trainable)
    chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    found = gradients(model.train(), model(random_images(len(LABELS)), layout_of(model, LABELS)).mean)
    assert set(found) == chosen
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    parts = {
        "encoder.visual.conv1": trainable.encoder == "all",
        "encoder.visual.transformer.resblocks.0": trainable.encoder == "all",
        "encoder.visual.transformer.resblocks.1": trainable.encoder in ("all", 1),
        "encoder.visual.ln_post": trainable.encoder in ("all", 1),
        "projection": trainable.projection,
        "image_token": trainable.image_token,
        "decoder.lm.model.embed_tokens": trainable.embedding,
        "decoder.lm.model.layers.0": trainable.decoder == "all",
        "decoder.lm.model.layers.1": trainable.decoder in ("all", 1),
        "decoder.lm.model.norm": trainable.head,
        "decoder.lm.lm_head": trainable.head,
    }
    for part, trained in parts.items():
        names = {name for name, _ in model.named_parameters() if name == part or name.startswith(f"{part}.")}
        assert names, part
        assert names <= chosen if trained else not names & chosen, part


def count_saved(model: Model, watched: dict[str, nn.Module]) -> dict[str, int]:
    """Tensors that autograd keeps for the backward pass, by the watched module that was running."""
    saved = dict.fromkeys([*watched, "elsewhere"], 0)
    running = ["elsewhere"]

    def pack(tensor):
        saved[running[-1]] += 1
        return tensor

    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        module.register_forward_hook(lambda *_: running.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.encode(random_images(2))
    return saved


def test_the_frozen_start_of_the_encoder_keeps_no_state(model):
    choose_trainable(model, TrainableConfig(encoder=1))
    visual = model.encoder.visual
    watched = {"patches": visual.conv1, "before": visual.ln_pre}
    watched |= {f"block {i}": block for i, block in enumerate(visual.transformer.resblocks)}
    saved = count_saved(model.train(), watched)
    assert saved["patches"] == saved["before"] == saved["block 0"] == 0
    assert saved["block 1"] > 0
    assert visual.transformer.resblocks[1].training
    assert not any(m.training for m in visual.transformer.resblocks[0].modules() if list(m.parameters(recurse=False)))


def test_a_frozen_encoder_keeps_no_state(model):
    choose_trainable(model, TrainableConfig(encoder="none"))
    saved = count_saved(model.train(), {"tower": model.encoder.visual})
    assert saved["tower"] == 0
    assert saved["elsewhere"] == 1, "the projection's input"
    choose_trainable(model, TrainableConfig(encoder="none", projection=False))
    assert not model.encode(random_images(2)).requires_grad


def test_a_frozen_batch_norm_does_not_move():
    config = tiny_config()
    config.encoder = EncoderConfig(vision={"timm_model_name": "test_resnet"}, image_size=64)
    model = Model(config, VOCABULARY)
    choose_trainable(model, TrainableConfig(encoder="none"))
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    assert any("running_mean" in name for name in before)
    model.train()(random_images(2, 64), layout_of(model, LABELS[:2]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.encoder.state_dict().items())
    choose_trainable(model, TrainableConfig())
    model.train()(random_images(2, 64), layout_of(model, LABELS[:2]))
    assert not all(torch.equal(before[name], tensor) for name, tensor in model.encoder.state_dict().items())


# ---- towers

VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "mlp_ratio": 2.0}
TOWERS = {
    "ViT": (VIT, 16),
    "ViT, pooled by its class token": (VIT | {"pool_type": "tok", "final_ln_after_pool": True}, 16),
    "ViT, averaged, without first norm": (VIT | {"pool_type": "avg", "no_ln_pre": True}, 16),
    "CoCa's ViT": (VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}, 16),
    "ModifiedResNet": ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 64}, 4),
    "timm ResNet": ({"timm_model_name": "test_resnet"}, 4),
    "timm ConvNeXt": ({"timm_model_name": "test_convnext"}, 4),
    "timm ViT": ({"timm_model_name": "test_vit", "timm_pool": "avg"}, 16),
}


@pytest.mark.parametrize(("vision", "tokens"), TOWERS.values(), ids=TOWERS)
def test_towers_give_patch_tokens_and_train_whole(vision, tokens):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(vision=vision, image_size=64)).train()
    out = encoder(random_images(3, 64))
    assert out.shape == (3, encoder.num_tokens, encoder.width)
    assert encoder.num_tokens == tokens
    assert out.isfinite().all()
    (out * torch.randn_like(out)).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert not without, "a parameter that the tokens do not need makes DDP wait for its gradient"
    assert encoder.blocks()


def test_what_runs_for_nothing_in_a_tower_runs_and_does_not_train():
    encoder = Encoder(EncoderConfig(vision={"timm_model_name": "hrnet_w18_small"}, image_size=64)).train()
    encoder(random_images(2, 64)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    again = Encoder(encoder.config)
    again.load_state_dict(encoder.state_dict())
    assert sum(b.is_floating_point() and b.ndim == 4 for b in again.visual.buffers()) > 0, "its weights"


@pytest.mark.parametrize(
    "wrong", [{"resize_mode": "squosh"}, {"interpolation": "nearest"}, {"mean": []}, {"std": [1.0, 1.0, 0.0]}]
)
def test_settings_of_the_input_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"model\.encoder\.(mean and )?{name}"):
        EncoderConfig(**wrong)


CUT = {"ViT": 16, "ModifiedResNet": 64, "timm ResNet": 64, "timm ConvNeXt": 64, "timm ViT": 16}


@pytest.mark.parametrize(("tower", "tokens"), CUT.items())
def test_a_tower_cut_after_its_first_blocks(tower, tokens):
    """Its tokens are the whole tower's after that block; the rest is neither computed nor stored."""
    vision = TOWERS[tower][0]
    torch.manual_seed(0)
    whole = Encoder(EncoderConfig(vision=vision, image_size=64)).eval()
    depth = len(whole.blocks()) // 2
    cut = Encoder(EncoderConfig(vision=vision, depth=depth, image_size=64)).eval()
    cut.load_state_dict({name: whole.state_dict()[name] for name in cut.state_dict()})
    images = random_images(2, 64)
    assert cut.num_tokens == tokens
    assert len(cut.blocks()) == depth
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())
    found = []
    block = whole.blocks()[depth - 1]
    block.register_forward_hook(lambda module, args, out: found.append(out))
    whole(images)
    if "ViT" not in tower:  # whose last norm follows
        torch.testing.assert_close(cut(images), found[0].flatten(2).transpose(1, 2))
    with pytest.raises(UserError, match=r"model\.encoder\.depth must be from 1 to"):
        Encoder(EncoderConfig(vision=vision, depth=99, image_size=64))


@pytest.mark.parametrize("vision", [VIT, *(TOWERS[t][0] for t in ("CoCa's ViT", "timm ResNet"))])
def test_an_encoder_starts_from_that_of_a_model_directory(tmp_path, vision, caplog):
    config = tiny_config(64)
    config.encoder = EncoderConfig(vision=vision, image_size=64)
    tokenizer = train_tokenizer(["rose"], vocab_size=400)
    model = Model(config, len(tokenizer)).eval()
    for tensor in model.encoder.state_dict().values():  # running statistics too
        if tensor.is_floating_point():
            tensor.add_(0.01)
    Recognizer(model, tokenizer, config).save_pretrained(tmp_path / "m")
    taken = Encoder(EncoderConfig(vision=vision, image_size=64, pretrained=str(tmp_path / "m"))).eval()
    with torch.no_grad():
        assert torch.equal(taken(random_images(2, 64)), model.encoder(random_images(2, 64)))
    stored = yaml.safe_load((tmp_path / "m" / "config.yaml").read_text())
    stored["model"]["encoder"] |= {"resize_mode": "squash", "mean": [0.1, 0.2, 0.3], "quick_gelu": True}
    (tmp_path / "m" / "config.yaml").write_text(yaml.safe_dump(stored))
    assert not caplog.messages
    used = Encoder(EncoderConfig(vision=vision, image_size=64, pretrained=str(tmp_path / "m"), std=[1.0] * 3)).config
    assert (used.resize_mode, used.mean, used.std) == ("squash", [0.1, 0.2, 0.3], [1.0] * 3)
    assert used.quick_gelu
    (warning,) = caplog.messages
    assert warning.startswith("model.encoder.std is [1.0, 1.0, 1.0]; ")
    config.encoder.pretrained = str(tmp_path / "m")
    Recognizer(Model(config, len(tokenizer)), tokenizer, config).save_pretrained(tmp_path / "next")
    assert str(tmp_path) not in (tmp_path / "next" / "config.yaml").read_text(), "it loads without the first directory"
    other = {**VIT, "width": 48}
    with pytest.raises(UserError, match="has another tower"):
        Encoder(EncoderConfig(vision=other, image_size=64, pretrained=str(tmp_path / "m")))
    with pytest.raises(UserError, match="can only be a model directory"):
        Encoder(EncoderConfig(vision=other, image_size=64, pretrained=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "vision", [VIT, TOWERS["CoCa's ViT"][0], TOWERS["timm ConvNeXt"][0]], ids=["ViT", "CoCa", "timm"]
)
def test_tokens_stand_in_the_order_of_the_grid(vision):
    """A change in one patch changes its own token most, so row and column are not swapped."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(vision=vision, image_size=64)).eval()
    images = random_images(1, 64)
    changed = images.clone()
    side = int(encoder.num_tokens**0.5)
    cell = 64 // side
    row, column = 0, side - 1
    changed[:, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
    with torch.no_grad():
        moved = (encoder(changed) - encoder(images)).norm(dim=-1)[0]
    assert int(moved.argmax()) == row * side + column


# ---- decoders

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_source(directory, model_type: str, shards: bool = False, **fields):
    """A random causal LM on disk, and the same in memory."""
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **FIELDS | fields)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    lm.save_pretrained(directory, max_shard_size="20KB" if shards else "5GB")
    assert (directory / "model.safetensors.index.json").exists() == shards
    return lm


def causal_logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    length = ids.shape[1]
    mask = torch.ones(length, length).tril().bool()[None, None]
    return decoder.logits(decoder(decoder.embed(ids), torch.arange(length)[None], mask))


def cut_reference(lm: nn.Module, blocks: list[int]) -> None:
    """Keep some blocks of a model of transformers."""
    config, lm.model.layers = lm.model.config, nn.ModuleList(lm.model.layers[i] for i in blocks)
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in blocks]


SOURCES = [  # every pair of kind, tie and shards
    *(("llama", False, True), ("llama", True, False), ("qwen2", False, False), ("qwen2", True, True)),
    ("gemma3_text", True, False),
]


@pytest.mark.parametrize(("model_type", "tied", "shards"), SOURCES)
def test_a_decoder_from_a_directory_is_the_source_cut(tmp_path, model_type, tied, shards):
    local = {"sliding_window_pattern": 3, "sliding_window": 10} if model_type == "gemma3_text" else {}
    lm = save_source(tmp_path, model_type, shards, tie_word_embeddings=tied, **local)
    ids = torch.randint(5, VOCABULARY, (2, 9))
    with torch.no_grad():
        whole = causal_logits(Decoder(DecoderConfig(source=str(tmp_path))).eval(), ids)
        torch.testing.assert_close(whole, lm(ids).logits, rtol=1e-4, atol=1e-5)
        choices = [({"depth": 2}, [0, 1]), ({"blocks": [0, 2]}, [0, 2]), ({"blocks": [3, 1]}, [3, 1])]
        choices += [({"depth": 2, "keep": k}, b) for k, b in (("last", [2, 3]), ("ends", [0, 3]), ("even", [0, 2]))]
        for choice, kept in choices:
            decoder = Decoder(DecoderConfig(source=str(tmp_path), **choice)).eval()
            assert decoder.kept_blocks == kept
            assert len(decoder.blocks) == 2
            reference = copy.deepcopy(lm)
            cut_reference(reference, kept)
            cut = reference(ids, use_cache=False).logits
            torch.testing.assert_close(causal_logits(decoder, ids), cut, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(cut, whole, rtol=0.1)
    head, embedding = decoder.lm.lm_head.weight, decoder.lm.model.embed_tokens.weight
    assert (head is embedding) == tied


class Eager(nn.Module):
    """A model of transformers with its eager attention, called as our decoder is, without a cache."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm, self.vocab_size = lm, lm.config.vocab_size

    def embed(self, tokens):
        return self.lm.model.embed_tokens(tokens)

    def forward(self, embeddings, positions, mask):
        added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        taken = {"inputs_embeds": embeddings, "position_ids": positions, "attention_mask": added}
        return self.lm.model(**taken, use_cache=False).last_hidden_state

    def logits(self, hidden):
        return self.lm.lm_head(hidden)


ALIKE = {"gemma3_1b", "llama_small", "qwen3_1_7b", "smollm2_360m"}  # to another one when both are narrow
SHIPPED = sorted(
    path.stem
    for path in (conf_dir() / "model" / "decoder").glob("*.yaml")
    if "config:\n" in path.read_text() and path.stem not in ALIKE
)


def narrow(name: str) -> dict:
    """The fields of a shipped decoder with six narrow blocks: its heads, norms, positions and ties."""
    fields = to_dataclass(
        ModelConfig, composed("train", ["name=x", f"model/decoder={name}"]).model, "model"
    ).decoder.config
    keys = min(fields["num_key_value_heads"], 2)
    heads = fields["num_attention_heads"] // fields["num_key_value_heads"] * keys
    kept = {k: v for k, v in fields.items() if not k.endswith("_token_id") and k != "_name_or_path"}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": VOCABULARY, "num_hidden_layers": 6}
    width = {"head_dim": 8} if "head_dim" in fields else {}
    window = {"sliding_window": 20} if "sliding_window" in fields else {}
    return kept | sizes | width | window | {"num_attention_heads": heads, "num_key_value_heads": keys}


@pytest.mark.parametrize(
    ("fields", "keep"),
    [
        *(pytest.param({"model_type": family}, "ends", id=family) for family in FAMILY),
        *(pytest.param({"model_type": "smollm3"}, keep, id=f"smollm3 {keep}") for keep in ("last", "even")),
        # the same code with other numbers than its family's
        *(pytest.param(name, "last", id=name, marks=pytest.mark.slow) for name in SHIPPED),
    ],
)
def test_every_family_and_every_shipped_decoder_is_transformers_own(tmp_path, fields, keep):
    """Cut, forward, gradient and cached sampling."""
    fields = {"head_dim": None} | narrow(fields) if isinstance(fields, str) else fields
    save_source(tmp_path, **fields)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    cut_reference(lm, choose_blocks(lm.config.num_hidden_layers, 2, keep))
    config = tiny_config()
    config.decoder = DecoderConfig(source=str(tmp_path), depth=2, keep=keep)
    model = Model(config).eval()
    reference = copy.deepcopy(model)
    reference.decoder = Eager(lm)

    images, layout = random_images(len(LABELS)), layout_of(model, LABELS)
    ours, theirs = model(images, layout), reference(images, layout)
    torch.testing.assert_close(ours.nll_S, theirs.nll_S, rtol=1e-4, atol=1e-4)
    found, expected = gradients(model, ours.mean), gradients(reference, theirs.mean)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        bound = 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=bound, msg=lambda m, n=name: f"{n}: {m}")

    options = {"prompt": PROMPT, "delimiter": DELIMITER, "top_k": 5, "max_tokens": 4}
    samples = one_shot(model, images, **options)
    for i, image in enumerate(one_label_at_a_time(reference, images, **options)):
        for j, (tokens, probs) in enumerate(image):
            assert samples.tokens_BKL[i, j, : len(tokens)].tolist() == tokens
            torch.testing.assert_close(samples.probs_BKL[i, j, : len(probs)], torch.tensor(probs), rtol=1e-3, atol=0)


def test_whatever_has_an_entry_per_block_is_cut_with_the_blocks(tmp_path):
    """By its length, not its name; also of a decoder at random, and of one that is cut again."""
    save_source(tmp_path, "smollm3", no_rope_layer_interval=2, widths=[5, 6, 7, 8])
    config = AutoConfig.from_pretrained(tmp_path)
    fields = {"model_type": "smollm3", **FIELDS, "no_rope_layers": config.no_rope_layers, "widths": config.widths}
    for where in ({"source": str(tmp_path)}, {"config": fields}):
        for keep, kept in (("first", [0, 1]), ("last", [2, 3]), ("ends", [0, 3])):
            cut, _ = resolve(DecoderConfig(**where, depth=2, keep=keep))
            assert (cut.no_rope_layers, cut.widths) == ([kept[0] % 2 ^ 1, kept[1] % 2 ^ 1], [5 + i for i in kept])
            again, _ = resolve(DecoderConfig(config=plain_config(cut), depth=1, keep="last"))
            assert (again.no_rope_layers, again.widths) == (cut.no_rope_layers[1:], cut.widths[1:])


ROPES = {
    "LLaMA-2": {"rope_type": "default", "rope_theta": 1e4},
    "Llama-3": {"rope_type": "default", "rope_theta": 5e5},
    "Llama-3.1": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def as_lightning_does(model: Model) -> Model:
    """`trainer.precision=bf16-true`: built where bfloat16 is the default, then converted."""
    plugin = HalfPrecision("bf16-true")
    with plugin.module_init_context():
        return plugin.convert_module(Model(model.config, VOCABULARY))


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to a device first": lambda model: model.to("meta").to_empty(device="cpu").bfloat16(),
    "bf16-true": as_lightning_does,
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_positions_and_pixels_are_float32_in_a_bfloat16_model(rope, cast):
    """Frequencies in bfloat16 turn a position of 300 into 299 or 301."""
    model = random_model(head_dim=128, max_position_embeddings=131072, rope_parameters=rope)
    positions, images = torch.arange(301)[None], random_images(2)
    seen = []
    model.encoder.visual.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = model.decoder.lm.model.rotary_emb(torch.ones(1), positions)
    model.encode(images)
    narrow = cast(model)
    narrow.encoder.visual.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for angles, exact in zip(narrow.decoder.lm.model.rotary_emb(torch.ones(1), positions), expected, strict=True):
        torch.testing.assert_close(angles, exact, rtol=0, atol=1e-3)
    narrow.encode(images)
    assert torch.equal(seen[-1], seen[0].bfloat16())


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_gemmas_scale_and_both_of_its_ropes_are_float32(cast):
    model = random_model(model_type="gemma3_text", head_dim=8, sliding_window_pattern=2)
    before = dict(model.decoder.lm.named_buffers())
    after = dict(cast(model).decoder.lm.named_buffers())
    assert before["model.embed_tokens.embed_scale"] == torch.tensor(32**0.5)
    assert len(before) == 5
    for name, buffer in before.items():
        torch.testing.assert_close(after[name], buffer, rtol=0, atol=0, msg=name)


def test_a_larger_vocabulary_keeps_the_source_rows(tmp_path):
    lm = save_source(tmp_path, "llama")
    decoder = Decoder(DecoderConfig(source=str(tmp_path)), VOCABULARY + 3)
    rows = decoder.lm.model.embed_tokens.weight
    assert rows.shape[0] == VOCABULARY + 3
    assert torch.equal(rows[:VOCABULARY], lm.model.embed_tokens.weight)


@pytest.mark.parametrize(("model", "depth"), [("small", 4), ("published", 3), ("open", 2)])
def test_a_source_replaces_the_decoder_of_a_recipe(tmp_path, model, depth):
    save_source(tmp_path, "qwen2", vocab_size=80)
    overrides = [f"model={model}", f"model.decoder.source={tmp_path}"]
    overrides += [f"model.decoder.depth={depth}"] if model != "small" else []
    config = to_dataclass(ModelConfig, composed("train", ["name=x", *overrides]).model, "model")
    for tokens in (None, 70):  # a source may have more rows than its tokenizer
        found, kept = resolve(config.decoder, tokens)
        assert (found.model_type, found.hidden_size, found.vocab_size) == ("qwen2", 32, 80)
        assert kept == list(range(depth))


def test_describe_looks_at_the_source(tmp_path):
    lm = save_source(tmp_path / "lm", "llama")
    tower = ["model/encoder=vit_tiny", "model.encoder.vision.layers=1"]
    done = call_nxtp("describe", "model.decoder.source=lm", *tower, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["decoder"] == sum(p.numel() for p in lm.parameters())


def test_unusable_decoders_are_one_line_errors(tmp_path, monkeypatch):
    save_source(tmp_path, "llama")
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    source = str(tmp_path)
    cases = {
        "blocks": DecoderConfig(source=source, blocks=[0, 4]),
        "Did you mean 'ends'": DecoderConfig(source=source, depth=2, keep="end"),
        "depth is 5, but '.*' has 4 blocks": DecoderConfig(source=source, depth=5, keep="even"),
        r"blocks is \[1, 1\], but '.*' has blocks 0 to 3": DecoderConfig(source=source, blocks=[1, 1]),
        "not both": DecoderConfig(source=source, blocks=[0], depth=1),
        "12 of another shape .* and 9 more": DecoderConfig(source=source, config={"intermediate_size": 40}),
        "not a LLaMA-family": DecoderConfig(config={"model_type": "gpt2"}),
        "no usable model": DecoderConfig(source=str(tmp_path / "empty")),
        "nowhere' does not exist": DecoderConfig(source=str(tmp_path / "nowhere")),
        "'runs/lm' does not exist": DecoderConfig(source="runs/lm"),
        "needs 'source'": DecoderConfig(),
        "Did you mean 'gemma3_text'": DecoderConfig(config={"model_type": "gemma3"}),
        "linear_attention": DecoderConfig(
            config={"model_type": "qwen3", **FIELDS, "layer_types": ["linear_attention"] * 4}
        ),
    }
    for says, config in cases.items():
        with pytest.raises(UserError, match=says) as caught:
            Decoder(config)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="looks back 16 tokens at most"):
        Model(tiny_config(model_type="mistral", sliding_window=16))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Decoder(DecoderConfig(source=source))
