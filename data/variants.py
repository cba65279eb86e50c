"""Shifted variants of a set of shards: noise, blur or edges in its pictures; captions and labels stay the same.

A variant is a function of the set, its kind, strength and seed: a second run does nothing.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from nxtp.data.images import ImageError, load_image
from nxtp.data.shards.manifest import manifest_hash
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.shards.urls import expand_shards
from nxtp.errors import UserError
from nxtp.prepare.options import Script, WriterOptions
from nxtp.prepare.writer import Skip, write_set

KINDS = {
    "noise": (0.15, "standard deviation of Gaussian noise, as a fraction of the range"),
    "blur": (0.03, "radius of a Gaussian blur, as a fraction of the short side"),
    "edges": (1.0, "contrast of dark edges on white, like a sketch"),
}


def alter(image: Image.Image, kind: str, strength: float, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of the same size."""
    if kind == "noise":
        pixels = np.asarray(image, dtype=np.float32) + rng.normal(0, 255 * strength, (*image.size[::-1], 3))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength * min(image.size)))
    edges = image.convert("L").filter(ImageFilter.GaussianBlur(0.5)).filter(ImageFilter.FIND_EDGES)
    edges = ImageOps.crop(edges, 1).resize(image.size)  # the filter leaves a frame
    return ImageOps.invert(edges.point(lambda value: min(255, round(3 * strength * value)))).convert("RGB")


def altered(position: int, shards: IndexedShards, kind: str, strength: float, seed: int) -> dict[str, Any]:
    """Sample ``position`` of a set, as a shard's sample.

    Raises:
        Skip: its picture cannot be read.
    """
    try:
        raw = shards.read(position)
        picture = load_image(raw.image)
    except SampleError as fault:
        raise Skip(fault.kind) from None
    except ImageError:
        raise Skip("bad image") from None
    jpeg = io.BytesIO()
    alter(picture, kind, strength, np.random.default_rng([seed, position])).save(
        jpeg, "JPEG", quality=95, subsampling=0
    )
    sample = {"__key__": f"{position:08d}", "jpg": jpeg.getvalue()}
    if raw.caption is not None:
        sample["txt"] = raw.caption
    if raw.labels is not None:
        sample["json"] = {"labels": list(raw.labels)}
    return sample


@click.command(cls=Script, context_settings={"show_default": True})
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--kind", type=click.Choice(list(KINDS)), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the shards.")
@click.option("--strength", type=float, help="; ".join(f"{k}: {text} [{v:g}]" for k, (v, text) in KINDS.items()))
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the noise.")
@click.option("--shard-size", type=click.IntRange(1), default=5_000, help="Samples per shard.")
@click.option("--workers", type=click.IntRange(1), default=2, help="Processes.")
@click.option("--overwrite", is_flag=True, help="Replace a set that was made with other options.")
def main(source, kind, out, strength, seed, shard_size, workers, overwrite):
    """A shifted variant of the shards in SOURCE.

    \b
    nxtp prepare variants data/shards/classes/val --kind blur --out data/shards/classes/val_blur
    """
    if strength is None:
        strength = KINDS[kind][0]
    if strength <= 0:
        raise UserError(f"--strength must be > 0, got {strength:g} ({KINDS[kind][1]}).")
    shards = IndexedShards(expand_shards(str(source)))
    made_by = {"script": "variants", "version": 1, "kind": kind, "strength": strength, "seed": seed}
    made_by |= {"source": source.name, "manifest": manifest_hash(source)}
    make = partial(altered, shards=shards, kind=kind, strength=strength, seed=seed)
    options = WriterOptions(shard_size, workers, overwrite=overwrite)
    write_set(out, range(len(shards)), make, made_by=made_by, options=options)


if __name__ == "__main__":
    main()
