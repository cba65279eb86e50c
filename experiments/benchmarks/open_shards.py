"""How soon are 14,000 remote shards with a manifest ready to be read, and in how much memory?

    python experiments/benchmarks/open_shards.py

In 1 to 2 s on idle cores; the set adds 27 to 37 MB to a rank and 10 MB to each loader process (docs/data.md). No shard
exists: what is measured happens before the first one is read. The set is opened by several ranks in turn, each as it
would be in a process of its own.
"""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory
from typing import Any

import click
import fsspec
import numpy as np
import psutil
from rich.table import Table
from torch.distributed import HashStore
from torch.utils.data import DataLoader, Dataset

from nxtp.bench.command import as_json, number
from nxtp.bench.command import seed as seed_option
from nxtp.bench.reporting import build_table, machine_description, machine_line, show
from nxtp.data.config import DataConfig
from nxtp.data.mixture import open_set
from nxtp.data.sampler import ElasticBatchSampler
from nxtp.data.shards.manifest import MANIFEST, ShardInfo, manifest_text
from nxtp.data.shards.reader import IndexedShards
from nxtp.distributed.rendezvous import Ranks

SAMPLES = 5_050  # of a shard on average: 14,000 of them have the 70.7 million of G70M
LARGEST_GAP = 50  # that their numbers differ from it


def measure(*, shards: int, ranks: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Open ``shards`` shards by the first and the last of ``ranks``, and take the first step of an epoch.

    Returns:
        ``rows``: of either rank ``opened_s``, ``first_batch_s``, ``set_mb`` (resident memory that the set and its order
        have added so far), ``memory_mb`` (all of it, with imported libraries), ``own_mb`` of it that no other process
        shares, and ``worker_mb`` that a loader process adds; ``plan``, and whether both have the same one and parts of
        the same step (``agree``); the machine.
    """
    generator = np.random.default_rng(seed)
    sizes = generator.integers(SAMPLES - LARGEST_GAP, SAMPLES + LARGEST_GAP, shards).tolist()
    infos = [ShardInfo(f"{i:05d}.tar", n, 50_000 * n, f"{i:064x}") for i, n in enumerate(sizes)]
    bucket = fsspec.filesystem("memory")
    bucket.pipe_file(f"/scale/{MANIFEST}", manifest_text(infos, made_by={"bench": "scale"}))
    store, rows, plans, steps = HashStore(), {}, [], []
    before = psutil.Process().memory_info().rss
    with TemporaryDirectory() as temporary:
        spec = f"memory://scale/{{00000..{shards - 1:05d}}}.tar"
        config = DataConfig(batch_size=batch_size, cache_dir=f"{temporary}/cache", index_dir=f"{temporary}/index")
        for rank in (0, ranks - 1):
            begin = time.perf_counter()
            opened = open_set("train", spec, config, Ranks(store, rank, ranks, running=False))
            opened_s = time.perf_counter() - begin
            sampler = ElasticBatchSampler(
                opened.shards.sizes, batch_size, shuffle=True, sources=opened.sources, rank=rank, world=ranks
            )
            steps.append(set(next(iter(sampler))[1].tolist()))
            memory = psutil.Process().memory_full_info()
            worker = next(iter(DataLoader(_OwnMemory(opened.shards), None, sampler=sampler, num_workers=1)))
            rows[f"rank {rank}"] = {
                "opened_s": opened_s,
                "first_batch_s": time.perf_counter() - begin,
                "set_mb": (memory.rss - before) / 1e6,
                "memory_mb": memory.rss / 1e6,
                "own_mb": memory.uss / 1e6,
                "worker_mb": worker / 1e6,
            }
            plans.append(opened.plan)
    bucket.rm("/scale", recursive=True)
    agree = plans[0] == plans[-1] and not set.intersection(*steps)
    return {"rows": rows, "plan": plans[0], "ranks": ranks, "agree": agree, "machine": machine_description()}


class _OwnMemory(Dataset):
    """What a loader process has of its own, in bytes, once it has found the shards of a batch."""

    def __init__(self, shards: IndexedShards):
        self.shards = shards

    def __getitem__(self, item: tuple[int, np.ndarray]) -> int:
        for position in item[1].tolist():
            self.shards.shard_of(position)
        return psutil.Process().memory_full_info().uss


def table(result: dict[str, Any]) -> Table:
    sizes = ((key, ",.0f") for key in ("set_mb", "memory_mb", "own_mb", "worker_mb"))
    figures = (("opened_s", ".1f"), ("first_batch_s", ".1f"), *sizes)
    rows = [(name, *(f"{row[key]:{form}}" for key, form in figures)) for name, row in result["rows"].items()]
    agree = "the same plan, and parts of one step" if result["agree"] else "DIFFERENT plans, or the same samples"
    caption = f"{result['plan']}; both of {result['ranks']} ranks have {agree}. {machine_line(result['machine'])}"
    memory = ("MB for it", "the process", "not shared", "a loader process")
    columns = ("", "s until opened", "until the first batch", *memory)
    return build_table("Remote shards with a manifest", columns, rows, caption)


@click.command()
@as_json
@seed_option
@number("--shards", 14_000, "Of the set; none of them is read.")
@number("--ranks", 256, "Of which the first and the last open it.")
@number("--batch-size", 64, "Images per batch.")
def open_shards(**options: Any) -> None:
    """Seconds and memory until a remote set of many shards is ready for its first batch."""
    show(measure, table, **options)


if __name__ == "__main__":
    open_shards()
