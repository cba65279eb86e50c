"""`nxtp bench data`: our shards → batches against plain PIL + WebDataset and open_clip's get_wds_dataset.

All three read the same shards on one core, in turn. Ours makes whole batches: shuffled samples, nouns of the captions,
tokens and layout. The others make pixels and keep the captions (open_clip tokenises them whole).
"""

from __future__ import annotations

import io
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import webdataset
from open_clip import image_transform
from PIL import Image
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from nxtp.bench.models import g3m
from nxtp.bench.reporting import build_table, machine_description, machine_line, ratio
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.labels.from_samples import label_counts
from nxtp.data.mixture import open_set
from nxtp.data.shards.manifest import write_manifest
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.urls import expand_shards
from nxtp.data.transforms import ImageTransform
from nxtp.errors import UserError
from nxtp.model.flops import peak_flops, training_flops
from nxtp.model.meta import meta_model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.prepare.writer import write_shard

SHARDS = 4
PHOTOS = 48  # distinct photographs, which repeat
WORDS = ("dog", "street", "table", "boy", "bicycle", "river", "window", "bread", "mountain", "lamp", "horse", "garden")
H100, MFU = "NVIDIA H100 80GB HBM3", 0.45  # the utilisation we aim at
COMPARED = 128  # images
OPEN_CLIP = "open_clip get_wds_dataset"

Way = Callable[[], Iterable[int]]  # one epoch: the number of images of each batch


def write_photos(directory: Path, images: int, width: int, height: int, seed: int, *, labelled: bool = False) -> None:
    """Shards of JPEGs of quality 88 with the amplitude spectrum of photographs (1/f), each with a caption.

    Args:
        labelled: 6 to 10 labels of 1 to 3 words in place of the caption.
    """
    generator = np.random.default_rng(seed)
    photos = [_photo(generator, width, height) for _ in range(min(PHOTOS, images))]
    bounds = np.linspace(0, images, min(SHARDS, images) + 1).astype(int)
    rows = []
    for number, (first, end) in enumerate(pairwise(bounds)):
        samples = (
            {"__key__": f"{i:06d}", "jpg": photos[i % len(photos)]}
            | ({"json": {"labels": _labels(generator)}} if labelled else {"txt": _caption(generator)})
            for i in range(first, end)
        )
        rows.append(write_shard(directory / f"{number:05d}.tar", samples))
    write_manifest(directory, rows, made_by={"bench": "data", "seed": seed})


def _photo(generator: np.random.Generator, width: int, height: int) -> bytes:
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = math.inf

    def plane() -> np.ndarray:
        noise = generator.normal(size=frequency.shape) + 1j * generator.normal(size=frequency.shape)
        values = np.fft.irfft2(noise / frequency, s=(height, width))
        return values / values.std()

    grey = plane()
    pixels = 128 + 48 * np.stack([grey + 0.3 * plane() for _ in range(3)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _caption(generator: np.random.Generator) -> str:
    first, second, third = generator.choice(WORDS, 3, replace=False)
    return f"a {first} near the old {second}, seen from a {third} in the morning"


def _labels(generator: np.random.Generator) -> list[str]:
    return [" ".join(generator.choice(WORDS, generator.integers(1, 4))) for _ in range(generator.integers(6, 11))]


def plain_batches(urls: Sequence[str], size: int, batch_size: int) -> Way:
    """WebDataset's decoder and torchvision's transforms, as in its documentation."""
    preprocess = image_transform(size, is_train=False)

    def epoch() -> Iterable[int]:
        samples = webdataset.WebDataset(list(urls), shardshuffle=False, empty_check=False)
        samples = samples.decode("pilrgb").to_tuple("jpg;png;jpeg;webp", "txt").map_tuple(preprocess, lambda text: text)
        return (len(images) for images, _ in DataLoader(samples.batched(batch_size, partial=True), batch_size=None))

    return epoch


def open_clip_batches(urls: Sequence[str], size: int, batch_size: int) -> Way | None:
    """open_clip's own pipeline with its tokenizer; None where it cannot be imported (it needs pandas)."""
    try:
        from open_clip import SimpleTokenizer
        from open_clip_train.data import get_wds_dataset
    except ImportError:
        return None
    tokenizer, preprocess = SimpleTokenizer(), image_transform(size, is_train=False)
    options = Namespace(val_data=list(urls), val_num_samples=None, batch_size=batch_size, workers=0)

    def epoch() -> Iterable[int]:
        loader = get_wds_dataset(options, preprocess, is_train=False, tokenizer=tokenizer).dataloader
        return (len(images) for images, _ in loader)

    return epoch


def pixel_difference(shards: IndexedShards, size: int) -> float:
    """Mean absolute difference, in levels of 255, to full decoding and torchvision's Resize and CenterCrop."""
    exact = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()])
    differences = []
    for position in np.unique(np.linspace(0, len(shards) - 1, COMPARED, dtype=int)):
        encoded = shards.read(int(position)).image
        ours = ImageTransform(size)(encoded).float()
        differences.append((ours - exact(Image.open(io.BytesIO(encoded)).convert("RGB"))).abs().mean().item())
    return sum(differences) / len(differences)


def measure_data(
    *, shards: str | None, images: int, width: int, height: int, size: int, batch_size: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Images per second and CPU time per image of each way, on ``shards`` or on ``images`` synthetic photographs.

    Returns:
        ``rows`` (way → ``images_per_s``, ``cpu_ms``), ``ratio_plain`` and ``ratio_open_clip`` (images per second, ours
        by theirs), ``pixel_difference`` in levels of 255, ``cores_per_h100``, the machine.

    Raises:
        UserError: the shards cannot be read, or the ways do not read the same number of images.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as temporary:
            if shards is None:
                write_photos(Path(temporary) / "shards", images, width, height, seed)
            result = _measure(shards or f"{temporary}/shards", f"{temporary}/index", size, batch_size, repeats)
    finally:
        torch.set_num_threads(threads)
    source = shards or f"synthetic photographs of {width}×{height}"
    return result | {"source": source, "size": size, "repeats": repeats, "machine": machine_description()}


def _measure(shards: str, index_dir: str, size: int, batch_size: int, repeats: int) -> dict[str, Any]:
    config = DataConfig(train=shards, batch_size=batch_size, num_workers=0, index_dir=index_dir)
    opened = open_set("train", shards, config).shards
    if len(opened) < batch_size:
        raise UserError(f"{shards} has {len(opened)} samples, fewer than one batch of {batch_size}.")
    tokenizer = train_tokenizer(label_counts(opened, config), vocab_size=8192)
    data = WebDatasetDataModule(config, tokenizer, transform=ImageTransform(size), num_image_tokens=256)
    urls = expand_shards(shards)
    ways: dict[str, Way] = {
        "ours": lambda: map(len, data.loader("train", config.train, training=True)),
        "PIL + WebDataset": plain_batches(urls, size, batch_size),
    }
    if open_clip := open_clip_batches(urls, size, batch_size):
        ways[OPEN_CLIP] = open_clip
    for epoch in ways.values():
        next(iter(epoch()))  # imports, indexes and files are read before the clock starts
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, epoch in ways.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            count = sum(epoch())
            wall[name].append((time.perf_counter() - begin) / count)
            cpu[name].append((time.process_time() - cpu_begin) / count)
            if not 0 <= len(opened) - count < batch_size:
                raise UserError(f"{name} read {count} of {len(opened)} images: the ways cannot be compared.")
    rows = {name: {"images_per_s": 1 / median(wall[name]), "cpu_ms": 1000 * median(cpu[name])} for name in ways}
    recipe = g3m()
    flops = training_flops(meta_model(recipe.config, None, recipe.optim.trainable)).total
    peak = peak_flops(H100, torch.bfloat16)
    assert peak is not None
    h100_images_per_s = peak * MFU / flops
    return {
        "rows": rows,
        "ratio_plain": ratio(wall["PIL + WebDataset"], wall["ours"]),
        "ratio_open_clip": ratio(wall[OPEN_CLIP], wall["ours"]) if OPEN_CLIP in wall else None,
        "pixel_difference": pixel_difference(opened, size),
        "images": len(opened),
        "h100_images_per_s": h100_images_per_s,
        "cores_per_h100": h100_images_per_s * rows["ours"]["cpu_ms"] / 1000,
    }


def data_table(result: dict[str, Any]) -> Table:
    ratios = (None, result["ratio_plain"], result["ratio_open_clip"])
    rows = [
        (name, f"{row['images_per_s']:,.0f}", f"{row['cpu_ms']:.2f}", f"{ratio:.2f}×" if ratio else "")
        for (name, row), ratio in zip(result["rows"].items(), ratios, strict=False)
    ]
    missing = "" if result["ratio_open_clip"] else "open_clip's pipeline is skipped: it needs pandas. "
    caption = (
        f"{missing}{result['images']:,} images ({result['source']}) at {result['size']} px; medians of "
        f"{result['repeats']} rounds. Ours with nouns, tokens and layout; its "
        f"pixels differ by {result['pixel_difference']:.3f} of 255 levels from exact decoding. An H100 that trains "
        f"experiment=g3m at {MFU:.0%} of its peak takes {result['h100_images_per_s']:,.0f} images/s: "
        f"{result['cores_per_h100']:.1f} such cores. {machine_line(result['machine'])}"
    )
    columns = ("", "images/s", "CPU ms per image", "ours / theirs")
    return build_table("Shards to batches on one core", columns, rows, caption)
