"""Parameter names of the published implementation and of :class:`nxtp.model.model.Model`."""

from __future__ import annotations

import re

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
_BLOCK_BACK = {ours: theirs for theirs, ours in _BLOCK.items()}
_REST_BACK = {ours: theirs for theirs, ours in _REST.items()}
LOGIT_SCALE = "vision_encoder.logit_scale"  # of CLIP's contrastive loss
UNUSED = (LOGIT_SCALE, "language_decoder.rope.freqs")


def our_name(name: str) -> str | None:
    """The name in our model of a released parameter, given without ``module.``; None if no release has such a name."""
    if name == "vision_encoder.proj.weight":
        return "projection.weight"
    if name.startswith("vision_encoder."):
        return "encoder.visual." + name.removeprefix("vision_encoder.")
    block = re.fullmatch(r"language_decoder\.layers\.(\d+)\.(.+)\.weight", name)
    if block and block[2] in _BLOCK:
        return f"decoder.lm.model.layers.{block[1]}.{_BLOCK[block[2]]}.weight"
    rest = re.fullmatch(r"language_decoder\.(\w+)\.weight", name)
    return f"decoder.lm.{_REST[rest[1]]}.weight" if rest and rest[1] in _REST else None


def their_name(name: str) -> str | None:
    """The released name, without ``module.``, of one of our parameters; None if no release has it."""
    if name == "projection.weight":
        return "vision_encoder.proj.weight"
    if name.startswith("encoder.visual.") and not name.startswith("encoder.visual.trunk."):
        return "vision_encoder." + name.removeprefix("encoder.visual.")
    block = re.fullmatch(r"decoder\.lm\.model\.layers\.(\d+)\.(.+)\.weight", name)
    if block and block[2] in _BLOCK_BACK:
        return f"language_decoder.layers.{block[1]}.{_BLOCK_BACK[block[2]]}.weight"
    rest = re.fullmatch(r"decoder\.lm\.(.+)\.weight", name)
    return f"language_decoder.{_REST_BACK[rest[1]]}.weight" if rest and rest[1] in _REST_BACK else None
