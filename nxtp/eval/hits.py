"""Exact match: which predicted labels of each image are right, and the metrics that this gives."""

from __future__ import annotations

import io
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Hits:
    """Which predictions of N images are right.

    ``hits_NK``      bool, whether each of the first K predictions, best first, is among the image's labels
    ``truths_N``     int64, how many labels it has, at least 1
    ``predicted_N``  int64, how many predictions it has
    """

    hits_NK: np.ndarray
    truths_N: np.ndarray
    predicted_N: np.ndarray

    @classmethod
    def of(cls, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> Hits:
        """Of labels as :func:`nxtp.data.labels.cleaning.distinct` returns them; each image has a target."""
        predicted_N = np.array([len(labels) for labels in predictions], dtype=int)
        hits_NK = np.zeros((len(targets), predicted_N.max(initial=1)), dtype=bool)
        for row, labels, truth in zip(hits_NK, predictions, map(set, targets), strict=True):
            row[: len(labels)] = [label in truth for label in labels]
        return cls(hits_NK, np.array([len(labels) for labels in targets], dtype=int), predicted_N)

    def metric(self, name: str) -> np.ndarray | None:
        """Float64 [N]: a metric of each image; None for one that is not exact.

        Of the predictions the first k count. ``recall@k`` = hits / number of targets, ``precision@k`` = hits /
        min(k, number of predictions), 0 without predictions; ``f1@k`` = 2PR/(P+R), 0 without hits; ``hit@k`` is 1 if
        one of them is a target, else 0.
        """
        kind, _, k = name.partition("@")
        if kind not in ("recall", "precision", "f1", "hit") or not k.isdigit():
            return None
        found_N, counted_N = self.hits_NK[:, : int(k)].sum(axis=1), np.minimum(self.predicted_N, int(k))
        # F1 = 2PR/(P+R) = 2 hits / (targets + predictions)
        below = {
            "recall": self.truths_N,
            "precision": np.maximum(counted_N, 1),
            "f1": (self.truths_N + counted_N) / 2,
        }
        return found_N / below[kind] if kind in below else (found_N > 0).astype(float)

    def packed(self) -> str:
        """Base64 of a compressed .npz: about two bytes per image."""
        buffer, hits, width = io.BytesIO(), np.packbits(self.hits_NK, axis=1), np.array(self.hits_NK.shape[1])
        truths, predicted = self.truths_N.astype("u2"), self.predicted_N.astype("u2")
        np.savez_compressed(buffer, hits=hits, width=width, truths=truths, said=predicted)
        return b64encode(buffer.getvalue()).decode()

    @classmethod
    def unpacked(cls, text: str) -> Hits:
        with np.load(io.BytesIO(b64decode(text)), allow_pickle=False) as stored:
            hits_NK = np.unpackbits(stored["hits"], axis=1, count=int(stored["width"])).astype(bool)
            return cls(hits_NK, stored["truths"].astype(int), stored["said"].astype(int))
