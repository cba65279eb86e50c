"""The published training step and one-shot sampling, as the paper's implementation computes them.

Sequences are padded, prefixes repeated, nothing is cached. Tests check that the results equal ours; `nxtp bench`
measures how much longer they take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nxtp.model.layout import PUBLISHED_LENGTH
from nxtp.model.model import Model
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS, first_tokens

_IGNORE = -1


def published_loss(
    model: Model,
    images: Tensor,
    labels: Sequence[Sequence[Sequence[int]]],
    *,
    prompt: Sequence[int],
    delimiter: int,
    pad_to: int = PUBLISHED_LENGTH,
) -> Tensor:
    """The loss of a published training step, float32 []; equals objective ``published``.

    Every sequence is padded to ``pad_to`` positions. Two branches go through the decoder and, at all positions,
    through the output layer: the labels, and with weight 0 a caption (here the labels as one running text).

    Args:
        images: as in :meth:`nxtp.model.model.Model.forward`.
        labels, prompt, delimiter: as in :func:`nxtp.model.layout.lay_out`.

    Raises:
        ValueError: a sequence longer than ``pad_to``.
    """
    image_tokens_BND = model.encode(images)
    captions = [[_joined(image, delimiter)[:-1]] if image else [] for image in labels]
    label_loss, caption_loss = (
        _branch_loss(model, image_tokens_BND, texts, prompt, delimiter, pad_to) for texts in (labels, captions)
    )
    return label_loss + 0.0 * caption_loss


def _joined(labels: Sequence[Sequence[int]], delimiter: int) -> list[int]:
    return [token for label in labels for token in (*label, delimiter)]


def _branch_loss(
    model: Model,
    image_tokens_BND: Tensor,
    labels: Sequence[Sequence[Sequence[int]]],
    prompt: Sequence[int],
    delimiter: int,
    pad_to: int,
) -> Tensor:
    batch, num_image_tokens, _ = image_tokens_BND.shape
    device = image_tokens_BND.device
    text = num_image_tokens + 1
    prefix = text + len(prompt)
    tokens_BT = torch.zeros(batch, pad_to, dtype=torch.long)
    targets_BT = torch.full((batch, pad_to), _IGNORE)
    mask_BTT = torch.ones(pad_to, pad_to, dtype=torch.bool).tril().repeat(batch, 1, 1)
    mask_BTT[:, :num_image_tokens, :num_image_tokens] = True
    for i, image_labels in enumerate(labels):
        tokens = [*prompt, *_joined(image_labels, delimiter)]
        end = text + len(tokens)
        if end > pad_to:
            raise ValueError(f"a sequence of {end} positions does not fit into {pad_to}")
        tokens_BT[i, text:end] = torch.tensor(tokens)
        targets_BT[i, text - 1 : end - 1] = torch.tensor(tokens)
        start = prefix
        for label in image_labels:
            stop = start + len(label) + 1
            mask_BTT[i, start:stop, prefix:start] = False
            start = stop
    embeddings = model.embed(image_tokens_BND, tokens_BT[:, text:].to(device), len(prompt))
    positions = torch.arange(pad_to, device=device)[None]
    logits_BTV = model.decoder.logits(model.decoder(embeddings, positions, mask_BTT[:, None].to(device)))
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten().to(device), ignore_index=_IGNORE)


@torch.inference_mode()
def published_one_shot(
    model: Model,
    images: Tensor,
    *,
    prompt: Sequence[int],
    delimiter: int,
    top_k: int,
    max_tokens: int = MAX_LABEL_TOKENS,
    never_first: Sequence[int] = (),
) -> Samples:
    """One-shot sampling without a cache; equals :func:`nxtp.sampling.one_shot.one_shot`, whose arguments it takes.

    The encoder runs once, the prefix once for the first tokens; then every step runs prefix and label so far
    again for each of the K labels, until all have ended. Only last positions go through the output layer.
    """
    image_tokens_BND = model.encode(images)
    batch, num_image_tokens, _ = image_tokens_BND.shape
    prompt_BQ = torch.tensor(prompt, device=images.device).expand(batch, -1)
    prefix_BPD = model.embed(image_tokens_BND, prompt_BQ, len(prompt))
    probs_BK, tokens_BK = first_tokens(last_logits(model, prefix_BPD, num_image_tokens), top_k, never_first)
    count = tokens_BK.shape[1]
    probs, tokens = probs_BK.reshape(-1, 1), tokens_BK.reshape(-1, 1)

    prefixes = prefix_BPD.repeat_interleave(count, dim=0)  # B·K sequences
    ended = tokens[:, 0] == delimiter
    while tokens.shape[1] < max_tokens and not ended.all():
        embeddings = torch.cat([prefixes, model.decoder.embed(tokens)], dim=1)
        prob, token = last_logits(model, embeddings, num_image_tokens).softmax(dim=-1).max(dim=-1)
        tokens = torch.cat([tokens, token.where(~ended, delimiter)[:, None]], dim=1)
        probs = torch.cat([probs, prob.where(~ended, 1.0)[:, None]], dim=1)
        ended = ended | (token == delimiter)
    closing = torch.full_like(tokens[:, :1], delimiter)
    tokens_BKL = torch.cat([tokens, closing], dim=1).view(batch, count, -1)
    probs_BKL = torch.cat([probs, torch.ones_like(probs[:, :1])], dim=1).view(batch, count, -1)
    return Samples.grown(tokens_BKL, probs_BKL, delimiter)


def last_logits(model: Model, embeddings_BTD: Tensor, num_image_tokens: int) -> Tensor:
    """Logits [B, V] at the last position of plain sequences: image tokens both ways, the rest causal."""
    length, device = embeddings_BTD.shape[1], embeddings_BTD.device
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:num_image_tokens, :num_image_tokens] = True
    positions = torch.arange(length, device=device)[None]
    return model.decoder.logits(model.decoder(embeddings_BTD, positions, mask[None, None])[:, -1])
