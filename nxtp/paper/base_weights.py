"""The weights that a released checkpoint was trained from: LLaMA's and CLIP's files, under this project's names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from torch import Tensor

from nxtp.errors import UserError, nearest
from nxtp.model.decoder import DecoderConfig, plain_config, resolve, weight_files
from nxtp.model.encoder import EncoderConfig, pretrained_tower
from nxtp.model.weights import PickledFile, SafetensorsFiles, Spec, Weights, open_weights
from nxtp.paper.release_names import our_name, rotary_heads, to_halves

CLIP = EncoderConfig(name="ViT-L-14", quick_gelu=True, image_size=224)  # the published encoder
_HEAD_WIDTH = 64  # of every CLIP ViT that OpenAI published; a weight file does not say it


class Entry(NamedTuple):
    """A tensor to be read when it is needed."""

    spec: Spec
    read: Callable[[], Tensor]


def read_llama(source: Path | str) -> tuple[dict[str, Any], dict[str, Entry]]:
    """LLaMA's configuration (fields of Hugging Face's) and its tensors, from either form in which it is given out.

    Args:
        source: a Hugging Face directory with safetensors, Meta's ``consolidated.00.pth`` with ``params.json`` beside
            it, or the directory of those two.

    Raises:
        UserError: neither of them, or damaged.
    """
    path = Path(source)
    if path.is_dir() and (path / "consolidated.00.pth").is_file() and not (path / "config.json").is_file():
        path = path / "consolidated.00.pth"
    if path.is_file():
        return _read_meta(path)
    if not path.is_dir():
        raise UserError(f"No LLaMA weights at '{source}': a Hugging Face directory or Meta's consolidated.00.pth.")
    config, _ = resolve(DecoderConfig(source=str(path)))
    if config.model_type != "llama":
        raise UserError(f"'{source}' is a {config.model_type}; released checkpoints were trained from LLaMA.")
    weights = SafetensorsFiles(weight_files(str(path)))
    entries = {f"decoder.lm.{name}": _entry(weights, name) for name in weights.specs}
    return plain_config(config), {name: e for name, e in entries.items() if not name.endswith("rotary_emb.inv_freq")}


def _read_meta(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    if path.with_name("consolidated.01.pth").exists():
        raise UserError(
            f"'{path.parent}' holds a LLaMA split over several files; the published model uses the 7 B one."
        )
    settings = path.with_name("params.json")
    try:
        params = json.loads(settings.read_text())
        heads = int(params["n_heads"])
        eps = float(params["norm_eps"])
    except FileNotFoundError:
        raise UserError(f"'{path}' needs its params.json beside it; '{settings}' is missing.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{settings}' is not LLaMA's params.json: {error!r}.") from error
    weights = PickledFile(path, keys=())
    key_heads = int(params.get("n_kv_heads") or heads)
    entries: dict[str, Entry] = {}
    for name, spec in weights.specs.items():
        if name == "rope.freqs":
            continue
        ours = our_name(f"language_decoder.{name}")
        count = rotary_heads(ours, heads, key_heads)
        if count is None:
            entries[ours] = _entry(weights, name)
        else:
            entries[ours] = Entry(spec, lambda name=name, count=count: to_halves(weights.read(name), count))
    try:
        rows, width = weights.specs["tok_embeddings.weight"].shape
        hidden = weights.specs["layers.0.feed_forward.w1.weight"].shape[0]
    except (KeyError, ValueError):
        raise UserError(f"'{path}' does not hold LLaMA's weights: tok_embeddings or layers.0 is missing.") from None
    blocks = {int(m[1]) for name in weights.specs if (m := re.match(r"layers\.(\d+)\.", name))}
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": eps,
        "rope_theta": float(params.get("rope_theta", 10000.0)),
        "vocab_size": rows,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return config, entries


def read_clip(source: str) -> tuple[EncoderConfig, dict[str, Entry]]:
    """The image tower of a CLIP: its configuration, inferred from the tensors' shapes, and the tensors.

    Args:
        source: a weight file (safetensors, a PyTorch pickle, OpenAI's TorchScript archive), or an open_clip tag of
            ViT-L-14 such as ``openai``.

    Raises:
        UserError: no such file or tag, or not a CLIP vision transformer.
    """
    if Path(source).is_file():
        weights = open_weights(Path(source))
        found = [re.fullmatch(r"((?:module\.)?(?:visual\.)?)conv1\.weight", name) for name in weights.specs]
        prefix = next((match[1] for match in found if match), None)
        if prefix is None:
            raise UserError(f"'{source}' is not a CLIP vision transformer: it has no visual.conv1.weight.")
        tensors = {
            name.removeprefix(prefix): _entry(weights, name) for name in weights.specs if name.startswith(prefix)
        }
    else:
        tags = open_clip.list_pretrained_tags_by_model(CLIP.name)
        if source not in tags:
            raise UserError(f"'{source}' is neither a file nor an open_clip tag of {CLIP.name}.{nearest(source, tags)}")
        state = pretrained_tower(replace(CLIP, pretrained=source))
        tensors = {
            name: Entry(Spec(tuple(t.shape), t.dtype), lambda name=name: state[name]) for name, t in state.items()
        }
    return _encoder_config(tensors, source), {f"encoder.visual.{name}": entry for name, entry in tensors.items()}


def _encoder_config(tensors: dict[str, Entry], source: str) -> EncoderConfig:
    try:
        width, _, patch, _ = tensors["conv1.weight"].spec.shape
        positions = tensors["positional_embedding"].spec.shape[0] - 1
        mlp = tensors["transformer.resblocks.0.mlp.c_fc.weight"].spec.shape[0]
    except (KeyError, ValueError):
        raise UserError(f"'{source}' is not a CLIP vision transformer: its tensors are not those of one.") from None
    layers = {int(m[1]) for name in tensors if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    vision = {
        "layers": max(layers) + 1,
        "width": width,
        "head_width": min(_HEAD_WIDTH, width),
        "patch_size": patch,
        "mlp_ratio": mlp / width,
    }
    return replace(CLIP, name=None, vision=vision, image_size=round(positions**0.5) * patch)


def _entry(weights: Weights, name: str) -> Entry:
    return Entry(weights.specs[name], lambda: weights.read(name))
