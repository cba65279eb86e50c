"""Scoring, merging and ordering of sampled labels (paper, section 3.4 and appendix; table 8 and A.3)."""

from __future__ import annotations

import itertools
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
from nxtp.sampling.label_probability import Samples

if TYPE_CHECKING:
    from nxtp.sampling.clip import ClipSimilarity

BEST_F1 = "f1"
RANKINGS = ("prob", "ppl", "sim_mean", "sim_max", "clip", "none")
Labels = list[tuple[str, float]]


class PredictedLabel(str):
    """A label's normalised text ("great dane"); ``written`` is the text as the model wrote it ("Great Dane")."""

    written: str


def spelling(label: str) -> str:
    """A label as the model wrote it, if :func:`rank` returned it; any other text as it is."""
    return label.written if isinstance(label, PredictedLabel) else label


@dataclass
class RankingConfig:
    """How labels are scored and ordered. A label may occur several times, as other tokens of the same text.

    ``name``  prob: the product of a label's token probabilities, delimiter included; occurrences add up (in
                autoregressive text, where they do not exclude each other, the highest counts), highest first.
              ppl: the geometric mean of its token probabilities; the highest occurrence counts, highest first.
              sim_mean: mean over the label's tokens and all image tokens of sqrt(2 - 2·cosine) / 2, between embeddings
                of the label's tokens (delimiter included) and image tokens; occurrences are averaged, lowest first.
              sim_max: the highest cosine over the image tokens, averaged over the label's tokens; highest first.
              clip: CLIP similarity of image and label; highest first.
              none: in the order of sampling, score 0.
    ``clip``  for clip: ARCHITECTURE/TAG or ARCHITECTURE:FILE of open_clip, e.g. ``ViT-L-14/openai``
    ``published``  as in the published code: for ppl the lowest occurrence counts and the least likely label comes
                first; probabilities add up in autoregressive text too
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

    Occurrences of a label (other tokens, same text after case and spaces are folded) are merged; empty labels are
    skipped. Each label is a :class:`PredictedLabel`, ``written`` as its most probable occurrence.

    Args:
        decode: token ids of one label → its text.
        model, images: needed for sim and clip; images as given to the sampler.
        clip: needed for clip.

    Raises:
        ValueError: one of these is missing.
    """
    written = [
        [decode(ids[:length]) if length else "" for ids, length in zip(*image, strict=True)]
        for image in zip(samples.tokens_BKL.tolist(), samples.lengths_BK.tolist(), strict=True)
    ]
    texts = [list(map(normalise, image)) for image in written]
    if config.name == "clip":
        if images is None or clip is None:
            raise ValueError("ranking clip needs images and clip")
        scores = clip(images, texts)
    elif config.name == "none":
        scores = torch.zeros(samples.lengths_BK.shape).tolist()
    elif config.name == "prob":
        scores = samples.label_probs_BK.tolist()
    elif config.name == "ppl":  # over a label's tokens and its delimiter, which a cut label does not have
        count_BK = samples.lengths_BK + (~samples.cut_BK).int()
        scores = (samples.probs_BKL.log().sum(dim=-1) / count_BK).exp().tolist()
    else:
        if images is None or model is None:
            raise ValueError(f"ranking {config.name} needs images and model")
        value_BKL = _similarity(samples.tokens_BKL, model, images, config.name)
        index_L = torch.arange(value_BKL.shape[-1], device=value_BKL.device)
        counted_BKL = index_L <= samples.lengths_BK[..., None]
        scores = ((value_BKL * counted_BKL).sum(dim=-1) / counted_BKL.sum(dim=-1)).tolist()
    ranked = []
    for image in zip(texts, written, samples.label_probs_BK.tolist(), scores, strict=True):
        occurrences: dict[str, list[tuple[float, str, float]]] = {}
        for text, spelling, probability, score in zip(*image, strict=True):
            if text:
                occurrences.setdefault(text, []).append((probability, spelling, score))
        labels: Labels = []
        for text, found in occurrences.items():
            label = PredictedLabel(text)
            label.written = max(found)[1]
            labels.append((label, _merged([score for *_, score in found], config, samples.disjoint)))
        if config.name != "none":
            sign = 1 if config.name == "sim_mean" or (config.name == "ppl" and config.published) else -1
            labels.sort(key=lambda item: (sign * item[1], item[0]))
        ranked.append(labels[:top_k])
    return ranked


def threshold_of(value: str | float | None, ranking: RankingConfig) -> str | float | None:
    """A checked threshold for :func:`cut`: a probability, "f1", or None.

    Raises:
        UserError: something else, or the ranking gives no probabilities.
    """
    if value is None or value == BEST_F1:
        number = None
    else:
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"threshold must be a probability or {BEST_F1}, got '{value}'.") from None
        if not 0 <= number <= 1:
            raise UserError(f"threshold must be from 0 to 1, or {BEST_F1}, got {value}.")
    if value is not None and ranking.name != "prob":
        raise UserError(f"threshold needs probabilities: ranking '{ranking.name}' gives scores, use prob.")
    return value if number is None else number


def cut(labels: Labels, threshold: str | float | None) -> Labels:
    """The labels of one image that a threshold keeps.

    Args:
        labels: with their probabilities, best first.
        threshold: None keeps all; a number is the lowest probability that is kept; "f1" keeps the first n ≥ 1 labels
            with the highest 2·E[right labels kept] / (n + E[labels of the image]): F1 of expected counts, not the
            expectation of F1. Both are sums of probabilities, so these must be calibrated
            (:mod:`nxtp.inference.calibration`).
    """
    if threshold is None or not labels:
        return labels
    if threshold != BEST_F1:
        return [(label, probability) for label, probability in labels if probability >= float(threshold)]
    sums = list(itertools.accumulate(probability for _, probability in labels))
    best = max(range(len(sums)), key=lambda i: sums[i] / (i + 1 + sums[-1]))
    return labels[: best + 1]


def _merged(scores: list[float], config: RankingConfig, disjoint: bool) -> float:
    """One score for a label's occurrences."""
    if config.name == "prob" and (disjoint or config.published):
        return sum(scores)
    if config.name in ("sim_mean", "sim_max"):
        return sum(scores) / len(scores)
    return min(scores) if config.name == "ppl" and config.published else max(scores)


@torch.inference_mode()
def _similarity(tokens_BKL: Tensor, model: Model, images: Tensor, name: str) -> Tensor:
    """Of each token with the image, in the decoder's embedding space: [B, K, L]."""
    image_BND = normalize(model.encode(images.to(model.image_token.device)).float(), dim=-1)
    cosine_BKLN = normalize(model.decoder.embed(tokens_BKL).float(), dim=-1) @ image_BND[:, None].mT
    if name == "sim_max":
        return cosine_BKLN.amax(dim=-1)
    return ((2 - 2 * cosine_BKLN).clamp(min=0).sqrt() / 2).mean(dim=-1)
