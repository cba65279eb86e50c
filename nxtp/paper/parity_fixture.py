"""A directory of numbers that the published implementation computed: what it holds, and the model that it is about."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nxtp.errors import UserError
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.model import Model, ModelConfig
from nxtp.paper.release import convert, read_release

SAMPLERS, RANKED = "samplers.safetensors", "ranked_labels.json"


@dataclass
class Recording:
    """What lies in a parity directory.

    ``meta``        dimensions, token ids, ``k`` and ``max_update_iter``
    ``parameters``  by released name, without ``module.``
    ``expected``    inputs and results by name, those of the samplers too; images in float32 [B, 3, S, S]
    ``ranked``      ranking → for each image ``labels`` and ``scores``; empty without ranked_labels.json
    ``spelling``    how a label's token ids are spelled there
    """

    directory: Path
    meta: dict[str, Any]
    parameters: dict[str, Tensor]
    expected: dict[str, Tensor]
    ranked: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spelling: str = ""

    @classmethod
    def read(cls, directory: Path) -> Recording:
        """
        Raises:
            UserError: no such directory, or one of its files is missing or not what it should be.
        """
        if not directory.is_dir():
            raise UserError(f"'{directory}' is not a directory.")
        for name in ("meta.json", "release_format.pth", "expected.safetensors"):
            if not (directory / name).is_file():
                raise UserError(f"'{directory}' holds no {name}: not a recording of the published implementation.")
        meta = _read_json(directory / "meta.json")
        expected = _read_tensors(directory / "expected.safetensors")
        if (directory / SAMPLERS).is_file():
            expected |= _read_tensors(directory / SAMPLERS)
        ranked = _read_json(directory / RANKED) if (directory / RANKED).is_file() else {}
        released = read_release(directory / "release_format.pth")
        parameters = {name.removeprefix("module."): tensor for name, tensor in released.items()}
        return cls(directory, meta, parameters, expected, ranked.get("ranked", {}), ranked.get("spelling", ""))

    @property
    def delimiter(self) -> int:
        return self.meta["ids"]["delimiter"]

    @property
    def prompt(self) -> list[int]:
        """BOS and prompt, without ``<|image|>`` in front."""
        return self.expected["prompt_ids"].tolist()[1:]

    def model(self) -> Model:
        """The recorded model in ours, in evaluation mode.

        Raises:
            UserError: a dimension or parameter is missing, unknown, or does not fit.
        """
        try:
            config = model_config(self.meta, self.parameters)
            heads, image_token = self.meta["decoder"]["n_heads"], self.meta["ids"]["image_token"]
            state = convert(self.parameters, heads=heads, image_token_id=image_token)
            model = Model(config, load_pretrained=False).eval()
            mismatch = model.load_state_dict(state, strict=False)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"'{self.directory / 'meta.json'}' does not describe the model: {error!r}") from error
        except RuntimeError as error:
            lines = " ".join(str(error).split())
            raise UserError(f"'{self.directory}': parameters and meta.json do not fit: {lines}") from error
        for names, what in (
            (mismatch.missing_keys, "lacks"),
            (mismatch.unexpected_keys, "has more than meta.json says:"),
        ):
            if names:
                raise UserError(f"'{self.directory / 'release_format.pth'}' {what} {', '.join(names)}.")
        return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no JSON object.")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error


def model_config(meta: dict[str, Any], parameters: dict[str, Tensor]) -> ModelConfig:
    """The recorded model's configuration; the width of its encoder's MLP is taken from the parameters."""
    tower, language = meta["encoder"], meta["decoder"]
    activation = tower.get("activation", "quickgelu")
    if activation not in ("quickgelu", "gelu"):
        raise UserError(f"meta.json: the encoder's activation is '{activation}'; known are quickgelu and gelu.")
    mlp = parameters["vision_encoder.transformer.resblocks.0.mlp.c_fc.weight"]
    vision = {
        "layers": tower["layers"],
        "width": tower["width"],
        "patch_size": tower["patch_size"],
        "head_width": tower["width"] // tower["heads"],
        "mlp_ratio": mlp.shape[0] / tower["width"],
    }
    decoder = {
        "model_type": "llama",
        "hidden_size": language["dim"],
        "intermediate_size": language["intermediate_size"],
        "num_hidden_layers": language["n_layers"],
        "num_attention_heads": language["n_heads"],
        "num_key_value_heads": language["n_heads"],
        "rms_norm_eps": language["norm_eps"],
        "rope_theta": language["rope_theta"],
        "vocab_size": language["vocab_size"],
        "pad_token_id": None,
    }
    quick_gelu = activation == "quickgelu"
    return ModelConfig(
        encoder=EncoderConfig(vision=vision, quick_gelu=quick_gelu, image_size=tower["image_size"]),
        decoder=DecoderConfig(config=decoder),
    )
