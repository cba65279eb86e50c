"""`nxtp features`: compute the features of a training set's images under a frozen encoder, once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nxtp.config import to_dataclass
from nxtp.data.config import DataConfig
from nxtp.data.features.store import DTYPES, FeatureStore, FeatureWriter, Meta, Part, fingerprint, image_key, in_parts
from nxtp.data.images import ImageError
from nxtp.data.mixture import OpenedSet, open_set
from nxtp.data.sampler import ElasticBatchSampler
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.transforms import ImageTransform
from nxtp.distributed.ranks import fabric_of, shared, together, torchrun_ranks
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError, one_of
from nxtp.model.encoder import Encoder
from nxtp.model.model import ModelConfig

log = logging.getLogger("nxtp")

PART_BYTES = 1 << 29  # of one part, about
PATIENCE = timedelta(days=1)  # of a rank whose share is computed, for the others


def extract(cfg: DictConfig) -> None:
    """Add to ``data.features`` what it lacks of the images of ``data.train`` (``data.fraction``, ``data.max_samples``).

    Ranks that torchrun has started share out the images and write one store.

    Raises:
        UserError: no directory is set, it is another encoder's, the disk has no room, or a rank has failed.
    """
    config = to_dataclass(DataConfig, cfg.data, "data")
    if config.features is None:
        raise UserError("data.features is not set: set the directory for the features.")
    dtype = str(cfg.features_dtype)
    one_of("features_dtype", dtype, DTYPES)
    ranks = torchrun_ranks("auto")
    fabric = fabric_of(ranks, "torchrun", PATIENCE) if ranks else None
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    encoder = Encoder(to_dataclass(ModelConfig, cfg.model, "model").encoder)
    encoder.requires_grad_(False).eval()
    encoder.to(fabric.device if fabric else "cuda" if torch.cuda.is_available() else "cpu")
    meta = Meta(fingerprint(encoder), encoder.num_tokens, encoder.width, dtype)

    def open_data(ranks: Ranks) -> tuple[OpenedSet, dict[str, Any]]:
        opened = open_set("train", config.train, config, ranks)
        return opened, {"encoder": meta.encoder, "data.train": {"plan": opened.plan} | opened.local}

    with together(fabric, open_data) as (opened, share):
        computed = sum(shared(compute(opened, config, encoder, meta, share)))
    if share[0] == 0:
        each, before = meta.bytes_each / 1e3, len(FeatureStore(config.features)) - computed
        counts = f"{computed} images computed, {before} before, equal ones once"
        log.info("%s: %s; %.0f kB each.", config.features, counts, each)


def compute(
    opened: OpenedSet, config: DataConfig, encoder: Encoder, meta: Meta, share: tuple[int, int]
) -> Iterator[int]:
    """Write a rank's share of what the store lacks of a set. Yields 0 once the store exists, then each part's images.

    Args:
        share: (rank, number of ranks).
    """
    rank, world = share
    writer = FeatureWriter(Path(config.features or ""), meta, share)
    yield 0
    store = FeatureStore(writer.directory)
    sampler = ElasticBatchSampler(
        opened.shards.sizes,
        config.val_batch_size,
        shuffle=False,
        sources=opened.sources,  # whose shares a part of the data has, as in training
        rank=rank,
        world=world,
        max_samples=config.max_samples,
        fraction=config.fraction,
        subset_seed=config.subset_seed,
    )
    writer.check_room(max(sampler.total - len(store), 0))
    loader = DataLoader(
        Missing(opened.shards, store, ImageTransform.of(encoder.config), config.max_image_pixels),
        sampler=sampler,
        batch_size=None,
        num_workers=config.num_workers,
    )

    def batches() -> Iterator[Part]:
        for keys, pixels, unusable in progress.track(loader, description="features"):
            if keys:
                with torch.inference_mode():
                    tokens = encoder(pixels.to(encoder.mean.device)).float().cpu()  # [n, N, D_encoder]
                yield keys, tokens.numpy(), unusable

    with Progress(disable=rank > 0) as progress:
        for part in in_parts(batches(), max(1, PART_BYTES // meta.bytes_each)):
            writer.write(*part)
            yield len(part[0])


class Missing(Dataset):
    """Map-style over batches of positions: the images that the store lacks, decoded. Runs in loader workers."""

    def __init__(self, shards: IndexedShards, store: FeatureStore, transform: ImageTransform, max_pixels: int):
        self.shards, self.store, self.transform, self.max_pixels = shards, store, transform, max_pixels

    def __getitem__(self, item: tuple[int, np.ndarray]) -> tuple[list[bytes], Tensor, np.ndarray]:
        """Keys [n], pixels uint8 [n, 3, S, S], and which could not be decoded, bool [n]."""
        _, positions = item
        found: dict[bytes, Tensor | None] = {}
        for position in positions.tolist():
            try:
                image = self.shards.read(position).image
            except SampleError:
                continue  # training skips it too
            key = image_key(image)
            if key in found or key in self.store:
                continue
            try:
                found[key] = self.transform(image, max_pixels=self.max_pixels)
            except ImageError:
                found[key] = None
        blank = self.transform.blank()
        pixels = torch.stack([blank if p is None else p for p in found.values()]) if found else blank[None][:0]
        return list(found), pixels, np.array([p is None for p in found.values()], dtype=bool)
