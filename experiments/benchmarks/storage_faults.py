"""What do 5 % of failing requests cost, of shards on a web server?

    python experiments/benchmarks/storage_faults.py

A server on this machine sends shards over connections of bounded speed. Every sample of one epoch is read in training's
order, with prefetch, from an empty cache: without faults, and where a share of the requests stalls, is reset, answered
by 503, trickles or is truncated. Reading alone is timed: no image is decoded.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from sites import FAULTS, serving

from nxtp.bench.command import as_json, number
from nxtp.bench.reporting import build_table, machine_description, machine_line, show
from nxtp.data.sampler import ElasticBatchSampler
from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.manifest import write_manifest
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.shards.tar_index import IndexStore
from nxtp.prepare.writer import write_shard

SAMPLE_BYTES = 40_000


def read_epoch(
    site: Path, directory: Path, shards: int, mb_per_s: float, latency: float, share: float, seed: int
) -> dict:
    """One epoch from an empty cache: ``seconds``, ``mb``, ``read`` and ``lost`` samples, ``requests``, ``faults``."""
    chance, faults, count = random.Random(seed), Counter(), Counter()

    def fault(name: str, times: int) -> str | None:
        if name.endswith(".tar") and chance.random() < share:
            kind = chance.choice(FAULTS)
            faults[kind] += 1
            return kind
        return None

    with serving(site, fault=fault, bytes_per_s=1e6 * mb_per_s, latency=latency) as (url, handler):
        cache = RemoteCache(directory / "cache")
        urls = [f"{url}/{i:05d}.tar" for i in range(shards)]
        opened = IndexedShards(urls, cache, IndexStore(directory / "index"))
        sampler = ElasticBatchSampler(opened.sizes, 64, shuffle=True, shuffle_window=2_000, seed=seed)
        sampler.prefetch = opened.prefetch
        begin = time.perf_counter()
        for _, positions in sampler:
            for position in positions.tolist():
                try:
                    opened.read(position)
                    count["read"] += 1
                except SampleError:
                    count["lost"] += 1
        seconds = time.perf_counter() - begin
    mb = sum(path.stat().st_size for path in site.glob("*.tar")) / 1e6
    return {"seconds": seconds, "mb": mb, "requests": len(handler.asked), "faults": faults.total(), **count}


def measure(*, shards: int, mb: float, mb_per_s: float, latency: float, share: float, repeats: int) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        site, samples = Path(temporary, "site"), max(1, int(mb * 1e6 / SAMPLE_BYTES))
        image, infos = np.random.default_rng(0).bytes(SAMPLE_BYTES), []
        for i in range(shards):
            content = ({"__key__": f"{i}-{n}", "jpg": image, "txt": "a stone"} for n in range(samples))
            infos.append(write_shard(site / f"{i:05d}.tar", content))
        write_manifest(site, infos, made_by={})
        for repeat in range(repeats):
            for faulty in (0.0, share):
                directory = Path(temporary, f"{repeat}-{faulty}")
                rows.append(read_epoch(site, directory, shards, mb_per_s, latency, faulty, repeat))
    return {"rows": rows, "share": share, "machine": machine_description()}


def table(result: dict[str, Any]) -> Table:
    rows, lines = result["rows"], []
    for sound, faulty in zip(rows[::2], rows[1::2], strict=True):
        for name, row in (("no faults", sound), (f"{result['share']:.0%} faults", faulty)):
            counts = (f"{row.get(key, 0):,}" for key in ("read", "lost", "requests", "faults"))
            loss = f"{1 - sound['seconds'] / row['seconds']:.1%}" if row is faulty else ""
            lines.append((name, *counts, f"{row['mb'] / row['seconds']:.0f}", loss))
    columns = ("", "samples read", "lost", "requests", "of which failed", "MB/s", "loss")
    return build_table("Shards from a web server that fails", columns, lines, machine_line(result["machine"]))


@click.command(context_settings={"show_default": True})
@number("--shards", 256, "So many.")
@click.option("--mb", default=4.0, help="Size of a shard.")
@click.option("--mb-per-s", default=10.0, help="Speed of one connection.")
@click.option("--latency", default=0.03, help="Seconds before a request is answered.")
@click.option("--share", default=0.05, help="Of the requests that fail.")
@number("--repeats", 2, "Pairs of epochs.")
@as_json
def main(**options: Any) -> None:
    show(measure, table, **options)


if __name__ == "__main__":
    main()
