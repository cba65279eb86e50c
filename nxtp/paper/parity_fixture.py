"""A directory of numbers that the published implementation computed, and the model that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nxtp.errors import UserError, one_line
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.model import Model, ModelConfig
from nxtp.paper.base_weights import llama_config
from nxtp.paper.release import released_entries
from nxtp.paper.weight_files import PickledFile

META, RELEASE, EXPECTED = "meta.json", "release_format.pth", "expected.safetensors"
SAMPLERS, RANKED = "samplers.safetensors", "ranked_labels.json"


@dataclass
class Recording:
    """The contents of a parity directory.

    ``meta``        dimensions, token ids, ``k`` and ``max_update_iter``
    ``released``    the model's parameters
    ``expected``    inputs and results by name, those of the samplers too; images in float32 [B, 3, S, S]
    ``ranked``      ranking → for each image ``labels`` and ``scores``; empty without ranked_labels.json
    ``spelling``    how a label's token ids are spelled there
    """

    directory: Path
    meta: dict[str, Any]
    released: PickledFile
    expected: dict[str, Tensor]
    ranked: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spelling: str = ""

    @classmethod
    def read(cls, directory: Path) -> Recording:
        """
        Raises:
            UserError: no such directory, or a file of it is missing or malformed.
        """
        if not directory.is_dir():
            raise UserError(f"'{directory}' is not a directory.")
        for name in (META, RELEASE, EXPECTED):
            if not (directory / name).is_file():
                raise UserError(f"'{directory}' has no {name}: not a recording of the published implementation.")
        expected = _read(directory / EXPECTED, load_file)
        if (directory / SAMPLERS).is_file():
            expected |= _read(directory / SAMPLERS, load_file)
        if "images" not in expected:
            raise UserError(f"'{directory / EXPECTED}' has no images: nothing can be compared.")
        ranked = _read(directory / RANKED, _json) if (directory / RANKED).is_file() else {}
        released = PickledFile(directory / RELEASE)
        meta = _read(directory / META, _json)
        return cls(directory, meta, released, expected, ranked.get("ranked", {}), ranked.get("spelling", ""))

    @property
    def delimiter(self) -> int:
        return self.meta["ids"]["delimiter"]

    @property
    def prompt(self) -> list[int]:
        """BOS and prompt, without ``<|image|>`` in front."""
        return self.expected["prompt_ids"].tolist()[1:]

    def model(self) -> Model:
        """The recorded parameters in our model, in evaluation mode.

        Raises:
            UserError: a dimension or parameter is missing, unknown, or does not fit.
        """
        try:
            heads = self.meta["decoder"]["n_heads"]
            entries = released_entries(self.released, heads, heads, self.meta["ids"]["image_token"])
            model = Model(self._config(), load_pretrained=False).eval()
            mismatch = model.load_state_dict({name: entry.read() for name, entry in entries.items()}, strict=False)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"'{self.directory / META}' does not describe the model: {error!r}") from error
        except RuntimeError as error:
            lines = one_line(error)
            raise UserError(f"'{self.directory}': parameters and {META} do not fit: {lines}") from error
        for names, what in ((mismatch.missing_keys, "lacks"), (mismatch.unexpected_keys, f"has more than {META}:")):
            if names:
                raise UserError(f"'{self.directory / RELEASE}' {what} {', '.join(names)}.")
        return model

    def _config(self) -> ModelConfig:
        """The width of the encoder's MLP is not in ``meta`` and taken from the parameters."""
        tower, language = self.meta["encoder"], self.meta["decoder"]
        activation = tower.get("activation", "quickgelu")
        if activation not in ("quickgelu", "gelu"):
            raise UserError(f"{META}: the encoder's activation must be quickgelu or gelu, got '{activation}'.")
        shapes = {name.removeprefix("module."): spec.shape for name, spec in self.released.specs.items()}
        vision = {
            "layers": tower["layers"],
            "width": tower["width"],
            "patch_size": tower["patch_size"],
            "head_width": tower["width"] // tower["heads"],
            "mlp_ratio": shapes["vision_encoder.transformer.resblocks.0.mlp.c_fc.weight"][0] / tower["width"],
        }
        decoder = llama_config(
            hidden_size=language["dim"],
            intermediate_size=language["intermediate_size"],
            num_hidden_layers=language["n_layers"],
            num_attention_heads=language["n_heads"],
            num_key_value_heads=language["n_heads"],
            rms_norm_eps=language["norm_eps"],
            rope_theta=language["rope_theta"],
            vocab_size=language["vocab_size"],
        )
        encoder = EncoderConfig(vision=vision, quick_gelu=activation == "quickgelu", image_size=tower["image_size"])
        return ModelConfig(encoder=encoder, decoder=DecoderConfig(config=decoder))


def _read(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load(path)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))
