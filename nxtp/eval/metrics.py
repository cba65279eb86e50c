"""How good predicted labels are: exact match, and semantic match with a text encoder (torchmetrics).

:func:`exact_scores` and :func:`semantic_scores` compute one row per image; the metrics average over images. Their
states are sums, so several ranks with uneven batches give the same means as one process.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric

from nxtp.config import instantiated
from nxtp.data.labels.cleaning import distinct
from nxtp.errors import UserError, at_least
from nxtp.eval.embedders import TextEmbedder, full_precision

HIT_CUTS = (1, 5)
_LABEL_HASHES = 1 << 16  # few labels are counted exactly
_IMAGES_AT_ONCE = 256  # bounds the memory of the padded similarity computation


class Scores(NamedTuple):
    """One row per image, float32 [B] each, on the CPU; NaN for an image without targets."""

    recall: Tensor
    precision: Tensor
    f1: Tensor


def semantic_scores(
    predictions: Sequence[Sequence[str]],
    targets: Sequence[Sequence[str]],
    embedder: TextEmbedder,
    *,
    top_k: int | None = 10,
) -> Scores:
    """Soft recall, precision and F1 of each image (arXiv 2312.02142, section 4.1).

    The cosine between a target and a prediction measures their match: recall is the mean over targets of the best
    match, precision the mean over predictions, F1 = 2PR/(P+R). Where P and R differ in sign (cosines may be
    negative) the harmonic mean has no meaning and F1 is 0. Labels are not normalised, duplicates count as often as
    they occur, and no predictions count as the one prediction "".

    Args:
        predictions: labels of B images, best first; the first ``top_k`` count (None: all).
        targets: reference labels of B images. An image without any gets NaN.
    """
    _check(predictions, targets, top_k)
    predictions = [list(labels)[:top_k] or [""] for labels in predictions]
    scored = [i for i, labels in enumerate(targets) if labels]
    result = torch.full((3, len(targets)), torch.nan)
    if not scored:
        return Scores(*result)
    distinct = list(dict.fromkeys(chain.from_iterable(chain(predictions[i], targets[i]) for i in scored)))
    row = {label: i for i, label in enumerate(distinct)}
    embeddings_UD = embedder.embed(distinct)
    device = embeddings_UD.device
    for begin in range(0, len(scored), _IMAGES_AT_ONCE):
        chosen = scored[begin : begin + _IMAGES_AT_ONCE]
        target_BM, has_target_BM = _padded([[row[x] for x in targets[i]] for i in chosen], device)
        predicted_BN, has_predicted_BN = _padded([[row[x] for x in predictions[i]] for i in chosen], device)
        with full_precision(device):
            cosine_BMN = embeddings_UD[target_BM] @ embeddings_UD[predicted_BN].mT
        recall_B = _best_match(cosine_BMN, has_target_BM, has_predicted_BN)
        precision_B = _best_match(cosine_BMN.mT, has_predicted_BN, has_target_BM)
        product_B = recall_B * precision_B
        f1_B = torch.where(product_B > 0, 2 * product_B / (recall_B + precision_B), 0.0)
        result[:, chosen] = torch.stack([recall_B, precision_B, f1_B]).float().cpu()
    return Scores(*result)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index lists of uneven length → int64 [B, longest], filled with 0, and bool [B, longest], True where real."""
    indices = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, padding_value=-1).to(device)
    return indices.clamp(min=0), indices >= 0


def _best_match(cosine_BXY: Tensor, real_BX: Tensor, real_BY: Tensor) -> Tensor:
    """[B]: mean over the real x of the highest cosine with a real y."""
    best_BX = cosine_BXY.masked_fill(~real_BY[:, None, :], -torch.inf).amax(dim=-1)
    return best_BX.masked_fill(~real_BX, 0.0).sum(dim=-1) / real_BX.sum(dim=-1)


def exact_scores(
    predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], *, top_k: int | None = 10
) -> Scores:
    """Recall@k, precision@k and F1@k of each image, on normalised labels (:func:`nxtp.data.labels.cleaning.normalise`).

    Labels of equal normalised text count once, empty ones do not count. Of the predictions the first k count:
    recall = hits / number of targets, precision = hits / min(k, number of predictions), 0 without predictions;
    F1 = 2PR/(P+R), 0 without hits.

    Arguments as of :func:`semantic_scores`.
    """
    _check(predictions, targets, top_k)
    rows = []
    for predicted, wanted in zip(predictions, targets, strict=True):
        found, truth = distinct(predicted)[:top_k], set(distinct(wanted))
        hits, total = len(truth.intersection(found)), len(truth) + len(found)
        # F1 = 2PR/(P+R) = 2 hits / (targets + predictions)
        scores = (hits / len(truth), hits / max(len(found), 1), 2 * hits / total) if truth else (torch.nan,) * 3
        rows.append(scores)
    return Scores(*torch.tensor(rows, dtype=torch.float32).reshape(-1, 3).T)


def _check(predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], top_k: int | None) -> None:
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} images with predictions, but {len(targets)} with targets.")
    if top_k is not None:
        at_least("top_k", top_k, 1)
    for labels in chain(predictions, targets):
        if isinstance(labels, str):
            raise TypeError(f"Each image needs a list of labels, not one string: {labels!r}")


class _MeanScores(Metric):
    """Means over images of :class:`Scores`, for each of C lengths of the predictions."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    totals_C3: Tensor
    images: Tensor

    def __init__(self, cuts: int, **kwargs):
        super().__init__(**kwargs)
        self.add_state("totals_C3", torch.zeros(cuts, 3), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, scores: Sequence[Scores]) -> None:
        """Scores of the same images, for each length of the predictions."""
        values_C3B = torch.stack([torch.stack(s) for s in scores])
        scored_B = ~values_C3B[0, 0].isnan()
        total_C3 = values_C3B[..., scored_B].double().sum(dim=-1)
        # Not in place: a state reset under inference mode may be updated outside it.
        self.totals_C3 = self.totals_C3 + total_C3.to(self.totals_C3)
        self.images = self.images + int(scored_B.sum())

    def _means(self, names: Sequence[str]) -> dict[str, Tensor]:
        """{recall, precision, f1 + suffix: scalar}; empty without images, so that a missing value stays missing."""
        if self.images == 0:
            return {}
        means_C3 = self.totals_C3 / self.images
        return {
            f"{score}{suffix}": mean
            for suffix, row_3 in zip(names, means_C3, strict=True)
            for score, mean in zip(Scores._fields, row_3, strict=True)
        }


class SemanticMatch(_MeanScores):
    """Means over images of :func:`semantic_scores`.

    ``compute()`` returns scalars ``recall@k``, ``precision@k``, ``f1@k`` (without @k for ``top_k`` None: all), or {} if
    no image had targets. Copies of the metric share the embedder, which stays on its own device.
    """

    def __init__(self, embedder: TextEmbedder, top_k: int | None = 10, **kwargs):
        _check([], [], top_k)
        super().__init__(1, **kwargs)
        self.embedder, self.top_k = embedder, top_k

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """B images: predicted labels, best first, and reference labels."""
        self._add([semantic_scores(predictions, targets, self.embedder, top_k=self.top_k)])

    def compute(self) -> dict[str, Tensor]:
        return self._means(["" if self.top_k is None else f"@{self.top_k}"])


class ExactMatch(_MeanScores):
    """Means over images of :func:`exact_scores`, at one or several k.

    ``compute()`` returns scalars ``recall@k``, ``precision@k``, ``f1@k`` for each k, or {} if no image had targets;
    and ``hit@1``, ``hit@5``: the share of images for which one of the 1 (5) most probable labels is any of the
    targets. That is top-1 and top-5 accuracy where the targets are the names of one class.

    ``labels``: how many different targets there were, as of the last ``compute()`` (see :func:`meaningless`).
    """

    hits_H: Tensor
    seen: Tensor  # a flag for each hash of a target: as a state of fixed size, ranks can merge theirs
    labels: int = 0

    def __init__(self, top_k: int | Sequence[int] = 10, **kwargs):
        cuts = (top_k,) if isinstance(top_k, int) else tuple(dict.fromkeys(top_k))
        for cut in cuts:
            at_least("top_k", cut, 1)
        super().__init__(len(cuts), **kwargs)
        self.top_k = cuts
        self.hit_cuts = [k for k in HIT_CUTS if k <= max(cuts)]
        self.add_state("hits_H", torch.zeros(len(self.hit_cuts)), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(_LABEL_HASHES, dtype=torch.uint8), dist_reduce_fx="max")

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """B images: predicted labels, best first, and reference labels."""
        self._add([exact_scores(predictions, targets, top_k=k) for k in self.top_k])
        hits = [(exact_scores(predictions, targets, top_k=k).recall > 0).sum() for k in self.hit_cuts]
        self.hits_H = self.hits_H + torch.stack(hits).to(self.hits_H)
        hashes = [zlib.crc32(label.encode()) % _LABEL_HASHES for labels in targets for label in distinct(labels)]
        self.seen = self.seen.index_fill(0, torch.tensor(hashes, dtype=torch.long, device=self.seen.device), 1)

    def compute(self) -> dict[str, Tensor]:
        self.labels = int(self.seen.count_nonzero())
        values = self._means([f"@{k}" for k in self.top_k])
        if values:
            values |= {f"hit@{k}": hits / self.images for k, hits in zip(self.hit_cuts, self.hits_H, strict=True)}
        return values


def meaningless(names: Iterable[str], labels: int) -> list[str]:
    """Those ``names`` that end in @k with k ≥ ``labels``, the number of labels there are: all of them are predicted.

    >>> meaningless(["recall@10", "hit@1", "loss"], labels=8)
    ['recall@10']
    """
    ks = {name: re.search(r"@(\d+)$", name) for name in names}
    return [name for name, k in ks.items() if k and 0 < labels <= int(k[1])]


def own_metrics(nodes: Mapping[str, Any], where: str) -> dict[str, Metric]:
    """The user's metrics: ``update`` gets labels as :class:`ExactMatch` does, ``compute`` returns one number.

    Args:
        nodes: name → ``_target_`` and arguments.

    Raises:
        UserError: no such class, or not a Metric.
    """
    metrics = {name: instantiated(node, f"{where}.{name}") for name, node in nodes.items()}
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise UserError(f"{where}.{name} must be a torchmetrics Metric, got {type(metric).__name__}.")
    return metrics
