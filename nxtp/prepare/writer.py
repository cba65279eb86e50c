"""Source items → a directory of WebDataset shards with a manifest, written by several processes.

A shard is written inside the hidden folder ``.unfinished`` and renamed into place; then one small JSON there says that
it is finished. The manifest is the union of these JSONs, and the folder goes when it is written. A run on a directory
that already has shards checks them by size and SHA-256 and writes only those that are missing or damaged.
"""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from nxtp.data.shards.manifest import MANIFEST, ShardInfo, read_manifest, sha256_of, write_manifest
from nxtp.data.shards.urls import IMAGE_EXTENSIONS, METADATA_NAME, split_name
from nxtp.errors import UserError, by_kind, counted, some_of
from nxtp.prepare.options import WriterOptions
from nxtp.runs.atomic import atomic_file, read_json, remove, write_json

UNFINISHED = ".unfinished"
_NAMED = 3  # skipped items of each kind that are named

Make = Callable[[Any], Mapping[str, Any]]


class Skip(Exception):
    """A source item gives no sample; the argument is the kind under which it is counted."""


@dataclass
class Skipped:
    """Skipped source items: ``counts`` by kind, and the first ``names`` of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, *names: str, count: int = 1) -> None:
        self.counts[kind] += count
        self.names[kind] = [*self.names.get(kind, ()), *names][:_NAMED]

    def __str__(self) -> str:
        """A sentence to append to a message; empty if nothing was skipped."""
        return f" Skipped: {by_kind(self.counts, self.names)}." if self.counts else ""


def write_shard(path: Path | str, samples: Iterable[Mapping[str, Any]]) -> ShardInfo:
    """Write a shard; the same samples give the same bytes, and ``path`` appears only when it is complete.

    A sample is ``{"__key__": "000001", "jpg": bytes, "txt": str, "json": dict}``, with one image under one of
    :data:`IMAGE_EXTENSIONS`; texts are written as UTF-8, dicts as JSON with sorted keys.

    Raises:
        ValueError: a key that comes twice or that WebDataset would split elsewhere; no image; a wrong value.
    """
    path = Path(path)
    keys: set[str] = set()
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for sample in samples:
            key = sample["__key__"]
            if key in keys:
                raise ValueError(f"{path.name}: key {key!r} comes twice")
            keys.add(key)
            for extension, data in sorted(_encode_sample(key, sample).items()):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return ShardInfo(path.name, len(keys), path.stat().st_size, sha256_of(path))


def _encode_sample(key: str, sample: Mapping[str, Any]) -> dict[str, bytes]:
    """Extension → bytes, without the key."""
    members = {}
    for extension, value in sample.items():
        if extension == "__key__":
            continue
        name = f"{key}.{extension}"
        if split_name(name) != (key, extension) or extension != extension.lower() or METADATA_NAME.match(name):
            raise ValueError(f"{name!r} would not be read back as sample {key!r}, member {extension!r}")
        if extension == "json":
            value = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        members[extension] = value.encode() if isinstance(value, str) else value
        if not isinstance(members[extension], bytes):
            raise ValueError(f"{name!r} must be bytes, not {type(value).__name__}")
    if sum(extension in members for extension in IMAGE_EXTENSIONS) != 1:
        raise ValueError(f"sample {key!r} must have one image ({', '.join(IMAGE_EXTENSIONS)}): {sorted(members)}")
    return members


def write_set(
    out: Path | str,
    items: Sequence[Any],
    make: Make,
    *,
    made_by: Mapping[str, Any],
    skipped: Skipped | None = None,
    nouns: Mapping[str, Any] | None = None,
    options: WriterOptions | None = None,
) -> dict[str, Any]:
    """Write ``make(item)`` of all items, in their order, as shards in ``out`` with a manifest.

    Args:
        make: a picklable function that returns a sample (see :func:`write_shard`) or raises :class:`Skip`.
        made_by: what the samples depend on; a set that was made by something else is not replaced.
        skipped: what the source has and ``items`` lacks.
        nouns: name and version of the noun backend; part of ``made_by``.

    Returns:
        The manifest.

    Raises:
        UserError: no items, ``out`` contains another set, another process writes there, or the disk is full.
    """
    out, options, skipped = Path(out), options or WriterOptions(), skipped or Skipped()
    made_by = json.loads(json.dumps({**made_by, "nouns": dict(nouns or {})}))
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if not items:
        raise UserError(f"{out}: the source gives no sample.{skipped}")
    with _locked(out) as folder:
        manifest = _finished_set(out, made_by, options.overwrite)
        starts = range(0, len(items), options.shard_size)
        jobs = {f"{out.name}-{n:05d}.tar": items[i : i + options.shard_size] for n, i in enumerate(starts)}
        known: dict[str, Any] = {name: read_json(folder / f"{name}.json") for name in jobs}  # None: written again
        if manifest is not None:  # it does not list shards without samples
            known = {name: {"info": {"samples": 0}} for name in jobs}
            known |= {row["name"]: {"info": row} for row in manifest["shards"]}
        tasks = [(out / name, part, make, known[name]) for name, part in jobs.items()]
        try:
            results = _run(tasks, options.workers, console)
        except (OSError, BrokenProcessPool) as error:
            why = error.strerror if isinstance(error, OSError) else "a worker was killed; is memory short?"
            raise UserError(f"{out} cannot be written ({why}). Run the same command again to continue.") from error
        if manifest is not None and all(state == "kept" for _, state in results):
            console.print(f"{out}: {counted(manifest['samples'], 'sample')} as in the manifest, nothing to do.")
            return manifest
        if again := [row["info"]["name"] for row, state in results if state == "written again"]:
            console.print(f"{out}: {counted(len(again), 'shard')} missing or damaged, written again: {some_of(again)}.")
        if manifest is not None:
            skipped.counts = Counter(manifest["skipped"])  # the same source has the same
        else:
            for row, _ in results:
                for kind, (count, names) in row["skipped"].items():
                    skipped.add(kind, *names, count=count)
        infos = [ShardInfo(**row["info"]) for row, _ in results if row["info"]["samples"]]
        if not infos:
            remove(folder)  # the next run tries all items again
            raise UserError(f"{out}: no item of the source can be used.{skipped}")
        write_manifest(folder, infos, made_by=made_by, nouns=nouns, skipped=dict(sorted(skipped.counts.items())))
        os.replace(folder / MANIFEST, out / MANIFEST)
    console.print(f"{out}: {size_of(infos)}.{skipped}")
    return read_manifest(out) or {}


def size_of(infos: Sequence[ShardInfo]) -> str:
    """ "2,000 samples in 1 shard, 3.10 MB"."""
    samples, size = sum(info.samples for info in infos), sum(info.bytes for info in infos)
    return f"{counted(samples, 'sample')} in {counted(len(infos), 'shard')}, {decimal(size)}"


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """The hidden folder of ``out``, for this process alone; it goes when the set is finished."""
    folder = out / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / "lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(lock.fileno()).st_nlink > 0  # else another run has just ended, and removed the file
        except OSError:
            free = False
        if not free:
            raise UserError(f"{out} is being written by another process.")
        for torn in folder.glob("*.tmp"):  # of a killed run
            torn.unlink()
        try:
            yield folder
        finally:
            if (out / MANIFEST).exists() or not any(folder.glob("*.json")):
                remove(folder)


def _finished_set(out: Path, made_by: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest, if the set in ``out`` is finished; other sets are refused, or removed with ``overwrite``."""
    try:
        manifest = read_manifest(out)
    except UserError:
        if not overwrite:
            raise
        manifest = None
    settings = out / UNFINISHED / "settings.json"
    found = manifest["made_by"] if manifest else read_json(settings)
    if found == made_by:
        return manifest
    shards = list(out.glob("*.tar"))
    if not overwrite and (shards or found is not None):
        changed = sorted(key for key in {*(found or {}), *made_by} if (found or {}).get(key) != made_by.get(key))
        what = "shards of unknown origin" if found is None else f"a set made with other options ({', '.join(changed)})"
        raise UserError(f"{out} contains {what}: choose another --out, or add --overwrite.")
    for old in (out / MANIFEST, *shards, *settings.parent.glob("*.json")):
        old.unlink(missing_ok=True)
    write_json(settings, made_by)
    return None


def _run(tasks: Sequence[tuple], workers: int, console: Console) -> list[tuple[dict[str, Any], str]]:
    """:func:`_finish_shard` of all tasks, in their order, with a progress bar; one worker is this process."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress("{task.description}", *columns, console=console) as progress:
        bar = progress.add_task(tasks[0][0].parent.name, total=sum(len(items) for _, items, *_ in tasks))

        def finished(task: tuple, result: tuple[dict[str, Any], str]) -> tuple[dict[str, Any], str]:
            progress.advance(bar, len(task[1]))
            rate = progress.tasks[bar].completed / (progress.tasks[bar].elapsed or 1e-9)
            progress.update(bar, description=f"{task[0].parent.name}: {rate:,.0f} samples/s")
            return result

        workers = min(workers, len(tasks))
        if workers == 1:
            return [finished(task, _finish_shard(*task)) for task in tasks]
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _start_worker)
        try:
            task_of = {pool.submit(_finish_shard, *task): task for task in tasks}
            for future in as_completed(task_of):
                finished(task_of[future], future.result())
            return [future.result() for future in task_of]
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """End with the parent: one that is killed cannot end its workers."""

    def follow() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]  # a worker has a parent
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _finish_shard(path: Path, items: Sequence[Any], make: Make, known: Any) -> tuple[dict[str, Any], str]:
    """(the shard's row, "kept" | "written" | "written again"). ``known`` is its row of an earlier run, or None."""
    if known and (known["info"]["samples"] == 0 or (path.is_file() and sha256_of(path) == known["info"]["sha256"])):
        return known, "kept"
    hidden = path.parent / UNFINISHED / path.name
    skipped = Skipped()

    def samples() -> Iterator[Mapping[str, Any]]:
        for item in items:
            try:
                yield make(item)
            except Skip as skip:
                skipped.add(str(skip), str(item))

    info = asdict(write_shard(hidden, samples()))
    if info["samples"]:
        os.replace(hidden, path)
    row = {"info": info, "skipped": {kind: [count, skipped.names[kind]] for kind, count in skipped.counts.items()}}
    write_json(hidden.with_name(f"{path.name}.json"), row)
    return row, "written again" if known else "written"
