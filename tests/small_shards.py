"""Small shards for the tests; nothing heavy is imported."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from nxtp.data.shards.manifest import read_manifest, write_manifest
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.urls import expand_shards
from nxtp.prepare.writer import write_shard

COLOURS = {"rose": (200, 40, 60), "lemon": (220, 200, 40), "leaf": (40, 160, 60), "ocean": (30, 80, 200)}


def jpeg(colour: tuple[int, int, int], size: int = 32, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(number: int, *, labels: bool = False) -> dict:
    """Sample ``number``: one colour, named in its caption (and in its labels where asked)."""
    name = list(COLOURS)[number % len(COLOURS)]
    content = {"__key__": f"{number:06d}", "jpg": jpeg(COLOURS[name], seed=number), "txt": f"a {name} and a stone"}
    if labels:
        content["json"] = {"labels": [name, "stone"]}
    return content


def write_shards(directory: Path, sizes: list[int], *, labels: bool = False) -> Path:
    """Shards of the given sizes with consecutive samples, and their manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    infos, first = [], 0
    for index, size in enumerate(sizes):
        samples = [sample(first + i, labels=labels) for i in range(size)]
        infos.append(write_shard(directory / f"part-{index:05d}.tar", samples))
        first += size
    write_manifest(directory, infos, made_by={"test": True})
    return directory


def samples(directory: Path) -> dict[str, dict]:
    """Key → what a sample holds, after the reader and the manifest agree on their number."""
    shards = IndexedShards(expand_shards(directory))
    assert not shards.skipped
    assert read_manifest(directory)["samples"] == len(shards)
    raws = [shards.read(i) for i in range(len(shards))]
    return {raw.key: {"image": raw.image, "caption": raw.caption, "labels": raw.labels} for raw in raws}


def json_of(directory: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))
    return found


def picture(path: Path, number: int = 0, **save) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    if save:
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, **save)
    else:
        path.write_bytes(jpeg((90, 20 * number % 255, 30), seed=number))
    return path.read_bytes()


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}
