"""The attention rule and one-shot sampling written out plainly and slowly, for the tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nxtp.model.model import Model
from nxtp.paper.reference import last_logits
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS


def allowed(query: int, key: int, segments: Sequence[int], images: int, attention: str = "independent") -> bool:
    """Whether position ``query`` may attend to position ``key``: the attention rule, word for word."""
    if attention == "causal":
        return key <= query
    if query < images and key < images:
        return True
    if attention == "prefix":
        return key <= query
    return key <= query and (segments[key] == 0 or segments[key] == segments[query])


def mask_by_definition(segments_BT: Tensor, num_image_tokens: int, attention: str = "independent") -> Tensor:
    """:func:`allowed` for every pair of every sequence: bool [B, T, T]."""
    batch, length = segments_BT.shape
    pairs = [
        [[allowed(q, k, segments, num_image_tokens, attention) for k in range(length)] for q in range(length)]
        for segments in segments_BT.tolist()
    ]
    return torch.tensor(pairs, dtype=torch.bool).view(batch, length, length)


@torch.inference_mode()
def one_label_at_a_time(
    model: Model,
    images: Tensor,
    *,
    prompt: Sequence[int],
    delimiter: int,
    top_k: int,
    max_tokens: int = MAX_LABEL_TOKENS,
    never_first: Sequence[int] = (),
) -> list[list[tuple[list[int], list[float]]]]:
    """One-shot sampling of one image, one label, one token at a time.

    Returns:
        For each image, for each first token in order of its probability: the label's tokens, with its delimiter
        unless it was cut at ``max_tokens``, and each one's probability.
    """
    result = []
    for image in images.split(1):
        image_tokens = model.encode(image)
        first = _next_token(model, image_tokens, prompt, [])
        order = [token for token in first.argsort(descending=True).tolist() if token not in never_first]
        labels = []
        for token in order[:top_k]:
            tokens, probs = [token], [first[token].item()]
            while tokens[-1] != delimiter and len(tokens) < max_tokens:
                following = _next_token(model, image_tokens, prompt, tokens)
                tokens.append(int(following.argmax()))
                probs.append(following.max().item())
            labels.append((tokens, probs))
        result.append(labels)
    return result


def _next_token(model: Model, image_tokens: Tensor, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Probabilities [V] of what follows the image tokens [1, N, D], ``<|image|>``, ``prompt`` and ``tokens``."""
    text = torch.tensor([[*prompt, *tokens]], device=image_tokens.device)
    embeddings = model.embed(image_tokens, text, len(prompt))
    return last_logits(model, embeddings, image_tokens.shape[1])[0].softmax(dim=-1)
