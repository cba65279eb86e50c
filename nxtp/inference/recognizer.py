"""Recognizer: what a trained model is used for. Predict, classify, embed, show attention."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nxtp.data.transforms import ImageTransform
from nxtp.errors import UserError
from nxtp.inference.calibration import CLASSIFY
from nxtp.inference.pretrained import Pretrained
from nxtp.inference.streaming import WORKERS, ImageSource, Prediction, batches, stream
from nxtp.model.attention_maps import label_attention, label_relevance, patch_attention
from nxtp.sampling.autoregressive import AutoregressiveConfig
from nxtp.sampling.clip import ClipSimilarity
from nxtp.sampling.closed_vocabulary import Classes, Vocabulary, class_log_probs
from nxtp.sampling.ranking import Labels, RankingConfig, cut, rank, ranking_config, spelling, threshold_of
from nxtp.sampling.samplers import SamplerConfig, sample, sampler_config, settings_of

log = logging.getLogger("nxtp")

ImageLike: TypeAlias = str | Path | bytes | Image.Image | Tensor | np.ndarray
Sampler: TypeAlias = str | Mapping[str, Any] | SamplerConfig
Ranking: TypeAlias = str | Mapping[str, Any] | RankingConfig
Threshold: TypeAlias = str | float | None
Source: TypeAlias = str | Path | Iterable[ImageLike | tuple[str, ImageLike]]


class Recognizer(Pretrained):
    """Images in, ranked labels out.

    >>> recognizer = Recognizer.from_pretrained("runs/demo/model")
    >>> recognizer.predict("photo.jpg", top_k=5)
    [('hamburger', 0.74), ('avocado', 0.14), …]
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pixels = ImageTransform.of(self.model.encoder.config)
        self._clips: dict[str, ClipSimilarity] = {}
        self._warned: set[str] = set()

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        top_k: int = 10,
        batch_size: int = 64,
        sampler: Sampler = "one_shot",
        ranking: Ranking = "prob",
        classes: Classes | Vocabulary | None = None,
        threshold: Threshold = None,
    ):
        """Ranked labels with their probabilities.

        Args:
            images: one image or a list: a path, encoded bytes, a PIL image, or uint8 pixels ([H, W, 3] array
                or [3, H, W] tensor).
            top_k: labels per image, at most; fewer if several came out the same.
            batch_size: images per forward pass. The result does not depend on it, unless tokens are drawn at random.
            sampler: one_shot, exact, greedy, beam, or ``{"name": …}`` with settings; see :mod:`nxtp.sampling.samplers`.
            ranking: prob, ppl, sim_mean, sim_max, clip, none, or ``{"name": …}`` with settings; see
                :class:`nxtp.sampling.ranking.RankingConfig`. All but prob give scores instead of probabilities.
            classes: one-shot sampling may write only these labels. :meth:`classify` gives the probability of each.
            threshold: the lowest probability of a label that is returned; or "f1", as many as have the highest F1 of
                expected counts (:func:`nxtp.sampling.ranking.cut`).

        Returns:
            ``[(label, probability), …]``, most probable first, for one image; a list of those for a list.

        Raises:
            ImageError: an image that cannot be read; names it.
            UserError: an unknown sampler, ranking or setting.
            ValueError: ``top_k`` below 1.
        """
        return self._map(images, batch_size, self._predictor(top_k, sampler, ranking, classes, threshold))

    def predict_batches(
        self,
        source: Source,
        top_k: int = 10,
        batch_size: int = 64,
        sampler: Sampler = "one_shot",
        ranking: Ranking = "prob",
        classes: Classes | Vocabulary | None = None,
        workers: int = WORKERS,
        cache_dir: str | None = None,
        threshold: Threshold = None,
    ) -> Iterator[Prediction]:
        """:meth:`predict` for any number of images, in the order of ``source``. Two batches are in memory at a time.

        The prediction of an image that cannot be read has an ``error`` instead of ``labels``.

        Args:
            source: as :meth:`ImageSource.open` takes it, with ``cache_dir``.
            workers: threads that read and decode images while the model runs.

        Raises:
            UserError: missing shards, an unknown sampler, ranking or setting. Raised here, not by the iterator.
        """
        label = self._predictor(top_k, sampler, ranking, classes, threshold)
        return stream(ImageSource.open(source, cache_dir), label, self.transform, batch_size, workers)

    def classify(
        self,
        images: ImageLike | Sequence[ImageLike],
        classes: Classes | Vocabulary,
        top_k: int | None = None,
        batch_size: int = 16,
    ):
        """The probability of each class under the model, most probable first, as :meth:`predict` returns labels.

        Exact: the same as scoring each label alone (:mod:`nxtp.sampling.closed_vocabulary`). The model could write
        other labels too, so the probabilities do not add up to 1.

        Args:
            classes: each a label, or several names of one class: their probabilities are added, the first name is
                returned. :meth:`prepare_classes` prepares them once for many calls.
            top_k: the most probable classes; None returns all.

        Raises:
            ImageError: an image that cannot be read; names it.
            UserError: no classes, or a label without tokens.
            ValueError: ``top_k`` below 1.
        """
        return self._map(images, batch_size, self._classifier(classes, top_k))

    def classify_batches(
        self,
        source: Source,
        classes: Classes | Vocabulary,
        top_k: int | None = None,
        batch_size: int = 16,
        workers: int = WORKERS,
        cache_dir: str | None = None,
    ) -> Iterator[Prediction]:
        """:meth:`classify` for any number of images, as :meth:`predict_batches`."""
        label = self._classifier(classes, top_k)
        return stream(ImageSource.open(source, cache_dir), label, self.transform, batch_size, workers)

    def prepare_classes(self, classes: Classes | Vocabulary) -> Vocabulary:
        """Classes as token ids of this model, for many calls.

        Raises:
            UserError: no classes, or a label without tokens.
        """
        return classes if isinstance(classes, Vocabulary) else Vocabulary(classes, self.tokenizer)

    def predict_pixels(
        self,
        images: Tensor,
        top_k: int = 10,
        sampler: Sampler = "one_shot",
        ranking: Ranking = "prob",
        classes: Vocabulary | None = None,
        threshold: Threshold = None,
    ) -> list[Labels]:
        """:meth:`predict` of uint8 [B, 3, S, S], S = ``image_size``, on any device."""
        if top_k < 1:
            raise ValueError(f"top_k must be ≥ 1, got {top_k}")
        if len(images) == 0:
            return []
        images = images.to(self.device)
        order, config = ranking_config(ranking), sampler_config(sampler)
        matched = self.provenance.get("objective") == "matched"
        if isinstance(config, AutoregressiveConfig) and matched:
            self._warn_once("Greedy and beam search write text that objective 'matched' does not train; use one_shot.")
        samples = sample(self.model, images, config, tokenizer=self.tokenizer, top_k=top_k, classes=classes)
        if samples.complete_B is not None and not samples.complete_B.all():
            log.warning(
                "Exact search stopped at max_expansions on %d of %d images: their labels are the best it found.",
                int((~samples.complete_B).sum()),
                len(images),
            )
        clip = self._clip(order.clip) if order.name == "clip" else None
        decode, limit = self.tokenizer.decode_label, threshold_of(threshold, order)
        ranked = _without_nan(rank(samples, decode, order, top_k, model=self.model, images=images, clip=clip))
        if order.name == "prob" and not order.published:
            ranked = self._calibrated(ranked, *settings_of(config))
        return [cut(labels, limit) for labels in ranked]

    def classify_pixels(
        self, images: Tensor, classes: Vocabulary, top_k: int | None = None, threshold: Threshold = None
    ) -> list[Labels]:
        """:meth:`classify` of uint8 [B, 3, S, S], S = ``image_size``, on any device."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be ≥ 1, got {top_k}")
        if len(images) == 0:
            return []
        log_probs_BC = class_log_probs(self.model, images.to(self.device), classes, prompt=self.tokenizer.prompt_ids)
        best = log_probs_BC.sort(dim=1, descending=True, stable=True)
        names = [each[0] for each in classes.classes]
        rows = zip(best.values[:, :top_k].exp().tolist(), best.indices[:, :top_k].tolist(), strict=True)
        ranked = _without_nan([[(names[c], p) for p, c in zip(*row, strict=True)] for row in rows])
        limit = threshold_of(threshold, RankingConfig())
        return [cut(labels, limit) for labels in self._calibrated(ranked, CLASSIFY, {"classes": classes.fingerprint})]

    def label_pixels(
        self,
        images: Tensor,
        top_k: int = 10,
        classes: Vocabulary | None = None,
        sampler: Sampler = "one_shot",
        ranking: Ranking = "prob",
        threshold: Threshold = None,
    ) -> list[Labels]:
        """:meth:`classify_pixels` for a closed vocabulary ``classes``, without one :meth:`predict_pixels`."""
        if classes is not None:
            return self.classify_pixels(images, classes, top_k, threshold)
        return self.predict_pixels(images, top_k, sampler, ranking, None, threshold)

    def _calibrated(self, ranked: list[Labels], sampler: str, settings: dict[str, Any]) -> list[Labels]:
        """With calibrated probabilities, if this sampler with these settings has been calibrated."""
        known = self.calibrations.get(sampler)
        if known and known.settings == settings:
            return [known(labels) for labels in ranked]
        if self.calibrations:
            what = "these classes" if sampler == CLASSIFY else f"the sampler {sampler} with these settings"
            self._warn_once(f"The model's calibration is not for {what}: probabilities are the model's own.")
        return ranked

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            log.warning(message)
            self._warned.add(message)

    @torch.inference_mode()
    def embed(
        self,
        images: ImageLike | Sequence[ImageLike],
        space: str = "encoder",
        pool: bool = True,
        batch_size: int = 64,
    ) -> Tensor:
        """Images as vectors, for search, clustering or probes.

        Args:
            space: encoder, its tokens [N, D_encoder]; or decoder, the same projected into the language model's
                embedding space [N, D].
            pool: the mean of an image's N tokens; False: each token, row by row of the grid.

        Returns:
            float32 on the CPU, not normalised: [D] of one image, [B, D] of a list; without pooling [N, D], [B, N, D].

        Raises:
            ImageError: an image that cannot be read; names it.
            ValueError: an unknown space.
        """
        if space not in ("encoder", "decoder"):
            raise ValueError(f"space must be encoder or decoder, got '{space}'")
        tokens_of = self.model.encoder if space == "encoder" else self.model.encode

        def vectors(pixels: Tensor) -> list[Tensor]:
            tokens_BND = tokens_of(pixels.to(self.device)).float().cpu()
            return list(tokens_BND.mean(dim=1) if pool else tokens_BND)

        found = self._map(images, batch_size, vectors)
        if isinstance(found, Tensor):
            return found
        return torch.stack(found or vectors(self.pixels.blank()[None]))[: len(found)]  # an empty list has a shape too

    def attention(self, image: ImageLike, label: str) -> Tensor:
        """Attention of a label's tokens to the image: float32 [blocks, heads, tokens, rows, columns].

        The weights of each decoder block and head on the grid of image tokens; :func:`average` of
        nxtp/model/attention_maps.py reduces them to one map. A label that :meth:`predict` returned is spelled
        as the model wrote it; any other text is taken as it is.

        Raises:
            ImageError: an image that cannot be read.
            UserError: a label without tokens, or an encoder whose tokens are no square grid.
        """
        return self._of_label(label_attention, image, label)

    def relevance(self, image: ImageLike, label: str) -> Tensor:
        """Where a label is seen: float32 [blocks, heads, tokens, rows, columns], ≥ 0.

        Attention weights times the gradient of the label's log probability, where positive: what
        ``nxtp predict --attention`` and the page show. Raises as :meth:`attention`.
        """
        return self._of_label(label_relevance, image, label)

    def _of_label(self, maps: Callable[..., Tensor], image: ImageLike, label: str) -> Tensor:
        (ids,) = self.tokenizer.encode_labels([spelling(label)])
        if not ids:
            raise UserError(f"The label '{label}' has no tokens.")
        where = {"prompt": self.tokenizer.prompt_ids, "delimiter": self.tokenizer.delimiter_id}
        return maps(self.model, self.transform(image).to(self.device), ids, **where)

    def patch_attention(self, image: ImageLike) -> Tensor:
        """Attention of image tokens to each other in the decoder: float32 [blocks, heads, N, N], rows to columns.

        Raises:
            ImageError: an image that cannot be read.
        """
        return patch_attention(self.model, self.transform(image).to(self.device), prompt=self.tokenizer.prompt_ids)

    def transform(self, image: ImageLike) -> Tensor:
        """One image → the model's input pixels, uint8 [3, S, S]."""
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        return self.pixels(image)

    def _predictor(
        self,
        top_k: int,
        sampler: Sampler,
        ranking: Ranking,
        classes: Classes | Vocabulary | None,
        threshold: Threshold,
    ) -> Callable[[Tensor], list[Labels]]:
        """Pixels → labels, with the settings checked now."""
        config, order = sampler_config(sampler), ranking_config(ranking)
        prepared = None if classes is None else self.prepare_classes(classes)
        limit = threshold_of(threshold, order)
        return lambda pixels: self.predict_pixels(pixels, top_k, config, order, prepared, limit)

    def _classifier(self, classes: Classes | Vocabulary, top_k: int | None) -> Callable[[Tensor], list[Labels]]:
        prepared = self.prepare_classes(classes)
        return lambda pixels: self.classify_pixels(pixels, prepared, top_k)

    def _map(self, images: ImageLike | Sequence[ImageLike], batch_size: int, function: Callable[[Tensor], list[Any]]):
        """``function`` of batches of pixels; one result for one image, a list for a list."""
        single = not isinstance(images, (list, tuple))
        every: Any = [images] if single else images
        results: list[Any] = []
        for batch in batches(every, batch_size):
            results += function(torch.stack([self.transform(image) for image in batch]))
        return results[0] if single else results

    def _clip(self, source: str) -> ClipSimilarity:
        if source not in self._clips:
            self._clips[source] = ClipSimilarity(source, self.device)
        return self._clips[source]


def _without_nan(labels: list[Labels]) -> list[Labels]:
    """The labels as they are.

    Raises:
        UserError: a probability is NaN.
    """
    if any(math.isnan(probability) for each in labels for _, probability in each):
        raise UserError("The model's probabilities are no numbers (NaN): its weights or settings are damaged.")
    return labels
