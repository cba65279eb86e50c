"""Parameter names of the published implementation and of :class:`nxtp.model.model.Model`."""

from __future__ import annotations

import re
from collections.abc import Iterable

LOGIT_SCALE = "vision_encoder.logit_scale"  # of CLIP's contrastive loss
UNUSED = (LOGIT_SCALE, "language_decoder.rope.freqs")
_LAYER, _OUR_LAYER = "language_decoder.layers.*.", "decoder.lm.model.layers.*."
_NAMES = (  # theirs, ours; the first that fits counts
    ("vision_encoder.proj.weight", "projection.weight"),
    ("vision_encoder.*", "encoder.visual.*"),
    ("language_decoder.tok_embeddings.weight", "decoder.lm.model.embed_tokens.weight"),
    ("language_decoder.norm.weight", "decoder.lm.model.norm.weight"),
    ("language_decoder.output.weight", "decoder.lm.lm_head.weight"),
    (f"{_LAYER}attention.wq.weight", f"{_OUR_LAYER}self_attn.q_proj.weight"),
    (f"{_LAYER}attention.wk.weight", f"{_OUR_LAYER}self_attn.k_proj.weight"),
    (f"{_LAYER}attention.wv.weight", f"{_OUR_LAYER}self_attn.v_proj.weight"),
    (f"{_LAYER}attention.wo.weight", f"{_OUR_LAYER}self_attn.o_proj.weight"),
    (f"{_LAYER}feed_forward.w1.weight", f"{_OUR_LAYER}mlp.gate_proj.weight"),
    (f"{_LAYER}feed_forward.w2.weight", f"{_OUR_LAYER}mlp.down_proj.weight"),
    (f"{_LAYER}feed_forward.w3.weight", f"{_OUR_LAYER}mlp.up_proj.weight"),
    (f"{_LAYER}attention_norm.weight", f"{_OUR_LAYER}input_layernorm.weight"),
    (f"{_LAYER}ffn_norm.weight", f"{_OUR_LAYER}post_attention_layernorm.weight"),
)


def our_name(name: str) -> str | None:
    """The name in our model of a released parameter, given without ``module.``; None if no release has such a name."""
    return _renamed(name, _NAMES)


def their_name(name: str) -> str | None:
    """The released name, without ``module.``, of one of our parameters; None if no release has it."""
    is_timm = name.startswith("encoder.visual.trunk.")
    return None if is_timm else _renamed(name, ((ours, theirs) for theirs, ours in _NAMES))


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        match = re.fullmatch(re.escape(old).replace(r"\*", "(.+)"), name)
        if match:
            return new.replace("*", match[1]) if match.groups() else new
    return None
