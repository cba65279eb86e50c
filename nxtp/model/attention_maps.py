"""Where a model looks: the decoder's attention weights, after its softmax, of every block and head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nxtp.errors import UserError
from nxtp.model.layout import lay_out
from nxtp.model.model import Model


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
    _, weights, first = _attend(model, image, label, prompt, delimiter)
    return _on_grid(weights, first + 1, label, model.num_image_tokens)


def label_relevance(
    model: Model, image: Tensor, label: Sequence[int], *, prompt: Sequence[int], delimiter: int
) -> Tensor:
    """Where a label is seen: attention weights times the gradient of the label's log probability, where positive.

    Of the positions that predict the label's tokens. Raw weights rest on the background as often as on the object;
    these show what raised this label (Chefer et al., ICCV 2021, arXiv 2103.15679, equation 5, for each head).

    Args, Returns, Raises: as :func:`label_attention`; the values are ≥ 0 and have no fixed sum.
    """
    with torch.inference_mode(False), torch.enable_grad():
        hidden, weights, first = _attend(model, image.clone(), label, prompt, delimiter)
        log_probs = model.decoder.logits(hidden[0, first : first + len(label)]).log_softmax(dim=-1)
        log_prob = log_probs[range(len(label)), list(label)].sum()
        gradients = torch.autograd.grad(log_prob, weights)
    relevance = [(w * g).clamp(min=0) for w, g in zip(weights, gradients, strict=True)]
    return _on_grid(relevance, first, label, model.num_image_tokens)


def _attend(
    model: Model, image: Tensor, label: Sequence[int], prompt: Sequence[int], delimiter: int
) -> tuple[Tensor, list[Tensor], int]:
    """Hidden states and attention weights of one label, and the position that predicts its first token."""
    count = model.num_image_tokens
    layout = lay_out([[label]], prompt=prompt, delimiter=delimiter, num_image_tokens=count).to(image.device)
    with torch.no_grad():
        embeddings = model.embed(model.encode(image[None]), layout.tokens_BU, len(prompt))
    embeddings.requires_grad_(torch.is_grad_enabled())
    hidden, weights = model.decoder.attention(embeddings, layout.positions_BT, layout.mask(model.config.attention))
    return hidden, weights, count + len(prompt)


def _on_grid(weights: Sequence[Tensor], begin: int, label: Sequence[int], count: int) -> Tensor:
    """Rows ``begin`` and on, one per token of the label: [blocks, heads, tokens, rows, columns]."""
    side = grid_side(count)
    stacked = torch.stack([w.detach() for w in weights])[:, 0, :, begin : begin + len(label), :count]
    return stacked.float().unflatten(-1, (side, side)).cpu()


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
    """One map [rows, columns] of :func:`label_relevance` or :func:`label_attention`: the mean over tokens, and over
    blocks and heads or for the given one (a negative number counts from the end).

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
