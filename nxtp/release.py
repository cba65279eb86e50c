"""Parameters of the published implementation in this project's names: RoPE pairs, fused rows, prefixes.

The published release is a pickle whose ``model`` maps ``module.<name>`` to tensors; it holds the trained
parameters only. Its decoder rotates interleaved pairs of channels, Hugging Face's rotates halves, so the
rows of q and k are permuted head by head.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from nxtp.errors import UserError

_BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_REST = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_UNUSED = ("vision_encoder.logit_scale",)  # belongs to CLIP's contrastive loss


def our_name(name: str) -> str | None:
    """The name in :class:`nxtp.model.Model` of a released parameter (with or without ``module.``); None if unused.

    Raises:
        UserError: a name that no release has.
    """
    name = name.removeprefix("module.")
    if name in _UNUSED:
        return None
    if name == "vision_encoder.proj.weight":
        return "projection.weight"
    if name.startswith("vision_encoder."):
        return "encoder.visual." + name.removeprefix("vision_encoder.")
    block = re.fullmatch(r"language_decoder\.layers\.(\d+)\.(.+)\.weight", name)
    if block and block[2] in _BLOCK:
        return f"decoder.lm.model.layers.{block[1]}.{_BLOCK[block[2]]}.weight"
    rest = re.fullmatch(r"language_decoder\.(\w+)\.weight", name)
    if rest and rest[1] in _REST:
        return f"decoder.lm.{_REST[rest[1]]}.weight"
    raise UserError(f"'{name}' is not a parameter of the published implementation.")


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection from interleaved RoPE pairs to halves: [heads · d, D] → the same shape."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def read_release(path: Path) -> dict[str, Tensor]:
    """The ``model`` of a released pickle, read without running anything in it.

    Raises:
        UserError: not such a file, or a pickle that holds more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(content["model"])
    except FileNotFoundError:
        raise UserError(f"No file '{path}'.") from None
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{path}' is not a released checkpoint ({reason}).") from error


def convert(released: dict[str, Tensor], *, heads: int, image_token_id: int) -> dict[str, Tensor]:
    """Released parameters → a state dict of :class:`nxtp.model.Model` (the part of it that the release holds).

    Args:
        heads: attention heads of the decoder (as many for keys as for queries).
        image_token_id: the vocabulary row of ``<|image|>``; it becomes the parameter ``image_token``.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in released.items():
        ours = our_name(name)
        if ours is None:
            continue
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_halves(tensor, heads)
        state[ours] = tensor
        if ours == "decoder.lm.model.embed_tokens.weight":
            state["image_token"] = tensor[image_token_id].clone()
    return state
