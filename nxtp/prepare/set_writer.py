"""A set of shards with its manifest, made in parallel, resumable: what all preparation scripts end in.

A journal beside the shards names those that are finished, so a killed run continues: finished shards are verified and
kept, the unfinished one is made again. The journal becomes the manifest at the end; a second run with the same options
does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nxtp.data.shards.manifest import ShardInfo, read_manifest, write_manifest
from nxtp.errors import UserError, counted
from nxtp.prepare.journal import open_journal
from nxtp.prepare.options import Writing
from nxtp.prepare.shard_pool import write_shards
from nxtp.prepare.skipped import LeftOut


def write_set(
    out: Path | str,
    items: Sequence[Any],
    make: Callable[[Any], Mapping[str, Any]],
    *,
    made_by: Mapping[str, Any],
    skipped: LeftOut | None = None,
    nouns: Mapping[str, Any] | None = None,
    writing: Writing | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write ``make(item)`` of all items, in their order, as shards of ``out`` with a manifest; see the module.

    ``make`` is a picklable function that returns a sample (see :func:`nxtp.prepare.shard_writer.write_shard`) or raises
    :class:`nxtp.prepare.shard_pool.Skip`. Returns the manifest.

    Raises:
        UserError: no items, ``out`` holds a set made with other options, another process writes there, or the disk
            is full.
    """
    out, writing, console = Path(out), writing or Writing(), console or Console(stderr=True)
    skipped = skipped or LeftOut()
    made_by = json.loads(json.dumps({**made_by, "nouns": dict(nouns or {})}))
    if not items:
        raise UserError(f"{out}: the source gives no sample{skipped.told(' (left out: {})')}.")
    with open_journal(out, made_by, writing.overwrite) as journal:
        bounds = range(0, len(items), writing.shard_size)
        jobs = {f"{out.name}-{n:05d}.tar": slice(first, first + writing.shard_size) for n, first in enumerate(bounds)}
        rows = write_shards(out, items, make, jobs, journal.finished(list(jobs)), journal, writing, console)
        if journal.whole:
            manifest = read_manifest(out)
            text = f"{out}: {counted(manifest['samples'], 'sample')} as the manifest says, nothing to do."
            console.print(text, highlight=False, soft_wrap=True)
            return manifest
        totals = LeftOut(journal.skipped)
        if journal.skipped is None:
            rows.sort(key=lambda row: row["info"]["name"])
            totals.update(skipped.counts, skipped.names)
            for row in rows:
                totals.update(row["skipped"], row.get("names", {}))
        infos = [ShardInfo(**row["info"]) for row in rows if row["info"]["samples"]]
        if not infos:
            raise UserError(f"{out}: no source item could be used{totals.told(' ({})')}.")
        write_manifest(out, infos, made_by=made_by, nouns=nouns, skipped=dict(sorted(totals.counts.items())))
        journal.finish()
    manifest = read_manifest(out)
    told = totals.told("; left out: {}")
    size = f"{manifest['bytes'] / 1e9:.2f} GB" if manifest["bytes"] >= 1e7 else f"{manifest['bytes'] / 1e3:.0f} kB"
    text = f"{out}: {counted(manifest['samples'], 'sample')} in {counted(len(infos), 'shard')}, {size}{told}."
    console.print(text, highlight=False, soft_wrap=True)
    return manifest
