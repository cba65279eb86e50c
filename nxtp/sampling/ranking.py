"""Scoring, merging and ordering of sampled labels (paper, section 3.4 and appendix; table 8 and A.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nxtp.config import to_dataclass
from nxtp.data.labels.cleaning import normalise
from nxtp.errors import UserError, nearest
from nxtp.model.model import Model
from nxtp.sampling.one_shot import Samples

if TYPE_CHECKING:
    from nxtp.sampling.clip import ClipSimilarity

RANKINGS = ("prob", "ppl", "sim_mean", "sim_max", "clip", "none")
Labels = list[tuple[str, float]]


@dataclass
class RankingConfig:
    """How labels are ordered, and what their score is.

    ``name``  prob: the product of a label's token probabilities, delimiter included; occurrences of the same text add
                up (in running text, where they are not exclusive, the highest counts), the highest first.
              ppl: the geometric mean of its token probabilities; the highest occurrence counts, the highest first.
              sim_mean: mean over the label's tokens and all image tokens of sqrt(2 - 2·cosine) / 2, between embeddings
                of the label's tokens (delimiter included) and image tokens; occurrences are averaged, the lowest first.
              sim_max: the highest cosine over the image tokens, averaged over the label's tokens; the highest first.
              clip: CLIP similarity of image and label; the highest first.
              none: in the order of sampling, score 0.
    ``clip``  for clip: ARCHITECTURE/TAG or ARCHITECTURE:FILE of open_clip, e.g. ``ViT-L-14/openai``
    ``published``  as the published code has it: of ppl the lowest occurrence counts and the least likely label comes
                first; probabilities add up in running text too
    """

    name: str = "prob"
    clip: str = "ViT-L-14/openai"
    published: bool = False


def ranking_config(choice: str | Mapping[str, Any] | RankingConfig = "prob") -> RankingConfig:
    """A ranking's configuration from its name, from ``{"name": …, settings}``, or as it is.

    Raises:
        UserError: an unknown ranking or setting; names the nearest.
    """
    if not isinstance(choice, RankingConfig):
        choice = to_dataclass(RankingConfig, {"name": choice} if isinstance(choice, str) else dict(choice), "ranking")
    if choice.name not in RANKINGS:
        raise UserError(f"No ranking '{choice.name}'.{nearest(choice.name, RANKINGS)} Known: {', '.join(RANKINGS)}.")
    return choice


def rank(
    samples: Samples,
    decode: Callable[[Sequence[int]], str],
    config: RankingConfig,
    top_k: int,
    *,
    model: Model | None = None,
    images: Tensor | None = None,
    clip: ClipSimilarity | None = None,
) -> list[Labels]:
    """Samples → for each image at most ``top_k`` labels with their scores, best first.

    A label that came out several times (other tokens, same text once case and spaces are folded) is merged. Empty
    labels are left out.

    Args:
        decode: token ids of one label → its text.
        model, images: needed for sim and clip; images as given to the sampler.
        clip: for clip; made once and kept by the caller.
    """
    texts = _texts(samples, decode)
    if config.name == "clip":
        scores = clip(images, texts)
    elif config.name == "none":
        scores = torch.zeros(samples.lengths_BK.shape).tolist()
    elif config.name == "prob":
        scores = samples.scores_BK.tolist()
    elif config.name == "ppl":
        counted = _written(samples)
        log_BK = (samples.probs_BKL.log() * counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
        scores = log_BK.exp().tolist()
    else:
        scores = _similarity(samples, model, images, config.name).tolist()
    merge, descending = _RULES[config.name]
    if config.name == "ppl" and config.published:
        merge, descending = min, False
    if config.name == "prob" and not samples.disjoint and not config.published:
        merge = max
    ranked = []
    for image_texts, image_scores in zip(texts, scores, strict=True):
        occurrences: dict[str, list[float]] = {}
        for text, score in zip(image_texts, image_scores, strict=True):
            if text:
                occurrences.setdefault(text, []).append(score)
        merged = {text: merge(values) for text, values in occurrences.items()}
        if config.name == "none":
            order = list(merged.items())
        else:
            order = sorted(merged.items(), key=lambda item: (-item[1] if descending else item[1], item[0]))
        ranked.append(order[:top_k])
    return ranked


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Ranking → how occurrences of one text become one score, and whether the highest is best.
_RULES: dict[str, tuple[Callable[[Sequence[float]], Any], bool]] = {
    "prob": (sum, True),
    "ppl": (max, True),
    "sim_mean": (_mean, False),
    "sim_max": (_mean, True),
    "clip": (max, True),
    "none": (lambda values: values[0], True),
}


def _texts(samples: Samples, decode: Callable[[Sequence[int]], str]) -> list[list[str]]:
    tokens, lengths = samples.tokens_BKL.tolist(), samples.lengths_BK.tolist()
    return [
        [normalise(decode(ids[:length])) if length else "" for ids, length in zip(*image, strict=True)]
        for image in zip(tokens, lengths, strict=True)
    ]


def _written(samples: Samples) -> Tensor:
    """1.0 for a label's tokens and its delimiter, 0.0 behind: [B, K, L]. A cut label has no delimiter of its own."""
    index_L = torch.arange(samples.tokens_BKL.shape[-1], device=samples.lengths_BK.device)
    return (index_L < (samples.lengths_BK + (~samples.cut_BK).int())[..., None]).to(samples.probs_BKL.dtype)


@torch.inference_mode()
def _similarity(samples: Samples, model: Model, images: Tensor, name: str) -> Tensor:
    """[B, K], in the decoder's embedding space."""
    image_BND = normalize(model.encode(images.to(model.image_token.device)).float(), dim=-1)
    label_BKLD = normalize(model.decoder.embed(samples.tokens_BKL).float(), dim=-1)
    cosine_BKLN = label_BKLD @ image_BND[:, None].mT
    if name == "sim_max":
        value_BKL = cosine_BKLN.amax(dim=-1)
    else:
        value_BKL = ((2 - 2 * cosine_BKLN).clamp(min=0).sqrt() / 2).mean(dim=-1)
    index_L = torch.arange(value_BKL.shape[-1], device=value_BKL.device)
    counted_BKL = index_L <= samples.lengths_BK[..., None]
    return (value_BKL * counted_BKL).sum(dim=-1) / counted_BKL.sum(dim=-1)
