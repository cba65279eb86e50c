"""Weight files of LLaMA and CLIP, which complete a released checkpoint: their tensors under our names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nxtp.errors import UserError
from nxtp.model.decoder import DecoderConfig, plain_config, resolve, weight_files
from nxtp.model.encoder import EncoderConfig, pretrained_tower
from nxtp.model.weights import SafetensorsFiles, Spec, Weights
from nxtp.paper.release_names import UNUSED, our_name
from nxtp.paper.rope_order import halves_from_pairs, rotated_heads
from nxtp.paper.weight_files import PickledFile, open_weights

CLIP = EncoderConfig(name="ViT-L-14", quick_gelu=True, image_size=224).filled({})  # the published encoder
_HEAD_WIDTH = 64  # of every CLIP ViT by OpenAI; a weight file does not contain it


class Entry(NamedTuple):
    """A tensor that is read when it is needed."""

    spec: Spec
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, weights: Weights, name: str) -> Entry:
        return cls(weights.specs[name], partial(weights.read, name))

    def in_halves(self, heads: int) -> Entry:
        """The same projection in Hugging Face's RoPE order."""
        return Entry(self.spec, lambda: halves_from_pairs(self.read(), heads))


def published_entries(weights: PickledFile, heads: int, key_heads: int, prefix: str = "") -> dict[str, Entry]:
    """A file's tensors in the published naming, behind ``prefix``; under our names and in Hugging Face's RoPE order.

    Raises:
        UserError: parameters that the published implementation does not have; names all of them.
    """
    entries, surplus = {}, []
    for name in weights.specs:
        theirs = prefix + name.removeprefix("module.")
        if theirs in UNUSED:
            continue
        own = our_name(theirs)
        if own is None:
            surplus.append(name)
            continue
        entry, rotated = Entry.of(weights, name), rotated_heads(own, heads, key_heads)
        entries[own] = entry if rotated is None else entry.in_halves(rotated)
    if surplus:
        raise UserError(f"'{weights.path}' has {len(surplus)} surplus parameters: {', '.join(surplus)}.")
    return entries


def read_llama(source: Path | str) -> tuple[dict[str, Any], dict[str, Entry]]:
    """LLaMA's configuration (Hugging Face's fields) and its tensors.

    Args:
        source: a Hugging Face directory with safetensors, or Meta's ``consolidated.00.pth`` with ``params.json`` beside
            it, or the directory of these two.

    Raises:
        UserError: neither of them, or damaged.
    """
    path = Path(source)
    if path.is_dir() and (path / "consolidated.00.pth").is_file() and not (path / "config.json").is_file():
        path = path / "consolidated.00.pth"
    if path.is_file():
        return _read_meta(path)
    if not path.is_dir():
        raise UserError(f"No LLaMA weights at '{source}': give a Hugging Face directory or Meta's consolidated.00.pth.")
    config, _ = resolve(DecoderConfig(source=str(path)))
    if config.model_type != "llama":
        raise UserError(f"'{source}' is a {config.model_type}; released checkpoints were trained from LLaMA.")
    weights = SafetensorsFiles(weight_files(str(path)))
    names = [name for name in weights.specs if not name.endswith("rotary_emb.inv_freq")]
    return plain_config(config), {f"decoder.lm.{name}": Entry.of(weights, name) for name in names}


def _read_meta(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    if path.with_name("consolidated.01.pth").exists():
        raise UserError(
            f"'{path.parent}' has LLaMA in several files; the published model uses the 7 B one, a single file."
        )
    settings = path.with_name("params.json")
    try:
        params = json.loads(settings.read_text())
        heads, eps = int(params["n_heads"]), float(params["norm_eps"])
        key_heads, theta = int(params.get("n_kv_heads") or heads), float(params.get("rope_theta", 10000.0))
    except FileNotFoundError:
        raise UserError(f"'{path}' needs its params.json beside it; '{settings}' is missing.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{settings}' is not LLaMA's params.json: {error!r}.") from error
    weights = PickledFile(path)
    entries = published_entries(weights, heads, key_heads, prefix="language_decoder.")
    try:
        rows, width = weights.specs["tok_embeddings.weight"].shape
        hidden = weights.specs["layers.0.feed_forward.w1.weight"].shape[0]
    except (KeyError, ValueError):
        raise UserError(f"'{path}' does not contain LLaMA's weights: tok_embeddings or layers.0 is missing.") from None
    config = llama_config(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=count_blocks(weights.specs),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        rms_norm_eps=eps,
        rope_theta=theta,
        vocab_size=rows,
    )
    return config, entries


def llama_config(**dimensions: Any) -> dict[str, Any]:
    """Hugging Face's fields of a published decoder: its ``dimensions``, and what all of them share."""
    shared = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "pad_token_id": None}
    return {"model_type": "llama", **dimensions, **shared, "bos_token_id": 1, "eos_token_id": 2}


def count_blocks(names: Iterable[str]) -> int:
    """The number of transformer blocks (``layers.N`` or ``resblocks.N``) that one tower's names have; 0 without any."""
    found = (re.search(r"\b(?:layers|resblocks)\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def read_clip(source: str) -> tuple[EncoderConfig, dict[str, Entry]]:
    """The image tower of a CLIP: its configuration, inferred from the tensors' shapes, and its tensors.

    Args:
        source: a weight file (safetensors, a PyTorch pickle, OpenAI's TorchScript archive), or an open_clip tag of
            ViT-L-14 such as ``openai``.

    Raises:
        UserError: no such file or tag, or not a CLIP vision transformer.
    """
    if Path(source).is_file():
        weights = open_weights(Path(source))
        known = ("", "visual.", "module.", "module.visual.")
        prefix = next((prefix for prefix in known if f"{prefix}conv1.weight" in weights.specs), None)
        if prefix is None:
            raise UserError(f"'{source}' is not a CLIP vision transformer: it has no visual.conv1.weight.")
        names = [name for name in weights.specs if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): Entry.of(weights, name) for name in names}
    else:
        state = pretrained_tower(replace(CLIP, pretrained=source))
        tensors = {n: Entry(Spec.of(t), partial(state.__getitem__, n)) for n, t in state.items()}
    return _encoder_config(tensors, source), {f"encoder.visual.{name}": entry for name, entry in tensors.items()}


def _encoder_config(tensors: dict[str, Entry], source: str) -> EncoderConfig:
    try:
        width, _, patch, _ = tensors["conv1.weight"].spec.shape
        positions = tensors["positional_embedding"].spec.shape[0] - 1
        mlp = tensors["transformer.resblocks.0.mlp.c_fc.weight"].spec.shape[0]
    except (KeyError, ValueError):
        raise UserError(f"'{source}' is not a CLIP vision transformer: it lacks tensors of one.") from None
    vision = {
        "layers": count_blocks(tensors),
        "width": width,
        "head_width": min(_HEAD_WIDTH, width),
        "patch_size": patch,
        "mlp_ratio": mlp / width,
    }
    return replace(CLIP, name=None, vision=vision, image_size=round(positions**0.5) * patch)
