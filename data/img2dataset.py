"""What img2dataset downloaded (Conceptual Captions 3M, SBU, LAION, …), read in place: a manifest is all it needs.

The manifest lists the samples and hashes of the shards, and counts what img2dataset could not download. Shards of a
download that was killed have no _stats.json and are counted as unfinished. Unchanged shards are not hashed twice.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track

from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.counts import THREADS, UNAVAILABLE, header_counts, read_json, successes
from nxtp.data.shards.manifest import MANIFEST, ShardInfo, manifest_text, read_manifest, sha256_of, write_manifest
from nxtp.data.shards.remote import find_files, open_store
from nxtp.data.shards.tar_index import IndexStore, index_shard
from nxtp.data.shards.urls import is_remote
from nxtp.errors import UserError, by_kind
from nxtp.prepare.options import Script
from nxtp.prepare.writer import size_of

MADE_BY = {"script": "img2dataset"}


def outcome(url: str, cache: RemoteCache | None = None, *, written: bool) -> Counter:
    """What img2dataset skipped, by kind.

    Args:
        written: whether the shard has a _stats.json.
    """
    if not written:
        return Counter({"unfinished shard": 1})
    content = read_json(f"{url.removesuffix('.tar')}_stats.json", cache)
    try:
        statuses = Counter({f"img2dataset: {status}"[:120]: int(n) for status, n in content["status_dict"].items()})
    except KeyError:
        return Counter()
    except (ValueError, AttributeError, TypeError):
        return Counter({"unreadable _stats.json": 1})
    del statuses["img2dataset: success"]
    return statuses


def describe_shard(path: Path, known: dict[str, ShardInfo], since: float) -> tuple[ShardInfo, Counter]:
    """The shard's line of the manifest, and what img2dataset and this reader skip, by kind."""
    skipped = outcome(str(path), written=path.with_name(f"{path.stem}_stats.json").exists())
    index = index_shard(path)
    skipped.update(index.skipped)
    info, status = known.get(path.name), path.stat()
    if info is None or info.bytes != status.st_size or max(status.st_mtime, status.st_ctime) > since:
        info = ShardInfo(path.name, len(index), status.st_size, sha256_of(path))
    return info, skipped


@click.command(cls=Script)
@click.argument("directory")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="all cores",
    help="Shards read at once.",
)
def main(directory: str, workers: int) -> None:
    """Write DIRECTORY/manifest.json for img2dataset's shards there; the shards do not change.

    The shards come from https://github.com/rom1504/img2dataset with --output_format webdataset, which takes a list of
    URLs and captions: Conceptual Captions, SBU, LAION, …

    \b
    img2dataset --url_list cc3m.tsv --input_format tsv --url_col url --caption_col caption \\
        --output_format webdataset --output_folder data/shards/cc3m/train --image_size 336 --resize_mode keep_ratio
    nxtp prepare img2dataset data/shards/cc3m/train
    nxtp prepare img2dataset s3://bucket/laion      img2dataset's counts are believed; nothing is hashed
    """
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    directory = directory.rstrip("/")
    infos, skipped = (remote if is_remote(directory) else local)(directory, workers, console)
    console.print(f"{directory}: {size_of(infos)}.")
    for kind, count in skipped.most_common():
        console.print(f"  {count:>12,}  {kind}")
    if skipped["unfinished shard"]:
        console.print("Unfinished shards are read as far as they go: continue img2dataset, then run this again.")


def remote(directory: str, workers: int, console: Console) -> tuple[list[ShardInfo], Counter]:
    """Samples as img2dataset has counted them, else by the shards' headers."""
    sizes = {entry["url"]: entry["size"] for entry in find_files(directory) if entry["type"] == "file"}
    urls = sorted(url for url in sizes if url.endswith(".tar") and url != directory)  # a file is listed as itself
    if not urls:
        raise _no_shards(directory)
    cache = RemoteCache(Path(tempfile.gettempdir()) / "nxtp")  # nothing is fetched from a store that lists its files

    def ask(url: str) -> tuple[int | None, Counter]:
        return successes(url, cache), outcome(url, cache, written=f"{url.removesuffix('.tar')}_stats.json" in sizes)

    with ThreadPoolExecutor(max(workers, THREADS)) as pool:
        rows = list(track(pool.map(ask, urls), "reading _stats.json", total=len(urls), console=console))
    samples = {url: count for url, (count, _) in zip(urls, rows, strict=True)}
    skipped = sum((more for _, more in rows), Counter())
    rest = [url for url in urls if samples[url] is None]
    for url, (count, more) in zip(rest, header_counts(rest, cache, IndexStore(), shown=True), strict=True):
        if set(more) & set(UNAVAILABLE):
            raise UserError(f"{url} cannot be read ({by_kind(more)}): nothing is written. Run this again.")
        samples[url] = count
        skipped.update(more)
    infos = [ShardInfo(url.rpartition("/")[2], samples[url] or 0, sizes[url], "") for url in urls]
    store, path = open_store(f"{directory}/{MANIFEST}")
    try:
        store.pipe_file(path, manifest_text(infos, made_by=MADE_BY, skipped=skipped))
    except Exception as error:  # each store has errors of its own
        raise _not_writable(directory, str(error) or type(error).__name__) from error
    return infos, skipped


def local(directory: str, workers: int, console: Console) -> tuple[list[ShardInfo], Counter]:
    place = Path(directory)
    shards = sorted(place.glob("*.tar"))
    if not shards:
        raise _no_shards(directory)
    if not os.access(place, os.W_OK):
        raise _not_writable(directory, "no permission")
    before = read_manifest(place)
    known = {row["name"]: ShardInfo(**row) for row in before["shards"]} if before else {}
    since = (place / MANIFEST).stat().st_mtime if before else 0.0
    skipped: Counter = Counter()
    infos = []
    with ThreadPoolExecutor(workers) as pool:
        rows = pool.map(lambda shard: describe_shard(shard, known, since), shards)
        for info, more in track(rows, "hashing shards", total=len(shards), console=console):
            infos.append(info)
            skipped.update(more)
    try:
        write_manifest(place, infos, made_by=MADE_BY, skipped=skipped)
    except OSError as error:
        raise _not_writable(directory, error.strerror) from error
    return infos, skipped


def _no_shards(directory: str) -> UserError:
    return UserError(f"{directory} has no *.tar: run img2dataset with --output_format webdataset.")


def _not_writable(directory: str, why: str) -> UserError:
    return UserError(f"{directory}: manifest.json cannot be written there ({why}): make the directory writable.")


if __name__ == "__main__":
    main()
