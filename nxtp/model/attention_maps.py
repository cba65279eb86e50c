"""Where a model looks: the decoder's attention weights, after its softmax, of every block and head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nxtp.errors import UserError
from nxtp.model.layout import lay_out
from nxtp.model.model import Model


@torch.inference_mode()
def label_attention(
    model: Model, image: Tensor, label: Sequence[int], *, prompt: Sequence[int], delimiter: int
) -> Tensor:
    """Attention weights of a label's tokens to the image tokens; the label stands alone behind the prefix.

    Args:
        model: in evaluation mode.
        image: uint8 [3, S, S].
        label: token ids, without the delimiter.
        prompt: BOS and prompt token ids.

    Returns:
        float32 [blocks, heads, tokens, rows, columns]. The rest up to 1 goes to ``<|image|>``, prompt and label.

    Raises:
        UserError: the tower's tokens do not form a square grid.
    """
    count = model.num_image_tokens
    side = grid_side(count)
    layout = lay_out([[label]], prompt=prompt, delimiter=delimiter, num_image_tokens=count).to(image.device)
    embeddings = model.embed(model.encode(image[None]), layout.tokens_BU)
    weights = torch.stack(model.decoder.attention(embeddings, layout.positions_BT, layout.mask()))[:, 0]
    begin = count + 1 + len(prompt)
    return weights[:, :, begin : begin + len(label), :count].float().unflatten(-1, (side, side)).cpu()


@torch.inference_mode()
def patch_attention(model: Model, image: Tensor, *, prompt: Sequence[int]) -> Tensor:
    """Attention weights of image tokens to image tokens: float32 [blocks, heads, N, N], of uint8 [3, S, S]."""
    weights = torch.stack(model.prefix_attention(image[None], prompt))[:, 0]
    return weights[:, :, : model.num_image_tokens, : model.num_image_tokens].float().cpu()


def grid_side(count: int) -> int:
    """Rows of a square grid of ``count`` patches.

    Raises:
        UserError: the grid is not square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"The encoder's {count} image tokens do not form a square grid, so they have no known places.")
    return side


def average(weights: Tensor, block: int | None = None, head: int | None = None) -> Tensor:
    """One map [rows, columns] of :func:`label_attention`'s weights: their mean over tokens, and over blocks and heads
    or for the given one (a negative number counts from the end).

    Raises:
        UserError: no such block or head.
    """
    for dim, (name, number) in enumerate((("block", block), ("head", head))):
        if number is not None:
            size = weights.shape[dim]
            if not -size <= number < size:
                raise UserError(f"{name} must be from {-size} to {size - 1}, got {number}.")
            weights = weights.narrow(dim, number % size, 1)
    return weights.mean(dim=(0, 1, 2))
