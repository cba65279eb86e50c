"""`nxtp bench data`: our shards → batches beside plain PIL + WebDataset and open_clip's get_wds_dataset.

All three read the same shards in this process on one core and are timed in turn (A B C A B C …). Ours makes whole
batches: shuffled samples, nouns found in the captions, labels tokenised and laid out; the others make pixels and
leave the captions as they are (open_clip: tokenises them whole).
"""

from __future__ import annotations

import io
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
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

from nxtp.bench.processes import machine_description
from nxtp.bench.workers import SIZES
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.images import load_image
from nxtp.data.labels.from_samples import label_texts
from nxtp.data.labels.nouns import noun_backend
from nxtp.data.mixture import open_set
from nxtp.data.shards.manifest import write_manifest
from nxtp.data.shards.urls import expand_shards
from nxtp.data.transforms import to_pixels
from nxtp.errors import UserError
from nxtp.model.flops import meta_model, peak_flops, training_flops
from nxtp.model.tokenizer import train_tokenizer
from nxtp.prepare.writer import write_shard

SHARDS = 4
PHOTOS = 48  # distinct ones, which are repeated
WORDS = ("dog", "street", "table", "boy", "bicycle", "river", "window", "bread", "mountain", "lamp", "horse", "garden")
H100, MFU = "NVIDIA H100 80GB HBM3", 0.45  # the utilisation we aim at
IMAGES_COMPARED = 128

Way = Callable[[], Iterator[int]]


def write_photos(directory: Path, images: int, width: int, height: int, seed: int) -> None:
    """Shards of JPEGs with the amplitude spectrum of photographs (1/f), quality 88, a caption each."""
    generator = np.random.default_rng(seed)
    photos = [_photo(generator, width, height) for _ in range(min(PHOTOS, images))]
    bounds = np.linspace(0, images, min(SHARDS, images) + 1).astype(int)
    rows = []
    for number, (first, end) in enumerate(pairwise(bounds)):
        samples = (
            {"__key__": f"{i:06d}", "jpg": photos[i % len(photos)], "txt": _caption(generator)}
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


def our_batches(data: WebDatasetDataModule) -> Way:
    def run() -> Iterator[int]:
        for batch in data.loader("train", data.config.train, training=True):
            yield len(batch)

    return run


def plain_batches(urls: Sequence[str], size: int, batch: int) -> Way:
    """WebDataset's decoder and torchvision's transforms, as its documentation shows them."""
    preprocess = image_transform(size, is_train=False)

    def run() -> Iterator[int]:
        samples = webdataset.WebDataset(list(urls), shardshuffle=False, empty_check=False)
        samples = samples.decode("pilrgb").to_tuple("jpg;png;jpeg;webp", "txt").map_tuple(preprocess, lambda text: text)
        for images, _ in DataLoader(samples.batched(batch, partial=True), batch_size=None):
            yield len(images)

    return run


def open_clip_batches(urls: Sequence[str], size: int, batch: int) -> Way | None:
    """open_clip's own pipeline with its tokenizer; None where it cannot be imported (it wants pandas)."""
    try:
        from open_clip import SimpleTokenizer
        from open_clip_train.data import get_wds_dataset
    except ImportError:
        return None
    tokenizer, preprocess = SimpleTokenizer(), image_transform(size, is_train=False)
    options = Namespace(val_data=list(urls), val_num_samples=None, batch_size=batch, workers=0)

    def run() -> Iterator[int]:
        for images, _ in get_wds_dataset(options, preprocess, is_train=False, tokenizer=tokenizer).dataloader:
            yield len(images)

    return run


def pixel_difference(data: WebDatasetDataModule, size: int) -> float:
    """Mean absolute difference, in levels of 255, to full decoding and torchvision's Resize and CenterCrop."""
    exact = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()])
    shards = data.open("train", data.config.train).shards
    differences = []
    for position in np.unique(np.linspace(0, len(shards) - 1, IMAGES_COMPARED, dtype=int)):
        encoded = shards.read(int(position)).image
        ours = to_pixels(load_image(encoded, near=size), size).float()
        differences.append((ours - exact(Image.open(io.BytesIO(encoded)).convert("RGB"))).abs().mean().item())
    return sum(differences) / len(differences)


def noun_seconds(data: WebDatasetDataModule) -> float:
    """Seconds to find the nouns of one caption, the first time it is met."""
    shards = data.open("train", data.config.train).shards
    captions = [shards.read(i).caption or "" for i in range(min(len(shards), 512))]
    nouns = noun_backend(data.config.nouns)
    nouns(captions[0])
    begin = time.process_time()
    for caption in captions:
        nouns(caption)
    return (time.process_time() - begin) / len(captions)


def flops_per_image() -> float:
    """Training FLOPs of one image under the published recipe, experiment=g3m."""
    recipe = SIZES["g3m"]
    return training_flops(meta_model(recipe.config(), None, recipe.trainable)).total


def measure_data(
    shards: str | None = None,
    images: int = 512,
    width: int = 640,
    height: int = 480,
    size: int = 224,
    batch: int = 64,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Images a second and CPU time an image of each way, on ``shards`` or on ``images`` synthetic photographs.

    Returns:
        ``rows`` (way → ``images_per_s``, ``cpu_ms``), ``ratio_plain`` and ``ratio_open_clip`` (images a second, ours
        by theirs), ``pixel_difference`` in levels of 255, ``noun_us``, ``cores_per_h100``, the machine.

    Raises:
        UserError: the shards cannot be read, or the ways do not give the same number of images.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as temporary:
            if shards is None:
                write_photos(Path(temporary) / "shards", images, width, height, seed)
            result = _measure(shards or f"{temporary}/shards", f"{temporary}/index", size, batch, repeats)
    finally:
        torch.set_num_threads(threads)
    source = shards or f"synthetic photographs of {width}×{height}"
    return result | {"source": source, "size": size, "repeats": repeats, "machine": machine_description()}


def _measure(shards: str, index_dir: str, size: int, batch: int, repeats: int) -> dict[str, Any]:
    config = DataConfig(train=shards, batch_size=batch, workers=0, index_dir=index_dir)
    opened = open_set("train", shards, config)
    if len(opened) < batch:
        raise UserError(f"{shards} holds {len(opened)} samples, fewer than one batch of {batch}.")
    tokenizer = train_tokenizer(label_texts(opened.shards, config), vocab_size=8192)
    data = WebDatasetDataModule(config, tokenizer, image_size=size, num_image_tokens=256)
    urls = expand_shards(shards)
    ways = {
        "ours": our_batches(data),
        "PIL + WebDataset": plain_batches(urls, size, batch),
        "open_clip get_wds_dataset": open_clip_batches(urls, size, batch),
    }
    ways = {name: way for name, way in ways.items() if way is not None}
    for way in ways.values():
        next(way())  # imports, indexes and files are read before anything counts
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            count = sum(way())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if not 0 <= len(opened) - count < batch:
                raise UserError(f"{name} gave {count} of {len(opened)} images: the ways cannot be compared.")
            seconds[name].append((wall / count, cpu / count))
    rows = {
        name: {"images_per_s": 1 / median(w for w, _ in times), "cpu_ms": 1000 * median(c for _, c in times)}
        for name, times in seconds.items()
    }

    def ratio(name: str) -> float | None:
        if name not in seconds:
            return None
        return median(theirs / ours for (ours, _), (theirs, _) in zip(seconds["ours"], seconds[name], strict=True))

    fed = peak_flops(H100, torch.bfloat16) * MFU / flops_per_image()
    return {
        "rows": rows,
        "ratio_plain": ratio("PIL + WebDataset"),
        "ratio_open_clip": ratio("open_clip get_wds_dataset"),
        "pixel_difference": pixel_difference(data, size),
        "noun_us": 1e6 * noun_seconds(data),
        "images": len(opened),
        "h100_images_per_s": fed,
        "cores_per_h100": fed * rows["ours"]["cpu_ms"] / 1000,
    }


def data_table(result: dict[str, Any]) -> Table:
    machine = result["machine"]
    table = Table(title="Shards to batches on one core", caption_justify="left")
    for column in ("", "images/s", "CPU ms an image", "ours / theirs"):
        table.add_column(column, justify="left" if not column else "right")
    ratios = ("", result["ratio_plain"], result["ratio_open_clip"])
    for (name, row), ratio in zip(result["rows"].items(), ratios, strict=False):
        shown = f"{ratio:.2f}×" if ratio else ""
        table.add_row(name, f"{row['images_per_s']:,.0f}", f"{row['cpu_ms']:.2f}", shown)
    missing = "" if result["ratio_open_clip"] else "open_clip's pipeline is left out: it needs pandas. "
    table.caption = (
        f"{missing}{result['images']:,} images ({result['source']}) at {result['size']} px; medians of "
        f"{result['repeats']} rounds. Ours with nouns ({result['noun_us']:.0f} µs a caption), tokens and layout; its "
        f"pixels differ by {result['pixel_difference']:.3f} of 255 levels from exact decoding. An H100 that trains "
        f"experiment=g3m at {MFU:.0%} of its peak takes {result['h100_images_per_s']:,.0f} images/s: "
        f"{result['cores_per_h100']:.1f} such cores. {machine['cpu']}, torch {machine['torch']}, {machine['date']}"
    )
    return table
