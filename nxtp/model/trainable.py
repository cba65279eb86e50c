"""Which parameters are trained: the last blocks of each part, relative to its depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nxtp.errors import UserError
from nxtp.model.model import Model


@dataclass
class TrainableConfig:
    """The parts that train. Blocks are counted from the end, so a change of depth keeps its meaning.

    ``encoder``      all, none, or a number: the last blocks and what follows them (the final norm)
    ``projection``   encoder width → decoder width
    ``image_token``  the embedding of ``<|image|>``
    ``embedding``    the vocabulary's embedding (with tied weights also the output layer)
    ``decoder``      all, none, or a number of last blocks
    ``head``         the decoder's final norm and output layer
    """

    encoder: Any = "all"
    projection: bool = True
    image_token: bool = True
    embedding: bool = True
    decoder: Any = "all"
    head: bool = True


def choose_trainable(model: Model, trainable: TrainableConfig) -> None:
    """Set ``requires_grad`` throughout the model.

    Raises:
        UserError: more blocks than there are, a word that is neither 'all' nor 'none', or nothing left to train.
    """
    model.requires_grad_(False)
    lm = model.decoder.lm
    for part in _last_blocks(model.encoder.visual, model.encoder.blocks, trainable.encoder, "encoder"):
        part.requires_grad_(True)
    for part in _last_blocks(lm.model.layers, lambda: list(lm.model.layers), trainable.decoder, "decoder"):
        part.requires_grad_(True)
    model.projection.requires_grad_(trainable.projection)
    model.image_token.requires_grad_(trainable.image_token)
    if lm.config.tie_word_embeddings and trainable.embedding != trainable.head:
        raise UserError(
            "optim.trainable: the decoder ties its embedding to its output layer, so 'embedding' and 'head' must agree."
        )
    lm.model.norm.requires_grad_(trainable.head)
    lm.lm_head.requires_grad_(trainable.head)
    lm.model.embed_tokens.requires_grad_(trainable.embedding)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("optim.trainable leaves nothing to train.")


def _last_blocks(whole: nn.Module, blocks, choice: Any, name: str) -> list[nn.Module | nn.Parameter]:
    """The parts of ``whole`` that ``choice`` (all, none, or a number of last blocks) trains."""
    if choice in ("all", "none"):
        return [whole] if choice == "all" else []
    if not isinstance(choice, int) or isinstance(choice, bool) or choice < 0:
        raise UserError(f"optim.trainable.{name} is '{choice}': say all, none, or a number of last blocks.")
    found = blocks()
    if choice > len(found):
        raise UserError(f"optim.trainable.{name} asks for the last {choice} blocks of {len(found)}.")
    if choice == 0:
        return []
    # The chosen blocks, and whatever stands behind the last block in the forward order (a final norm).
    order = list(whole.modules())
    last = max(order.index(m) for m in found[-1].modules())
    behind = [
        m for m in order[last + 1 :] if not any(p is q for p in m.parameters() for b in found for q in b.parameters())
    ]
    return [*found[-choice:], *behind]
