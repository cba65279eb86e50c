"""Shipped encoders train; what their weights expect; the rules of the shipped decoders' tokenizers; timm's weights."""

import functools
import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from helpers import tiny_config
from huggingface_hub.utils import http_backoff
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nxtp.config import composed, conf_dir, to_dataclass
from nxtp.errors import UserError
from nxtp.inference.model_directory import read_tokenizer
from nxtp.model import encoder as encoder_module
from nxtp.model.encoder import CLIP_MEAN, CLIP_STD, Encoder, EncoderConfig
from nxtp.model.layout import lay_out
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import PROMPT, LabelTokenizer
from nxtp.model.trainable import TrainableConfig, choose_trainable

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {  # normalizer, what splits the text, special tokens, and which of them is BOS
    "SmolLM2": (None, [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
                ["<|endoftext|>"], "<|endoftext|>"),
    "Qwen3": (normalizers.NFC(), [pre_tokenizers.Split(Regex(QWEN), "isolated"),
              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], ["<|endoftext|>"], None),
    "Llama 3.2": (None, [pre_tokenizers.Split(Regex(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
                  ["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>"),
    "Gemma 3": (normalizers.Replace(" ", "▁"), [pre_tokenizers.Split(" ", "merged_with_previous")],
                ["<pad>", "<eos>", "<bos>", "<unk>"], "<bos>"),
}  # fmt: skip
LABELS = ["dog", "ice cream", "t-shirt", "747", "crème brûlée", "o'clock", "日本"]


def small_tokenizer(family: str) -> PreTrainedTokenizerFast:
    normalizer, splits, special, bos = RULES[family]
    gemma = family == "Gemma 3"
    tokenizer = Tokenizer(
        models.BPE(**({"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} if gemma else {}))
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    alphabet = [] if gemma else pre_tokenizers.ByteLevel.alphabet()
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] * gemma
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    words = [word for label in LABELS[:4] for word in label.split()]
    texts = ["▁" + w for w in [*PROMPT.split(), *words]] * gemma + ["The", *"abcdefghijklmnopqrstuvwxyz0123456789,'-▁"]
    tokenizer.train_from_iterator(texts if gemma else [PROMPT, *LABELS, ", a dog, a cat"], trainer)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(spaces) if gemma else decoders.ByteLevel()
    state = json.loads(tokenizer.to_str())  # bytes are no special tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    eos = next((token for token in special if ("e" in token and "end" in token) or token == "<eos>"), special[-1])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


@pytest.mark.parametrize("family", RULES)
def test_labels_survive_the_rules_of_a_family(tmp_path, family):
    ours = LabelTokenizer(small_tokenizer(family))
    first = RULES[family][3] or "<|endoftext|>"  # Qwen has no BOS: its documents end, and so begin, with this one
    assert ours.bos_id == ours.prompt_ids[0] == ours.tokenizer.convert_tokens_to_ids(first)
    assert ours.tokenizer.decode(ours.prompt_ids[1:]) == PROMPT
    labels = ours.encode_labels(LABELS)
    assert [ours.decode_label(ids) for ids in labels] == LABELS
    assert all(ours.delimiter_id not in ids for ids in labels)
    assert ours.tokenizer.decode([*labels[0], ours.delimiter_id]) == " dog,"
    ours.save(tmp_path)
    stored = read_tokenizer(tmp_path, PROMPT)  # a family's pattern is no hostile one
    assert (stored.prompt_ids, stored.encode_labels(LABELS)) == (ours.prompt_ids, labels)


def test_tries_to_reach_the_hub_are_quiet(caplog):
    with pytest.raises(Exception, match="refused"):
        http_backoff("HEAD", "http://127.0.0.1:9", max_retries=1, base_wait_time=0)
    assert caplog.text == ""


def unreachable(*_, **__):
    raise OSError("no hub")


def test_a_timm_tower_starts_from_a_file_or_tag(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    whole = timm.create_model("test_vit", num_classes=7)
    save_file(whole.state_dict(), tmp_path / "vit.safetensors")
    given = {"vision": {"timm_model_name": "test_vit"}, "image_size": 64}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: whole.state_dict())
    for source in (str(tmp_path / "vit.safetensors"), "r160_in1k"):
        encoder = Encoder(EncoderConfig(**given, pretrained=source, depth=2))
        stored = whole.state_dict()
        for name, tensor in encoder.visual.trunk.state_dict().items():
            assert torch.equal(tensor, stored[name]), name
    assert caplog.text == "", "timm's line has no name of the weights in a plain file"
    torch.save({"code": EncoderConfig}, tmp_path / "code.pth")
    for source, says in (
        ("r161", "Did you mean 'r160_in1k'"),
        (str(tmp_path / "code.pth"), "weights_only=True blocked"),
    ):
        with pytest.raises(UserError, match=says):
            Encoder(EncoderConfig(**given, pretrained=source))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    line = (
        r"no usable weights 'r160_in1k': no hub\. Without a hub, give a local file: model\.encoder\.pretrained=FILE\.$"
    )
    with pytest.raises(UserError, match=line):
        Encoder(EncoderConfig(**given, pretrained="r160_in1k"))
    shipped = {"vision": {"timm_model_name": "tf_efficientnet_lite0"}, "pretrained": "in1k"}
    with pytest.raises(UserError, match=r"experiments/photographs/efficientnet_lite0\.py --out FILE writes it\.$"):
        Encoder(EncoderConfig(**shipped))
    for name, says in (("hf-hub:a/b", "timm has no model"), ("hiera_tiny_224", "gives no patch tokens")):
        with torch.device("meta"), pytest.raises(UserError, match=says):
            Encoder(EncoderConfig(vision={"timm_model_name": name}))


ENCODERS = sorted(path.stem for path in (conf_dir() / "model" / "encoder").glob("*.yaml"))
THIN = {"embed_dim": 64, "num_heads": 2, "depth": 3}  # of timm's towers; a head is wide enough for rotary positions
FAST_VIT = {"embed_dims": (16, 32, 64, 64), "layers": (1, 1, 1, 1)}


def thin(monkeypatch, config: EncoderConfig) -> None:
    """The towers that are built from here on are narrow and shallow; the small ones of timm are as they are."""
    monkeypatch.setattr(encoder_module, "_probed", {})
    if config.name is not None:
        known = open_clip.get_model_config(config.name)
        known["vision_cfg"] |= {"layers": 3, "width": 64, "head_width": 32} if "width" in known["vision_cfg"] else {}
        monkeypatch.setattr(open_clip, "get_model_config", lambda _: known)
        name = known["vision_cfg"].get("timm_model_name", "")
    else:
        name = (config.vision or {}).get("timm_model_name", "")
    cut = FAST_VIT if "fastvit" in name else THIN if "vit_" in name else {}
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **cut))


KINDS = (
    "resnet18_stride8",
    "vit_tiny",
    "clip_vit_l_14",
    "siglip2_vit_b_16",
    "pe_core_b_16",
    "mobileclip2_s2",
    "dinov3_vit_b_16",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in ENCODERS])
def test_a_shipped_encoder_trains_from_its_last_blocks_on(monkeypatch, name):
    """Its real architecture and size of image with thin blocks: one step lowers the loss."""
    shipped = to_dataclass(ModelConfig, composed("train", ["name=x", f"model/encoder={name}"]).model, "model").encoder
    thin(monkeypatch, shipped)
    torch.manual_seed(0)
    model = Model(replace(tiny_config(), encoder=replace(shipped, pretrained=None)), 60).train()
    *frozen, first, last = model.encoder.blocks()
    assert sum(p.numel() for p in model.encoder.parameters()) < 5e6
    choose_trainable(model, TrainableConfig(encoder=2))
    size = model.encoder.config.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    layout = lay_out([[[11, 12], [13]], [[21]]], prompt=[1, 7], delimiter=4, num_image_tokens=model.num_image_tokens)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    loss = model(images, layout).mean
    loss.backward()
    assert all(parameter.grad is None for block in frozen for parameter in block.parameters())
    assert all(parameter.grad.isfinite().all() for block in (first, last) for parameter in block.parameters())
    assert any(parameter.grad.any() for parameter in first.parameters())  # a ResNet's branches start at 0
    optimizer.step()
    with torch.no_grad():
        assert model(images, layout).mean < loss


INCEPTION, IMAGENET = ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = (list(CLIP_MEAN), list(CLIP_STD))
SIGLIP, TIMM = {"name": "ViT-B-16-SigLIP"}, {"vision": {"timm_model_name": "test_resnet"}}
TRAINED_WITH = {
    "a tag": ({**SIGLIP, "pretrained": "webli"}, (INCEPTION, "bicubic", "squash", False)),
    "a file": ({**SIGLIP, "pretrained": "siglip.bin"}, (INCEPTION, "bicubic", "squash", False)),
    "CLIPA": ({"name": "ViT-L-14-CLIPA", "pretrained": "datacomp1b"}, (IMAGENET, "bilinear", "squash", False)),
    "OpenAI": ({"name": "ViT-B-32", "pretrained": "openai"}, (CLIP, "bicubic", "shortest", True)),
    "not OpenAI": ({"name": "ViT-B-32", "pretrained": "laion2b_e16"}, (CLIP, "bicubic", "shortest", False)),
    "no weights": ({"name": "ViT-B-32"}, (CLIP, "bicubic", "shortest", False)),
    "QuickGELU": ({"name": "ViT-B-32-quickgelu"}, (CLIP, "bicubic", "shortest", True)),
    "timm": (TIMM, (INCEPTION, "bilinear", "shortest", False)),
    "given": (
        {**TIMM, "mean": CLIP[0], "std": CLIP[1], "interpolation": "bicubic", "resize_mode": "longest"},
        (CLIP, "bicubic", "longest", False),
    ),
    "given QuickGELU": (
        {"name": "ViT-B-32", "pretrained": "openai", "quick_gelu": False}, (CLIP, "bicubic", "shortest", False),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), TRAINED_WITH.values(), ids=TRAINED_WITH)
def test_the_input_is_what_the_weights_were_trained_with(monkeypatch, given, expected):
    config = EncoderConfig(**given)
    thin(monkeypatch, config)
    with torch.device("meta"):
        encoder = Encoder(config, load_pretrained=False)
    used = encoder.config
    assert ((used.mean, used.std), used.interpolation, used.resize_mode, used.quick_gelu) == expected
    acts = {type(module).__name__ for module in encoder.visual.modules() if "GELU" in type(module).__name__}
    assert "name" not in given or acts == {"QuickGELU" if used.quick_gelu else "GELU"}
