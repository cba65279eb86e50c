"""Recognizer: what a user does with a trained model — predict, classify, embed, look."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nxtp.data.images import load_image
from nxtp.data.transforms import to_pixels
from nxtp.errors import UserError
from nxtp.inference.pretrained import Pretrained
from nxtp.inference.streaming import WORKERS, Prediction, Source, answers, batches
from nxtp.model.attention import label_attention, patch_attention
from nxtp.sampling.autoregressive import RunningTextConfig
from nxtp.sampling.clip import ClipSimilarity
from nxtp.sampling.closed_vocabulary import Classes, Vocabulary, class_log_probs
from nxtp.sampling.ranking import Labels, RankingConfig, rank, ranking_config
from nxtp.sampling.samplers import SamplerConfig, sample, sampler_config

log = logging.getLogger("nxtp")

ImageLike = str | Path | bytes | Image.Image | Tensor | np.ndarray


class Recognizer(Pretrained):
    """Images in, ranked labels out.

    >>> recognizer = Recognizer.from_pretrained("runs/demo/model")
    >>> recognizer.predict("photo.jpg", top_k=5)
    [('coffee', 0.91), ('rocket', 0.88), …]
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._clips: dict[str, ClipSimilarity] = {}
        self._told = False

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        top_k: int = 10,
        batch_size: int = 64,
        sampler: str | Mapping[str, Any] | SamplerConfig = "one_shot",
        ranking: str | Mapping[str, Any] | RankingConfig = "prob",
        allowed: Classes | Vocabulary | None = None,
    ):
        """Ranked labels with their probabilities.

        Args:
            images: one image or a list: a path, encoded bytes, a PIL image, or uint8 pixels ([H, W, 3] array
                or [3, H, W] tensor).
            top_k: labels an image, at most; fewer where several came out the same.
            batch_size: images computed together; the result does not depend on it (but where tokens are drawn).
            sampler: one_shot, exact, greedy, beam, or ``{"name": …}`` with settings; see :mod:`nxtp.sampling.samplers`.
            ranking: prob, ppl, sim_mean, sim_max, clip, none, or ``{"name": …}`` with settings; see
                :class:`nxtp.sampling.ranking.RankingConfig`. Other rankings than prob give their own scores.
            allowed: the only labels that one-shot sampling may write; :meth:`classify` gives the probability of each.

        Returns:
            ``[(label, probability), …]``, most probable first, for one image; a list of those for a list.

        Raises:
            ImageError: an image that cannot be read; names it.
            UserError: an unknown sampler, ranking or setting.
            ValueError: ``top_k`` below 1.
        """
        only = None if allowed is None else self.vocabulary(allowed)
        return self._each(images, batch_size, lambda pixels: self.predict_pixels(pixels, top_k, sampler, ranking, only))

    def predict_batches(
        self,
        source: str | Path | Iterable[ImageLike | tuple[str, ImageLike]],
        top_k: int = 10,
        batch_size: int = 64,
        sampler: str | Mapping[str, Any] | SamplerConfig = "one_shot",
        ranking: str | Mapping[str, Any] | RankingConfig = "prob",
        allowed: Classes | Vocabulary | None = None,
        workers: int = WORKERS,
        cache_dir: str | None = None,
    ) -> Iterator[Prediction]:
        """:meth:`predict` for any number of images, read and decoded beside the model, two batches in memory.

        Args:
            source: a directory of images, one of shards, a shard, a glob or brace expression or URL of shards; or any
                iterable of images or (name, image) pairs.
            top_k, sampler, ranking, allowed: as in :meth:`predict`.
            batch_size: images computed together.
            workers: threads that decode.
            cache_dir: where remote shards are kept.

        Returns:
            An iterator of :class:`nxtp.inference.streaming.Answer` in the source's order. An image that cannot be used has an
            ``error`` in place of ``labels``; the others are done.

        Raises:
            UserError: at once, where shards are missing, or a sampler, ranking or setting is unknown.
        """
        how = sampler_config(sampler), ranking_config(ranking)
        only = None if allowed is None else self.vocabulary(allowed)
        found = Source.of(source, cache_dir)

        def label(pixels: Tensor) -> list[Labels]:
            return self.predict_pixels(pixels, top_k, *how, only)

        return answers(found, label, self.transform, batch_size, workers)

    def classify_batches(
        self,
        source: str | Path | Iterable[ImageLike | tuple[str, ImageLike]],
        labels: Classes | Vocabulary,
        top_k: int | None = None,
        batch_size: int = 16,
        workers: int = WORKERS,
        cache_dir: str | None = None,
    ) -> Iterator[Prediction]:
        """:meth:`classify` for any number of images, as :meth:`predict_batches`.

        Raises:
            UserError: at once, where shards are missing, or a label has no tokens.
        """
        known = self.vocabulary(labels)
        found = Source.of(source, cache_dir)

        def label(pixels: Tensor) -> list[Labels]:
            return self.classify_pixels(pixels, known, top_k)

        return answers(found, label, self.transform, batch_size, workers)

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
            images: as in :meth:`predict`.
            space: encoder, the image tower's tokens [N, D_encoder]; or decoder, these projected into the language
                model's embedding space [N, D].
            pool: the mean of an image's N tokens; False: each token, row by row of the grid.
            batch_size: images computed together.

        Returns:
            float32 on the CPU, not normalised: [D] of one image, [B, D] of a list; without pooling [N, D], [B, N, D].

        Raises:
            ImageError: an image that cannot be read; names it.
            ValueError: an unknown space.
        """
        if space not in ("encoder", "decoder"):
            raise ValueError(f"space is '{space}': encoder or decoder, please")
        tokens_of = self.model.encoder if space == "encoder" else self.model.encode

        def vectors(pixels: Tensor) -> list[Tensor]:
            tokens_BND = tokens_of(pixels.to(self.device)).float().cpu()
            return list(tokens_BND.mean(dim=1) if pool else tokens_BND)

        found = self._each(images, batch_size, vectors)
        if isinstance(found, Tensor):
            return found
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.stack(found or vectors(blank))[: len(found)]

    def classify(
        self,
        images: ImageLike | Sequence[ImageLike],
        labels: Classes | Vocabulary,
        top_k: int | None = None,
        batch_size: int = 16,
    ):
        """The given labels with the probability of each under the model, most probable first.

        Exact: what scoring each label alone gives (:mod:`nxtp.sampling.closed_vocabulary`). The probabilities are those among all
        labels that the model could write, so they do not add up to 1.

        Args:
            images, batch_size: as in :meth:`predict`.
            labels: each a text, or several names of one thing: their probabilities are added, the first is given.
                :meth:`vocabulary` prepares them once for many calls.
            top_k: so many of them; None: all.

        Returns:
            ``[(label, probability), …]`` for one image; a list of those for a list.

        Raises:
            ImageError: an image that cannot be read; names it.
            UserError: no labels, or one without tokens.
        """
        known = self.vocabulary(labels)
        return self._each(images, batch_size, lambda pixels: self.classify_pixels(pixels, known, top_k))

    def vocabulary(self, labels: Classes | Vocabulary) -> Vocabulary:
        """Labels as this model's tokens, for many calls.

        Raises:
            UserError: no labels, or one without tokens.
        """
        return labels if isinstance(labels, Vocabulary) else Vocabulary(labels, self.tokenizer)

    def _each(self, images: ImageLike | Sequence[ImageLike], batch_size: int, of: Callable[[Tensor], list[Any]]):
        """``of`` batches of pixels; one result for one image, a list for a list."""
        single = not isinstance(images, (list, tuple))
        every = [images] if single else list(images)
        result: list[Any] = []
        for some in batches(every, batch_size):
            result += of(torch.stack([self.transform(image) for image in some]))
        return result[0] if single else result

    def classify_pixels(self, images: Tensor, labels: Vocabulary, top_k: int | None = None) -> list[Labels]:
        """Labels of uint8 [B, 3, S, S], S = ``image_size``, on any device."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}: at least 1, please")
        if len(images) == 0:
            return []
        log_probs_BC = class_log_probs(self.model, images.to(self.device), labels, prompt=self.tokenizer.prompt_ids)
        count = len(labels.classes) if top_k is None else min(top_k, len(labels.classes))
        best = log_probs_BC.sort(dim=1, descending=True, stable=True)
        names = [classes[0] for classes in labels.classes]
        rows = zip(best.values[:, :count].exp().tolist(), best.indices[:, :count].tolist(), strict=True)
        return [[(names[c], p) for p, c in zip(*row, strict=True)] for row in rows]

    def predict_pixels(
        self,
        images: Tensor,
        top_k: int = 10,
        sampler: str | Mapping[str, Any] | SamplerConfig = "one_shot",
        ranking: str | Mapping[str, Any] | RankingConfig = "prob",
        allowed: Vocabulary | None = None,
    ) -> list[Labels]:
        """Labels of uint8 [B, 3, S, S], S = ``image_size``, on any device."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: at least 1, please")
        if len(images) == 0:
            return []
        images = images.to(self.device)
        order = ranking_config(ranking)
        config = sampler_config(sampler)
        if isinstance(config, RunningTextConfig) and self.provenance.get("objective") == "matched" and not self._told:
            log.warning("Greedy and beam search write running text, which a model of objective 'matched' never saw.")
            self._told = True
        only = None if allowed is None else allowed.allowed
        samples = sample(self.model, images, config, tokenizer=self.tokenizer, top_k=top_k, allowed=only)
        if samples.complete_B is not None and not samples.complete_B.all():
            log.warning(
                "Exact search gave up on %d of %d images after max_expansions: their labels are the best it found.",
                int((~samples.complete_B).sum()),
                len(images),
            )
        clip = self._clip(order.clip) if order.name == "clip" else None
        return rank(samples, self.tokenizer.decode_label, order, top_k, model=self.model, images=images, clip=clip)

    def _clip(self, source: str) -> ClipSimilarity:
        if source not in self._clips:
            self._clips[source] = ClipSimilarity(source, self.device)
        return self._clips[source]

    def transform(self, image: ImageLike) -> Tensor:
        """One image → the model's input pixels, uint8 [3, S, S]."""
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        return to_pixels(load_image(image, near=self.image_size), self.image_size)

    def attention(self, image: ImageLike, label: str) -> Tensor:
        """Where the model looks when it reads a label of its own: float32 [blocks, heads, tokens, rows, columns].

        Of each decoder block and head each token's weights on the grid of patches; :func:`nxtp.model.attention.average` makes
        one map of them. Any label will do, given or predicted.

        Raises:
            ImageError: an image that cannot be read.
            UserError: a label without tokens, or a tower whose tokens are no square grid.
        """
        (ids,) = self.tokenizer.encode_labels([label])
        if not ids:
            raise UserError(f"The label '{label}' has no tokens.")
        where = {"prompt": self.tokenizer.prompt_ids, "delimiter": self.tokenizer.delimiter_id}
        return label_attention(self.model, self.transform(image).to(self.device), ids, **where)

    def patch_attention(self, image: ImageLike) -> Tensor:
        """Attention of image tokens onto each other in the decoder: float32 [blocks, heads, N, N], row onto column.

        Raises:
            ImageError: an image that cannot be read.
        """
        return patch_attention(self.model, self.transform(image).to(self.device), prompt=self.tokenizer.prompt_ids)
