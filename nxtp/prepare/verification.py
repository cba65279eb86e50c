"""Does a set of shards match its manifest?"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nxtp.data.images import ImageError, load_image
from nxtp.data.shards.manifest import MANIFEST, ShardInfo, read_manifest, sha256_of
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.shards.tar_index import index_shard
from nxtp.data.shards.urls import sets_below
from nxtp.errors import UserError, printable
from nxtp.prepare.writer import UNFINISHED


def verify_set(path: Path, workers: int, images: bool) -> tuple[list[str], list[ShardInfo]]:
    """(problems, one line each; the manifest's shards that were checked)

    Args:
        path: a directory of shards, or one shard, which is checked against the manifest beside it.
        workers: files read at once.
        images: also decode every image and compare it with its checksum.

    Raises:
        UserError: no manifest, or one that cannot be read.
    """
    directory, only = (path, None) if path.is_dir() else (path.parent, path.name)
    manifest = read_manifest(directory)
    if manifest is None:
        advice = (only is None and sets_below(path)) or " nxtp prepare writes one."
        beside = "" if only is None else " beside it"
        raise UserError(f"{path} has no {MANIFEST}{beside}: nothing to check it against.{advice}")
    listed = {row["name"]: ShardInfo(**row) for row in manifest["shards"] if only in (None, row["name"])}
    present = sorted(tar.name for tar in directory.glob("*.tar")) if only is None else [only]
    problems = [f"{name}: not in the manifest" for name in present if name not in listed]
    if only is None and any((directory / UNFINISHED).glob("*")):
        problems.append("the preparation was interrupted; run it again")
    outside = [name for name in listed if not re.fullmatch(r"[^/\\]+", name) or name in (".", "..")]
    problems += [f"{printable(name)}: not a file name; not read" for name in outside]
    shards = [shard for name, shard in sorted(listed.items()) if name not in outside]
    with ThreadPoolExecutor(workers) as pool:
        checked = pool.map(lambda shard: _check(directory / shard.name, shard, images), shards)
        console = Console(stderr=True)
        for found in track(checked, f"{directory}", total=len(shards), console=console, transient=True):
            problems += found
    return problems, shards


def _check(path: Path, shard: ShardInfo, images: bool) -> list[str]:
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return [f"{path.name}: {size:,} bytes; the manifest says {shard.bytes:,}"]
        if shard.sha256 and sha256_of(path) != shard.sha256:
            return [f"{path.name}: another SHA-256 than in the manifest: damaged or replaced"]
        samples = len(index_shard(str(path)))
    except FileNotFoundError:
        return [f"{path.name}: missing"]
    except OSError as error:
        return [f"{path.name}: cannot be read ({error.strerror})"]
    problems = []
    if samples != shard.samples:
        problems.append(f"{path.name}: {samples:,} samples; the manifest says {shard.samples:,}")
    return problems + (_check_images(path) if images else [])


def _check_images(path: Path) -> list[str]:
    shards = IndexedShards([path])
    problems = []
    for position in range(len(shards)):
        try:
            raw = shards.read(position)
            load_image(raw.image, name=raw.key)
        except SampleError as fault:
            problems.append(f"{path.name}: {printable(fault.key)}: {fault.kind}")
        except ImageError as error:
            problems.append(f"{path.name}: {error}")
    return problems
