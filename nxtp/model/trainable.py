"""Which parameters are trained: the last blocks of each part, relative to its depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from nxtp.errors import UserError
from nxtp.model.lora import is_adapter
from nxtp.model.model import Model


@dataclass
class TrainableConfig:
    """The parts that train. Blocks are counted from the end, so the choice keeps its meaning when the depth changes.

    ``encoder``      all, none, or a number: the last blocks and what follows them (the final norm)
    ``projection``   encoder width → decoder width
    ``image_token``  the embedding of ``<|image|>``
    ``embedding``    the vocabulary's embedding (with tied weights also the output layer)
    ``decoder``      all, none, or a number of last blocks; with LoRA their adapters, and none of their weights
    ``head``         the decoder's final norm and output layer
    """

    encoder: Any = "all"
    projection: bool = True
    image_token: bool = True
    embedding: bool = True
    decoder: Any = "all"
    head: bool = True


def choose_trainable(model: Model, trainable: TrainableConfig) -> None:
    """Set ``requires_grad`` throughout the model, and training mode: Lightning sets none.

    Raises:
        UserError: more blocks than there are, a word that is neither 'all' nor 'none', or nothing left to train.
    """
    lm = model.decoder.lm
    if lm.config.tie_word_embeddings and trainable.embedding != trainable.head:
        raise UserError("optim.trainable: the decoder's embedding and output layer are tied: set 'embedding' = 'head'.")
    model.requires_grad_(False)
    layers = lm.model.layers
    for part in (
        *_last_blocks("encoder", trainable.encoder, model.encoder.visual, model.encoder.blocks),
        *_last_blocks("decoder", trainable.decoder, layers, lambda: list(layers)),
    ):
        part.requires_grad_(True)
    if model.decoder.config.lora is not None:
        for name, parameter in layers.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and is_adapter(name))
        if trainable.decoder in ("none", 0):
            raise UserError(
                "optim.trainable.decoder=none trains no adapter: set it to all, or model.decoder.lora=null."
            )
    model.projection.requires_grad_(trainable.projection)
    model.image_token.requires_grad_(trainable.image_token)
    lm.model.norm.requires_grad_(trainable.head)
    lm.lm_head.requires_grad_(trainable.head)
    lm.model.embed_tokens.requires_grad_(trainable.embedding)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("optim.trainable leaves nothing to train.")
    model.train()  # after requires_grad: what is frozen of the encoder stays in evaluation mode


def _last_blocks(name: str, choice: Any, part: nn.Module, blocks: Callable[[], list[nn.Module]]) -> list[nn.Module]:
    """The modules of ``part`` that train, by ``choice``: all, none, or a number of last blocks."""
    if choice in ("all", "none"):
        return [part] if choice == "all" else []
    if not isinstance(choice, int) or isinstance(choice, bool) or choice < 0:
        raise UserError(f"optim.trainable.{name} must be all, none, or a number of last blocks, got '{choice}'.")
    found = blocks()
    if choice > len(found):
        raise UserError(f"optim.trainable.{name} is {choice}, but there are {len(found)} blocks.")
    if choice == 0:
        return []
    # The last blocks, and the modules behind them in forward order (a final norm) that have no parameter of a block.
    order = list(part.modules())
    end = 1 + max(order.index(module) for module in found[-1].modules())
    of_blocks = {id(parameter) for block in found for parameter in block.parameters()}
    behind = [m for m in order[end:] if not any(id(p) in of_blocks for p in m.parameters())]
    return [*found[-choice:], *behind]
