"""What img2dataset downloaded (Conceptual Captions 3M, SBU, LAION, …), read in place: a manifest is all it needs.

    img2dataset --url_list cc3m.tsv --input_format tsv --url_col url --caption_col caption \\
        --output_format webdataset --output_folder data/shards/cc3m/train --image_size 336 --resize_mode keep_ratio
    nxtp prepare img2dataset data/shards/cc3m/train

`nxtp train` reads its shards (00000.tar with 00000_stats.json) as they are. This script counts and hashes them, and
counts what img2dataset could not download. Shards of a download that was killed have no _stats.json and are counted as
unfinished: continue the download, then run this again. Shards that have not changed are not hashed twice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track

from nxtp.data.shards.manifest import ShardInfo, read_manifest, sha256_of, write_manifest
from nxtp.data.shards.tar_index import index_shard
from nxtp.errors import UserError
from nxtp.prepare.options import Script
from nxtp.prepare.writer import size_of


def describe_shard(path: Path, known: dict[str, ShardInfo], since: float) -> tuple[ShardInfo, Counter]:
    """The shard's line of the manifest, and what img2dataset and this reader skip, by kind."""
    skipped: Counter = Counter()
    stats = path.with_name(f"{path.stem}_stats.json")
    try:
        content = json.loads(stats.read_bytes())
        for status, count in content.get("status_dict", {}).items():
            if status != "success":
                skipped[f"img2dataset: {status}"[:120]] += count
    except FileNotFoundError:
        skipped["unfinished shard"] += 1
    except (ValueError, AttributeError, TypeError):
        skipped["unreadable _stats.json"] += 1
    index = index_shard(path)
    skipped.update(index.skipped)
    info, status = known.get(path.name), path.stat()
    if info is None or info.bytes != status.st_size or max(status.st_mtime, status.st_ctime) > since:
        info = ShardInfo(path.name, len(index), status.st_size, sha256_of(path))
    return info, skipped


def _not_writable(directory: Path, why: str) -> UserError:
    return UserError(f"{directory}: manifest.json cannot be written there ({why}): make the directory writable.")


@click.command(cls=Script)
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="all cores",
    help="Shards read at once.",
)
def main(directory: Path, workers: int) -> None:
    """Write DIRECTORY/manifest.json for img2dataset's shards there; the shards do not change.

    The shards come from https://github.com/rom1504/img2dataset with --output_format webdataset, which takes a list of
    URLs and captions: Conceptual Captions, SBU, LAION, …

    \b
    nxtp prepare img2dataset data/shards/cc3m/train
    """
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    shards = sorted(directory.glob("*.tar"))
    if not shards:
        raise UserError(f"{directory} has no *.tar: run img2dataset with --output_format webdataset.")
    if not os.access(directory, os.W_OK):
        raise _not_writable(directory, "no permission")
    before = read_manifest(directory)
    known = {row["name"]: ShardInfo(**row) for row in before["shards"]} if before else {}
    since = (directory / "manifest.json").stat().st_mtime if before else 0.0
    skipped: Counter = Counter()
    infos = []
    with ThreadPoolExecutor(workers) as pool:
        rows = pool.map(lambda shard: describe_shard(shard, known, since), shards)
        for info, more in track(rows, "hashing shards", total=len(shards), console=console):
            infos.append(info)
            skipped.update(more)
    try:
        write_manifest(directory, infos, made_by={"script": "img2dataset"}, skipped=dict(sorted(skipped.items())))
    except OSError as error:
        raise _not_writable(directory, error.strerror) from error
    console.print(f"{directory}: {size_of(infos)}.")
    for kind, count in skipped.most_common():
        console.print(f"  {count:>12,}  {kind}")
    if skipped["unfinished shard"]:
        console.print("Unfinished shards are read as far as they go: continue img2dataset, then run this again.")


if __name__ == "__main__":
    main()
