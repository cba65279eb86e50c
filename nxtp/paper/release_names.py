"""Names and RoPE order of the published implementation's parameters, and of ours."""

from __future__ import annotations

import re

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
LOGIT_SCALE = "vision_encoder.logit_scale"  # belongs to CLIP's contrastive loss


def our_name(name: str) -> str | None:
    """The name in :class:`nxtp.model.model.Model` of a released parameter (with or without ``module.``); None if unused.

    Raises:
        UserError: a name that no release has.
    """
    name = name.removeprefix("module.")
    if name == LOGIT_SCALE:
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


def their_name(name: str) -> str | None:
    """The released name, without ``module.``, of one of our parameters; None for those that no release can hold."""
    if name == "projection.weight":
        return "vision_encoder.proj.weight"
    if name.startswith("encoder.visual.") and not name.startswith("encoder.visual.trunk."):
        return "vision_encoder." + name.removeprefix("encoder.visual.")
    block = re.fullmatch(r"decoder\.lm\.model\.layers\.(\d+)\.(.+)\.weight", name)
    theirs = {ours: theirs for theirs, ours in _BLOCK.items()}
    if block and block[2] in theirs:
        return f"language_decoder.layers.{block[1]}.{theirs[block[2]]}.weight"
    rest = {f"decoder.lm.{ours}.weight": theirs for theirs, ours in _REST.items()}
    return f"language_decoder.{rest[name]}.weight" if name in rest else None


def rotary_heads(name: str, heads: int, key_heads: int) -> int | None:
    """How many heads share out the rows of our parameter ``name`` if RoPE turns them (q and k); None for others."""
    return {"q_proj": heads, "k_proj": key_heads}.get(name.removesuffix(".weight").rpartition(".")[2])


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection from interleaved RoPE pairs to halves: [heads · d, D] → the same shape."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`to_halves`."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
