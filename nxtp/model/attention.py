"""Where a model looks: attention of a label's tokens onto the image grid, and of image tokens onto each other.

Weights are the decoder's own, behind its softmax, of every block and head. A label is laid out alone behind the prefix,
as one-shot sampling sees it.
"""

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
    """Attention weights of each of a label's tokens onto the image tokens.

    Args:
        model: in evaluation mode.
        image: uint8 [3, S, S].
        label: token ids, without the delimiter.
        prompt: BOS and prompt token ids.

    Returns:
        float32 [blocks, heads, tokens, rows, columns]: of each block and head a token's weights on the grid of patches;
        what is missing to 1 goes to ``<|image|>``, the prompt and the label itself.

    Raises:
        UserError: the tower's tokens are no square grid.
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
    """Attention weights of image tokens onto image tokens: float32 [blocks, heads, N, N], of uint8 [3, S, S]."""
    weights = torch.stack(model.prefix_attention(image[None], prompt))[:, 0]
    count = model.num_image_tokens
    return weights[:, :, :count, :count].float().cpu()


def grid_side(count: int) -> int:
    """Patches a side of a square grid of ``count``.

    Raises:
        UserError: it is none.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise UserError(f"The encoder's {count} image tokens are no square grid: where they lie is not known.")
    return side


def average(weights: Tensor, block: int | None = None, head: int | None = None) -> Tensor:
    """One map [rows, columns] of what :func:`label_attention` gives: the mean over tokens, and over blocks and heads or
    of the one that is named (a negative number counts from the end).

    Raises:
        UserError: no such block or head.
    """
    for name, number, size in (("block", block, weights.shape[0]), ("head", head, weights.shape[1])):
        if number is not None and not -size <= number < size:
            raise UserError(f"{name} is {number}: there are {size}, from 0 on.")
    chosen = weights if block is None else weights[block][None]
    chosen = chosen if head is None else chosen[:, head][:, None]
    return chosen.mean(dim=(0, 1, 2))
