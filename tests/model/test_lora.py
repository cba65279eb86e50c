"""Adapters: they start as nothing, train in place of the blocks' weights, and are merged into a plain model."""

import sys
from dataclasses import replace

import pytest
import torch
from helpers import call_nxtp, recognizer, tiny_config
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nxtp.config import to_dataclass
from nxtp.cost.memory import Step, memory
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.decoder import Decoder, DecoderConfig
from nxtp.model.lora import LoraConfig, is_adapter
from nxtp.model.meta import count_parameters, meta_model
from nxtp.model.model import Model, ModelConfig
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.train.optim import OptimConfig

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2}  # with biases, beside which there is no adapter


def config(lora: LoraConfig | None, **decoder) -> ModelConfig:
    tiny = tiny_config(**decoder)
    return replace(tiny, decoder=replace(tiny.decoder, lora=lora))


def test_adapters_start_as_nothing_and_are_merged_into_a_plain_model(tmp_path, monkeypatch):
    plain = recognizer(**QWEN2)
    adapted = Model(config(LoraConfig(r=3, alpha=5), **QWEN2), len(plain.tokenizer)).eval()
    bare = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.state_dict().items()}
    assert {name for name in bare if not is_adapter(name)} == plain.model.state_dict().keys()
    plain.model.load_state_dict({name: tensor for name, tensor in bare.items() if not is_adapter(name)})
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.prefill(images, plain.tokenizer.prompt_ids)[0]

    assert torch.equal(logits(adapted), logits(plain.model))
    assert adapted.decoder.blocks[0].self_attn.q_proj.scaling["default"] == pytest.approx(5 / 3)
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.3)
    Recognizer(adapted, plain.tokenizer, adapted.config).save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == plain.model.state_dict().keys()
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = Recognizer.from_pretrained(tmp_path / "merged", device="cpu")
    assert merged.config.decoder.lora is None
    torch.testing.assert_close(logits(merged.model), logits(adapted), rtol=1e-4, atol=1e-4)
    assert (logits(merged.model) - logits(plain.model)).abs().max() > 0.1


def test_the_same_numbers_wherever_a_model_is_filled(tmp_path):
    """A GPU is the default device while Lightning builds a module; here the meta device is, and the model a CPU's."""
    source = LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=50))
    source.save_pretrained(tmp_path)
    decoder = Decoder(DecoderConfig(source=str(tmp_path), lora=LoraConfig(r=2)), vocab_size=60)
    filled = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    with torch.device("meta"):
        decoder.fill(torch.device("cpu"))
    assert any(is_adapter(name) and tensor.any() for name, tensor in filled.items())
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, filled[name]), name


def test_adapters_train_and_the_weights_beside_them_do_not():
    model = meta_model(config(LoraConfig(target_modules=["q_proj", "down_proj"])), None)
    choose_trainable(model, TrainableConfig(encoder="none", decoder=1, embedding=False, head=False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [f"decoder.lm.model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")]
    adapters = {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    assert trained == {"projection.weight", "image_token", *adapters}
    with pytest.raises(UserError, match="trains no adapter"):
        choose_trainable(model, TrainableConfig(decoder="none"))


def test_the_forecast_has_gradients_and_moments_of_adapters_alone():
    optim = OptimConfig(trainable=TrainableConfig(embedding=False, head=False))
    counts = count_parameters(meta_model(config(LoraConfig(r=4)), None, optim.trainable))
    most = memory(config(LoraConfig(r=4)), None, optim, Step(batch=2)).most
    assert most["weights"] > 4 * counts["total"] > 4 * counts["total_trained"] == most["gradients"]
    assert most["optimizer"] == 2 * most["gradients"]
    width, inner, r = 32, 64, 4
    assert counts["decoder_trained"] == 2 * r * (4 * 2 * width + 3 * (width + inner))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 0}, "model.decoder.lora.r must be ≥ 1, got 0"),
        ({"dropout": 1.0}, "model.decoder.lora.dropout must be ≥ 0 and < 1, got 1.0"),
        ({"rank": 4}, "No key 'model.decoder.lora.rank'"),
        ({"target_modules": []}, "target_modules is empty"),
        (
            {"target_modules": ["q_proj", "qproj"]},
            "target_modules: no block has a linear layer 'qproj'. Did you mean 'q_proj'? "
            "Known: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.",
        ),
    ],
)
def test_impossible_adapters_are_one_line(lora, message):
    with torch.device("meta"), pytest.raises(UserError) as raised:
        Decoder(to_dataclass(DecoderConfig, {"config": {"num_hidden_layers": 1}, "lora": lora}, "model.decoder"))
    assert message in str(raised.value)


def test_without_peft_the_message_has_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    done = call_nxtp("describe", "+model.decoder.lora.r=4", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: model.decoder.lora needs PEFT: pip install 'nxtp[lora]'.\n")
