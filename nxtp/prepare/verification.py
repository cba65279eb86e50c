"""Whether a set of shards is what its manifest says."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nxtp.data.images import ImageError, load_image
from nxtp.data.shards.manifest import MANIFEST, read_manifest, sha256_of
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.shards.tar_index import index_shard
from nxtp.data.shards.urls import sets_below
from nxtp.errors import UserError, printable
from nxtp.prepare.journal import JOURNAL


def verify(path: Path, workers: int, images: bool, console: Console) -> tuple[list[str], list[dict[str, Any]]]:
    """(what is wrong, a line each and none where all is as the manifest says; the manifest's rows that were checked)

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
        advice = sets_below(directory) or " The scripts in data/ write one."
        raise UserError(f"{directory} has no {MANIFEST}: nothing to check it against.{advice}")
    listed = {row["name"]: row for row in manifest["shards"]}
    there = _tars(directory) if only is None else [only]
    problems = [f"{name}: not in the manifest" for name in there if name not in listed]
    if only is not None:
        listed = {name: row for name, row in listed.items() if name == only}
    elif (directory / JOURNAL).exists():
        problems.append(f"{JOURNAL}: the preparation was interrupted; run the script again")
    outside = [name for name in listed if not re.fullmatch(r"[^/\\]+", name) or name in (".", "..")]
    problems += [f"{printable(name)}: not a file name; it is not looked at" for name in outside]
    rows = [row for name, row in sorted(listed.items()) if name not in outside]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checked = pool.map(lambda row: _check(directory / row["name"], row, images), rows)
        for found in track(checked, f"{directory}", total=len(rows), console=console, transient=True):
            problems += found
    return problems, rows


def _tars(directory: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(directory) if entry.name.endswith(".tar"))


def _check(path: Path, row: dict[str, Any], images: bool) -> list[str]:
    name = row["name"]
    try:
        size = path.stat().st_size
        if size != row["bytes"]:
            return [f"{name}: {size:,} bytes; the manifest says {row['bytes']:,}"]
        if sha256_of(path) != row["sha256"]:
            return [f"{name}: its SHA-256 is not the manifest's: damaged or replaced"]
        index = index_shard(str(path))
    except FileNotFoundError:
        return [f"{name}: missing"]
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})"]
    problems = []
    if len(index) != row["samples"]:
        problems.append(f"{name}: {len(index):,} samples; the manifest says {row['samples']:,}")
    if images:
        problems += _check_images(path)
    return problems


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
