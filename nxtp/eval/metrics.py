"""How good predicted labels are: exact match, and semantic match with a text encoder (torchmetrics).

:class:`nxtp.eval.hits.Hits` and :func:`semantic_scores` have a value per image; the metrics average over images. Their
states are sums, so several ranks with uneven batches give the same means as one process.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric

from nxtp.config import instantiated
from nxtp.data.labels.cleaning import distinct
from nxtp.errors import UserError, at_least
from nxtp.eval.embedders import TextEmbedder, full_precision
from nxtp.eval.hits import Hits

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


def _check(predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], top_k: int | None) -> None:
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} images with predictions, but {len(targets)} with targets.")
    if top_k is not None:
        at_least("top_k", top_k, 1)
    for labels in chain(predictions, targets):
        if isinstance(labels, str):
            raise TypeError(f"Each image needs a list of labels, not one string: {labels!r}")


class _Means(Metric):
    """Means over the images that have targets, of the metrics ``names``.

    ``compute()`` returns name → scalar; {} without images, so that a missing value stays missing.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    totals_M: Tensor
    images: Tensor

    def __init__(self, names: Sequence[str], **kwargs):
        super().__init__(**kwargs)
        self.names = list(names)
        self.add_state("totals_M", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, totals_M: Tensor, images: int) -> None:
        # Not in place: a state reset under inference mode may be updated outside it.
        self.totals_M = self.totals_M + totals_M.to(self.totals_M)
        self.images = self.images + images

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.totals_M / self.images, strict=True)) if self.images else {}


class SemanticMatch(_Means):
    """Means over images of :func:`semantic_scores`.

    ``compute()`` returns scalars ``recall@k``, ``precision@k``, ``f1@k`` (without @k for ``top_k`` None: all), or {} if
    no image had targets. Copies of the metric share the embedder, which stays on its own device.
    """

    def __init__(self, embedder: TextEmbedder, top_k: int | None = 10, **kwargs):
        _check([], [], top_k)
        super().__init__([kind if top_k is None else f"{kind}@{top_k}" for kind in Scores._fields], **kwargs)
        self.embedder, self.top_k = embedder, top_k

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """B images: predicted labels, best first, and reference labels."""
        scores_3B = torch.stack(semantic_scores(predictions, targets, self.embedder, top_k=self.top_k))
        scored_3B = scores_3B[:, ~scores_3B[0].isnan()]
        self._add(scored_3B.double().sum(dim=1), scored_3B.shape[1])


class ExactMatch(_Means):
    """Means over images of exact match on normalised labels, at one or several k.

    Labels of equal normalised text count once, empty ones do not count, nor do images without targets.
    ``compute()`` returns scalars ``recall@k``, ``precision@k``, ``f1@k`` for each k (:mod:`nxtp.eval.hits`), or
    {} if no image had targets; and ``hit@1``, ``hit@5``: the share of images for which one of the 1 (5) most probable
    labels is any of the targets. That is top-1 and top-5 accuracy where the targets are the names of one class.

    ``labels``: how many different targets there were, as of the last ``compute()`` (see :func:`meaningless`).
    """

    seen: Tensor  # a flag for each hash of a target: as a state of fixed size, ranks can merge theirs
    labels: int = 0

    def __init__(self, top_k: int | Sequence[int] = 10, **kwargs):
        cuts = (top_k,) if isinstance(top_k, int) else tuple(dict.fromkeys(top_k))
        for cut in cuts:
            at_least("top_k", cut, 1)
        names = [f"{kind}@{k}" for k in cuts for kind in Scores._fields]
        super().__init__([*names, *(f"hit@{k}" for k in HIT_CUTS if k <= max(cuts))], **kwargs)
        self.add_state("seen", torch.zeros(_LABEL_HASHES, dtype=torch.uint8), dist_reduce_fx="max")

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """B images: predicted labels, best first, and reference labels."""
        _check(predictions, targets, None)
        truths = [distinct(labels) for labels in targets]
        predicted = [distinct(labels) for labels, truth in zip(predictions, truths, strict=True) if truth]
        hits = Hits.of(predicted, [truth for truth in truths if truth])
        rows = [row for name in self.names if (row := hits.metric(name)) is not None]
        self._add(torch.tensor(np.stack(rows).sum(axis=1)), len(predicted))
        hashes = [zlib.crc32(label.encode()) % _LABEL_HASHES for truth in truths for label in truth]
        self.seen = self.seen.index_fill(0, torch.tensor(hashes, dtype=torch.long, device=self.seen.device), 1)

    def compute(self) -> dict[str, Tensor]:
        self.labels = int(self.seen.count_nonzero())
        return super().compute()


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
