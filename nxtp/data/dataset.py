"""Where a shard becomes a batch: positions → samples → pixels and laid-out labels."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nxtp.data.augmentation import Augmentation
from nxtp.data.config import DataConfig
from nxtp.data.features.store import FeatureStore
from nxtp.data.images import ImageError
from nxtp.data.labels.cleaning import normalise, read_lines
from nxtp.data.labels.from_samples import labels_of
from nxtp.data.labels.nouns import noun_backend
from nxtp.data.shards.reader import UNLISTED, IndexedShards, RawSample, SampleError, name_of
from nxtp.data.transforms import ImageTransform
from nxtp.data.where import FILTERED
from nxtp.errors import UserError, by_kind
from nxtp.model.layout import Layout, Objective, lay_out
from nxtp.model.tokenizer import LabelTokenizer

log = logging.getLogger("nxtp")


@dataclass
class Batch:
    """The input of one step on one rank.

    ``images``        uint8 [B, 3, S, S], or features of a frozen encoder, floating point [B, N, D_encoder]
    ``layout``        their laid-out labels
    ``samples_read``  samples read for this batch, of which ``skipped`` (by kind) are not used
    ``examples``      of each kind of ``skipped`` the first sample: its key and shard, and perhaps the reason
    ``remote``        of remote shards: samples read ("reads"), those that did not wait ("hits"), "bytes" fetched

    B may be smaller than the batch size, in evaluation even 0. In training a batch without a usable sample has no keys
    and one blank image whose loss does not count: every rank must take part in the step.
    """

    images: Tensor
    layout: Layout
    keys: list[str]
    shards: list[str]
    labels: list[list[str]]
    samples_read: int
    skipped: Counter
    examples: dict[str, str] = field(default_factory=dict)
    remote: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> list[str]:
        """For messages: the keys of each shard, and the shard."""
        keys: dict[str, list[str]] = {}
        for key, shard in zip(self.keys, self.shards, strict=True):
            keys.setdefault(shard, []).append(key)
        return [name_of(", ".join(own), shard) for shard, own in keys.items()]

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        # Lightning copies only what is itself a tensor without waiting.
        if any(torch.device(a).type == "cuda" for a in args if isinstance(a, (str, torch.device))):
            kwargs.setdefault("non_blocking", True)
        return replace(self, images=self.images.to(*args, **kwargs), layout=self.layout.to(*args, **kwargs))

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory(), layout=self.layout.pin_memory())


class BatchDataset(Dataset):
    """Map-style over batches: (epoch, positions) → :class:`Batch`. Runs in loader workers."""

    def __init__(
        self,
        shards: IndexedShards,
        *,
        tokenizer: LabelTokenizer,
        config: DataConfig,
        transform: ImageTransform,
        num_image_tokens: int,
        objective: Objective,
        training: bool,
        multiple: int = 1,
        augmentation: Augmentation | None = None,
    ):
        self.shards, self.tokenizer, self.config = shards, tokenizer, config
        self.transform, self.num_image_tokens, self.objective = transform, num_image_tokens, objective
        self.training, self.multiple = training, multiple
        self.places = _places(config.label_order) if training and config.label_order else {}
        self.nouns = noun_backend(config.nouns, config.stop_nouns)
        self.features = FeatureStore(config.features) if training and config.features else None
        self.augmentation = augmentation if training else None

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Batch:
        epoch, positions = item
        skipped: Counter = Counter()
        examples: dict[str, str] = {}
        images: list[Tensor] = []
        keys: list[str] = []
        shards: list[str] = []
        texts: list[list[str]] = []
        ids: list[Sequence[Sequence[int]]] = []  # of each image the tokens of each label
        for position in positions.tolist():
            try:
                raw = self.shards.read(position)
                if raw.unlisted:
                    skipped[UNLISTED] += raw.unlisted
                    examples.setdefault(UNLISTED, f"{UNLISTED}: behind {raw.name}, the last that is listed")
                labels = self.labels_of(raw)
                pixels = self.pixels_of(raw, epoch, position)
            except (SampleError, ImageError) as error:
                skipped[error.kind] += 1
                examples.setdefault(error.kind, str(error))
                continue
            if self.training:
                order = self._random(epoch, position).permutation(len(labels))
                labels = [labels[i] for i in order[: self.config.max_labels]]
                if self.places:
                    labels.sort(key=lambda label: self.places.get(normalise(label), math.inf))
            images.append(pixels)
            keys.append(raw.key)
            shards.append(raw.shard)
            texts.append(labels)
            ids.append(self.tokenizer.encode_labels(labels))
        if self.training and not images:
            images.append(self._blank)
            ids.append([self.tokenizer.prompt_ids[-1:]])
        prompt = self.tokenizer.prompt
        if self.training:
            prompts = self.objective.prompts or [prompt]
            prompt = prompts[self._random(epoch, int(positions[0]), 1).integers(len(prompts))]
        layout = lay_out(
            ids,
            prompt=self.tokenizer.encode_prompt(prompt),
            delimiter=self.tokenizer.delimiter_id,
            num_image_tokens=self.num_image_tokens,
            objective=self.objective,
            multiple=self.multiple,
        )
        pixels = torch.stack(images) if images else self._blank[None][:0]
        usage = self.shards.cache.take_usage() if self.shards.cache is not None else Counter()
        return Batch(pixels, layout, keys, shards, texts, len(positions), skipped, examples, usage)

    @property
    def _blank(self) -> Tensor:
        if self.features is None:
            return self.transform.blank()
        meta = self.features.meta
        return torch.zeros(meta.tokens, meta.width, dtype=getattr(torch, meta.dtype))

    def _random(self, *which: int) -> np.random.Generator:
        """Random numbers of a sample: the same in whichever batch and on whichever rank it is."""
        return np.random.default_rng([self.config.seed, *which])

    def pixels_of(self, raw: RawSample, epoch: int, position: int) -> Tensor:
        """A sample's image, uint8 [3, S, S], or with ``data.features`` its features [N, D_encoder].

        Raises:
            SampleError: the image has no features.
            ImageError: the image cannot be decoded.
        """
        if self.features is None:
            augment = None
            if self.augmentation is not None:
                seed = int(self._random(epoch, position, 2).integers(2**32))
                augment = partial(self.augmentation, seed=seed, sample=raw.name)
            return self.transform(raw.image, augment=augment, max_pixels=self.config.max_image_pixels, name=raw.name)
        try:
            features = self.features.read(raw.image)
        except KeyError:
            raise SampleError("no features", raw.key, raw.shard) from None
        if features is None:
            raise SampleError("bad image", raw.key, raw.shard)
        return features

    def labels_of(self, raw: RawSample) -> list[str]:
        """The labels of a sample that have tokens.

        Raises:
            SampleError: no label has.
        """
        labels = labels_of(raw, self.nouns)
        if self.training and raw.labels is not None and self.config.given_labels == "first":
            labels = labels[:1]
        labels = [label for label, ids in zip(labels, self.tokenizer.encode_labels(labels), strict=True) if ids]
        if not labels:
            raise SampleError("no labels", raw.key, raw.shard)
        return labels


def _places(path: str) -> dict[str, int]:
    """data.label_order: of each label, normalised, its first place in the file."""
    labels = map(normalise, read_lines(path, f"data.label_order: '{path}'", "Write one label per line."))
    places = {label: place for place, label in enumerate(dict.fromkeys(labels)) if label}
    if not places:
        raise UserError(f"data.label_order: '{path}' contains no label: write one per line.")
    return places


def report_skipped(examples: dict[str, str], known: Container[str]) -> None:
    """Log the first sample of each kind that is not ``known``."""
    for kind, example in examples.items():
        if kind not in known and kind != FILTERED:
            log.warning("Skipped, the first of its kind: %s", example)


def check_skipped(skipped: Counter, samples_read: int, limit: float, at_least: int = 0, where: str = "") -> None:
    """Check how many of ``samples_read`` samples were ``skipped``, once they are ``at_least`` so many, not filtered.

    Raises:
        UserError: of those that are not filtered, more than the share ``limit``; or all are filtered.
    """
    damaged = Counter({kind: count for kind, count in skipped.items() if kind != FILTERED})
    chosen = samples_read - skipped[FILTERED]
    if chosen >= at_least and damaged.total() > limit * chosen:
        raise UserError(
            f"{damaged.total()} of {chosen} samples{where} were skipped ({by_kind(damaged)}): more than "
            f"data.max_skip_fraction = {limit:g}. Check the shards, or raise the limit."
        )
    if not chosen and samples_read > 100 * at_least:
        raise UserError(
            f"data.where holds for none of {samples_read:,} samples{where}: compare its names with the fields of the "
            "samples' JSON."
        )
