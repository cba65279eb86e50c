"""`nxtp bench metric`: the semantic metric against embedding each label alone, padded to 512 tokens, uncached."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from nxtp.bench.reporting import build_table, machine_description, machine_line
from nxtp.errors import UserError
from nxtp.eval.embedders import LabelEmbedder
from nxtp.eval.metrics import Scores, SemanticMatch, semantic_scores

VOCABULARY = 8_637  # distinct nouns of the published validation captions
PREDICTIONS, REFERENCES = 10, 5
ZIPF = 1.1  # the n-th most frequent word comes 1 / n^ZIPF as often as the first
PADDED = 512  # MiniLM's longest input
TOLERANCE = 1e-5
_ONSETS = ("b", "br", "c", "ch", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "v")
_RIMES: tuple[str, ...] = ("a", "ack", "all", "and", "ar", "at", "ead", "eel", "en")
_RIMES += ("er", "et", "ice", "in", "ip", "oat", "ock", "on", "ound")

Stream = list[list[str]]


def make_stream(images: int, seed: int) -> tuple[Stream, Stream]:
    """Predictions and references of each image: invented words with the frequencies of words in captions."""
    generator = np.random.default_rng(seed)
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        syllables = generator.integers(1, 4)
        parts = zip(generator.choice(_ONSETS, syllables), generator.choice(_RIMES, syllables), strict=True)
        words["".join(f"{onset}{rime}" for onset, rime in parts)] = None
    frequency = 1 / np.arange(1, VOCABULARY + 1) ** ZIPF
    frequency /= frequency.sum()
    drawn = generator.choice(np.array(list(words)), (images, PREDICTIONS + REFERENCES), p=frequency)
    return drawn[:, :PREDICTIONS].tolist(), drawn[:, PREDICTIONS:].tolist()


@torch.no_grad()
def plain_scores(embedder: LabelEmbedder, predictions: Stream, targets: Stream) -> Scores:
    """Embed every label of every image alone, padded; then compute the similarities image by image."""

    def embed(labels: Sequence[str]) -> Tensor:
        rows = []
        for label in labels:
            encoded = embedder.tokenizer(
                label, return_tensors="pt", padding="max_length", max_length=PADDED, truncation=True
            )
            states = embedder.model(**encoded).last_hidden_state[0]
            mask = encoded["attention_mask"][0, :, None]
            rows.append(normalize((states * mask).sum(dim=0) / mask.sum(), dim=0))
        return torch.stack(rows)

    scores = []
    for predicted, wanted in zip(predictions, targets, strict=True):
        cosine = embed(wanted) @ embed(predicted).T
        recall, precision = cosine.amax(dim=1).mean(), cosine.amax(dim=0).mean()
        scores.append((recall, precision, 2 * recall * precision / (recall + precision)))
    return Scores(*torch.tensor(scores).T)


def measure_metric(*, images: int, plain_images: int, seed: int) -> dict[str, Any]:
    """Both ways on the same stream, the plain one on its first images, where they agree to ``TOLERANCE``.

    Raises:
        UserError: they differ.
    """
    predictions, targets = make_stream(images, seed)
    plain_images = min(plain_images, images)
    embedder = LabelEmbedder("packaged", device="cpu")
    head = predictions[:plain_images], targets[:plain_images]
    embedder.model(**embedder.tokenizer("warm", return_tensors="pt"))
    begin = time.perf_counter()
    plain = plain_scores(embedder, *head)
    plain_seconds = time.perf_counter() - begin

    metric = SemanticMatch(embedder, top_k=PREDICTIONS)
    begin = time.perf_counter()
    for start in range(0, images, 64):
        metric.update(predictions[start : start + 64], targets[start : start + 64])
    values = metric.compute()
    seconds = time.perf_counter() - begin

    ours = semantic_scores(*head, embedder, top_k=PREDICTIONS)
    difference = max((a - b).abs().max().item() for a, b in zip(ours, plain, strict=True))
    if not difference <= TOLERANCE:
        raise UserError(f"The two ways differ by {difference:.1e}, more than {TOLERANCE:g}.")
    labels = PREDICTIONS + REFERENCES
    ours_rate, plain_rate = images * labels / seconds, plain_images * labels / plain_seconds
    return {
        "labels_per_s": ours_rate,
        "plain_labels_per_s": plain_rate,
        "labels_per_s_ratio": ours_rate / plain_rate,
        "images": images,
        "plain_images": plain_images,
        "distinct_labels": len({label for row in (*predictions, *targets) for label in row}),
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "difference": difference,
        "f1": float(values[f"f1@{PREDICTIONS}"]),
        "machine": machine_description(),
    }


def metric_table(result: dict[str, Any]) -> Table:
    plain = result["plain_images"], result["plain_seconds"], result["plain_labels_per_s"]
    rows = [
        ("ours", f"{result['images']:,}", f"{result['seconds']:.2f}", f"{result['labels_per_s']:,.0f}"),
        ("one at a time", f"{plain[0]:,}", f"{plain[1]:.2f}", f"{plain[2]:,.1f}"),
        ("ratio", "", "", f"{result['labels_per_s_ratio']:,.0f}×"),
    ]
    caption = (
        f"{PREDICTIONS} predictions and {REFERENCES} references per image, {result['distinct_labels']:,} distinct "
        f"labels of a Zipf vocabulary of {VOCABULARY:,}; scores equal to {result['difference']:.0e} on the images of "
        f"both. {machine_line(result['machine'])}"
    )
    columns = ("", "images", "seconds", "labels/s")
    return build_table("Semantic metric against one label at a time", columns, rows, caption)
