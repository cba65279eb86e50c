"""The writer that all preparation scripts share: source items → shards and a manifest, in parallel, resumable.

A script lists what its source holds (:class:`Item`), :func:`write_items` does the rest. A journal beside the shards
names those that are finished, so a killed run continues: finished shards are verified and kept, the unfinished one is
made again. The journal becomes the manifest at the end; a second run with the same options does nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nxtp.errors import UserError, at_least
from nxtp.images import ImageError, load_image
from nxtp.labels import noun_backend
from nxtp.shards import MANIFEST, ShardInfo, read_manifest, sha256_of, write_manifest, write_shard

JOURNAL = ".unfinished.jsonl"
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Skip(Exception):
    """A source item that gives no sample; ``kind`` is counted in the manifest."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


class Span(NamedTuple):
    """Bytes of a file: a member of an uncompressed tar, read where it lies."""

    path: str
    offset: int
    size: int


class Item(NamedTuple):
    """One sample to be: its key, where its image's bytes are, its caption, and what its JSON says beside it."""

    key: str
    image: str | Span
    caption: str | None = None
    record: Mapping[str, Any] | None = None

    def identity(self) -> str:
        """What makes it this item, whatever directory the source lies in."""
        image = os.path.basename(self.image) if isinstance(self.image, str) else self.image[1:]
        return json.dumps([self.key, image, self.caption, self.record], sort_keys=True)


@dataclass(frozen=True)
class Writing:
    """How a set is written; the options that all scripts share.

    ``shard_size``  samples a shard
    ``workers``     processes
    ``resize``      make the short side at most this many pixels, keeping the ratio; None copies images byte for byte
    ``quality``     of the JPEGs that a resize writes
    ``nouns``       a noun backend: store the labels of captions, so that training need not find them
    ``check``       decode every image and leave out those that cannot be decoded
    ``overwrite``   replace a set that was made with other options
    """

    shard_size: int = 5_000
    workers: int = 1
    resize: int | None = None
    quality: int = 95
    nouns: str | None = None
    check: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        at_least("--shard-size", self.shard_size, 1)
        at_least("--workers", self.workers, 1)
        if self.resize is not None:
            at_least("--resize", self.resize, 16)
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}: between 1 and 100, please.")
        if self.nouns is not None:
            noun_backend(self.nouns)

    def made_by(self) -> dict[str, Any]:
        """The options that change what is written."""
        images = {"resize": self.resize, "quality": self.quality} if self.resize else {"resize": None}
        return {"shard_size": self.shard_size, "check": self.check} | images


def writing_options(command: Callable) -> Callable:
    """The shared options of a script's command, gathered into its argument ``writing``; user errors in one line."""

    @wraps(command)
    def run(shard_size, workers, resize, quality, nouns, check, overwrite, **options):
        try:
            writing = Writing(shard_size, workers, resize, quality, nouns, check, overwrite)
            return command(writing=writing, **options)
        except UserError as error:
            raise click.ClickException(str(error)) from error

    help_resize = "Short side at most this many pixels, ratio kept. By default images are copied byte for byte."
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace a set that was made with other options."),
        click.option("--check", is_flag=True, help="Decode every image; leave out those that cannot be decoded."),
        click.option("--nouns", metavar="BACKEND", help="Store the captions' nouns as labels: textblob, nltk, …"),
        click.option("--quality", default=95, show_default=True, help="JPEG quality after --resize."),
        click.option("--resize", type=int, metavar="PIXELS", help=help_resize),
        click.option("--workers", default=os.cpu_count() or 1, show_default="all cores", help="Processes."),
        click.option("--shard-size", default=5_000, show_default=True, help="Samples a shard."),
    ):
        run = option(run)
    return run


def write_items(
    out: Path | str,
    items: Iterable[Item],
    *,
    made_by: Mapping[str, Any],
    skipped: Mapping[str, int] | None = None,
    writing: Writing | None = None,
    crop_border: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write ``items`` as a set of shards, in an order that is shuffled once and for all.

    Args:
        out: the set's directory.
        crop_border: pixels to cut off all sides of every image, which makes it a PNG.
        made_by: the script's name and options; stands in the manifest and tells one set from another.
        skipped: what listing the source left out, by kind.

    Returns:
        The manifest.

    Raises:
        UserError: no items, two of one key, or ``out`` holds a set made with other options.
    """
    writing = writing or Writing()
    items = list(items)
    keys = Counter(item.key for item in items)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} keys come twice in the source, the first is '{twice[0]}'.")
    order = np.random.default_rng(0).permutation(len(items))
    backend = noun_backend(writing.nouns) if writing.nouns else None
    return write_set(
        out,
        [items[i] for i in order],
        partial(_sample, writing=writing, crop_border=crop_border),
        made_by={
            **made_by,
            **writing.made_by(),
            "crop_border": crop_border,
            "source": _digest(item.identity() for item in items),
        },
        skipped=skipped,
        nouns={"backend": backend.name, "version": backend.version} if backend else None,
        writing=writing,
        console=console,
    )


def write_set(
    out: Path | str,
    items: Sequence[Any],
    make: Callable[[Any], Mapping[str, Any]],
    *,
    made_by: Mapping[str, Any],
    skipped: Mapping[str, int] | None = None,
    nouns: Mapping[str, Any] | None = None,
    writing: Writing | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write ``make(item)`` of all items, in their order, as shards of ``out`` with a manifest; see the module.

    ``make`` is a picklable function that returns a sample (see :func:`nxtp.shards.write_shard`) or raises
    :class:`Skip`. Returns the manifest.

    Raises:
        UserError: no items, ``out`` holds a set made with other options, another process writes there, or the disk
            is full.
    """
    out, writing, console = Path(out), writing or Writing(), console or Console(stderr=True)
    made_by = json.loads(json.dumps({**made_by, "nouns": dict(nouns or {})}))
    if not items:
        raise UserError(f"{out}: the source gives no sample{describe(skipped or {}, ' (left out: {})')}.")
    with _journal(out, made_by, writing.overwrite) as journal:
        done = journal.kept()
        if done is None:
            manifest = read_manifest(out)
            text = f"{out}: {manifest['samples']:,} samples are there, nothing to do."
            console.print(text, highlight=False, soft_wrap=True)
            return manifest
        bounds = range(0, len(items), writing.shard_size)
        jobs = {f"{out.name}-{n:05d}.tar": slice(first, first + writing.shard_size) for n, first in enumerate(bounds)}
        rows = _write_shards(out, items, make, jobs, done, journal, writing, console)
        totals = Counter(skipped or {})
        for row in rows:
            totals.update(row["skipped"])
        totals = Counter(journal.skipped) if journal.skipped is not None else totals
        infos = [ShardInfo(**row["info"]) for row in rows if row["info"]["samples"]]
        if not infos:
            raise UserError(f"{out}: no source item could be used{describe(totals, ' ({})')}.")
        write_manifest(out, infos, made_by=made_by, nouns=nouns, skipped=dict(sorted(totals.items())))
        journal.finish()
    manifest = read_manifest(out)
    told = describe(totals, "; left out: {}")
    size = f"{manifest['bytes'] / 1e9:.2f} GB" if manifest["bytes"] >= 1e7 else f"{manifest['bytes'] / 1e3:.0f} kB"
    text = f"{out}: {manifest['samples']:,} samples in {len(infos)} shards, {size}{told}."
    console.print(text, highlight=False, soft_wrap=True)
    return manifest


def describe(counts: Mapping[str, int], template: str) -> str:
    """``template`` filled with "kind × n, …", or nothing where there is nothing to tell."""
    return template.format(", ".join(f"{kind} × {n:,}" for kind, n in sorted(counts.items()))) if counts else ""


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()[:16]


# --- one shard, in a worker ------------------------------------------------------------------------------------

_count: Any = None  # samples done by all workers together, for the progress bar


def _share(count: Any) -> None:
    global _count
    _count = count


def _begin(count: Any) -> None:
    """A worker's start. It ends with its parent: a killed one cannot end it, and the pool would wait for ever."""
    _share(count)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write_one(path: Path, items: Sequence[Any], make: Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the journal: the shard as written, and what was skipped."""
    skipped: Counter = Counter()

    def samples() -> Iterator[Mapping[str, Any]]:
        for number, item in enumerate(items, start=1):
            try:
                yield make(item)
            except Skip as skip:
                skipped[skip.kind] += 1
            if _count is not None and (number % 50 == 0 or number == len(items)):
                with _count.get_lock():
                    _count.value += (number - 1) % 50 + 1

    info = write_shard(path, samples())
    if info.samples == 0:
        path.unlink()
    return {"info": asdict(info), "skipped": dict(skipped)}


def _verified(path: Path, row: dict[str, Any], count: int) -> dict[str, Any] | None:
    """The row, if the shard still is what it says."""
    info = row["info"]
    whole = not info["samples"] or (
        path.is_file() and path.stat().st_size == info["bytes"] and sha256_of(path) == info["sha256"]
    )
    if whole and _count is not None:
        with _count.get_lock():
            _count.value += count
    return row if whole else None


def _sample(item: Item, writing: Writing, crop_border: int) -> dict[str, Any]:
    """
    Raises:
        Skip: the image is missing, empty or none; the caption gives no noun.
    """
    data = _read(item.image)
    data, extension = _as_wanted(data, writing, crop_border)
    sample: dict[str, Any] = {"__key__": item.key, extension: data}
    if item.caption is not None:
        sample["txt"] = item.caption
    record = dict(item.record or {}) | {"crc32": zlib.crc32(data)}
    if writing.nouns is not None and item.caption is not None and "labels" not in record:
        record["labels"] = noun_backend(writing.nouns)(item.caption)
        if not record["labels"]:
            raise Skip("no nouns")
    return sample | {"json": record}


def _read(image: str | Span) -> bytes:
    try:
        if isinstance(image, str):
            data = Path(image).read_bytes()
        else:
            with open(image.path, "rb") as file:
                file.seek(image.offset)
                data = file.read(image.size)
    except FileNotFoundError:
        raise Skip("missing image") from None
    except OSError:
        raise Skip("unreadable image") from None
    if not data:
        raise Skip("empty image")
    return data


def _as_wanted(data: bytes, writing: Writing, border: int) -> tuple[bytes, str]:
    """The image's bytes and its extension by what it is, not by its name. Other formats become PNG, losslessly."""
    try:
        with Image.open(io.BytesIO(data)) as header:
            extension, size = _EXTENSIONS.get(header.format or ""), header.size
    except Exception:  # Pillow raises nearly any type on damaged files
        raise Skip("bad image") from None
    if min(size) <= 2 * border:
        raise Skip("image smaller than its border")
    smaller = writing.resize is not None and min(size) > writing.resize
    if extension is not None and not smaller and not border and not writing.check:
        return data, extension
    try:
        image = load_image(data)
    except ImageError:
        raise Skip("bad image") from None
    buffer = io.BytesIO()
    if border:
        image = image.crop((border, border, image.width - border, image.height - border))
    if smaller:
        scale = writing.resize / min(image.size)
        image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
        image.save(buffer, "JPEG", quality=writing.quality)
        return buffer.getvalue(), "jpg"
    if extension is not None and not border:
        return data, extension
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"


# --- all shards ------------------------------------------------------------------------------------------------


def _write_shards(
    out: Path,
    items: Sequence[Any],
    make: Callable[[Any], Mapping[str, Any]],
    jobs: Mapping[str, slice],
    done: Mapping[str, dict[str, Any]],
    journal: _Journal,
    writing: Writing,
    console: Console,
) -> list[dict[str, Any]]:
    """All rows: those of ``done`` that still hold, and those made now."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True), console=console)
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    count = context.Value("q", 0)
    rows: list[dict[str, Any]] = []
    with progress, _executor(min(writing.workers, len(jobs)), context, count) as pool:
        bar = progress.add_task(f"{out.name:10}", total=len(items), rate="")

        def show() -> None:
            elapsed = progress.tasks[bar].elapsed or 1e-9
            progress.update(bar, completed=count.value, rate=f"{count.value / elapsed:,.0f} samples/s")

        pending: dict[Future, str] = {}

        def collect(future: Future) -> None:
            name = pending.pop(future)
            row = future.result()
            if row is None:  # no longer what the journal says
                pending[pool.submit(_write_one, out / name, items[jobs[name]], make)] = name
                return
            if row is not done.get(name):
                journal.add(row)
            rows.append(row)
            show()

        try:
            for name, part in jobs.items():
                work = (_verified, out / name, done[name], len(items[part])) if name in done else None
                future = pool.submit(*(work or (_write_one, out / name, items[part], make)))
                pending[future] = name
                if future.done():
                    collect(future)
            while pending:
                for future in wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    collect(future)
                show()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(f"{out}: a worker was killed; is memory short? The same command continues.") from error
            if isinstance(error, OSError):
                raise UserError(f"{out}: cannot be written ({error.strerror}). The same command continues.") from error
            raise
    return rows


class _Here(Executor):
    """Does the work in this process, at once."""

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextmanager
def _executor(workers: int, context: Any, count: Any) -> Iterator[Executor]:
    if workers == 1:
        _share(count)
        try:
            yield _Here()
        finally:
            _share(None)
        return
    with ProcessPoolExecutor(workers, context, _begin, (count,)) as pool:
        yield pool


# --- what is finished already ----------------------------------------------------------------------------------


class _Journal:
    """The finished shards of an unfinished set, a line each, headed by what makes the set.

    ``skipped`` is what was left out of a whole set that lost a shard since: the same source leaves out the same.
    """

    def __init__(self, directory: Path, made_by: Mapping[str, Any], file):
        self.directory, self.made_by, self.file = directory, made_by, file
        self.skipped: dict[str, int] | None = None

    def kept(self) -> dict[str, dict[str, Any]] | None:
        """Rows by shard name that were finished by the same command; None where the whole set is."""
        manifest = read_manifest(self.directory)
        if manifest is not None:
            there = {p.name: p.stat().st_size for p in self.directory.glob("*.tar")}
            if all(there.get(row["name"]) == row["bytes"] for row in manifest["shards"]):
                self.file.truncate(0)
                return None
            rows = [{"info": row, "skipped": {}} for row in manifest["shards"]]
            self.skipped = manifest["skipped"]
        else:
            self.file.seek(0)
            head, *lines = self.file.read().splitlines() or [""]
            self.skipped = (_parsed(head) or {}).get("skipped")
            rows = [row for row in map(_parsed, lines) if row is not None]  # the last may be torn
        self.file.seek(0)
        self.file.truncate()
        self.add({"made_by": self.made_by, "skipped": self.skipped})
        for row in rows:
            self.add(row)
        (self.directory / MANIFEST).unlink(missing_ok=True)
        return {row["info"]["name"]: row for row in rows}

    def add(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row, sort_keys=True) + "\n")
        self.file.flush()

    def finish(self) -> None:
        self.file.truncate(0)


@contextmanager
def _journal(directory: Path, made_by: Mapping[str, Any], overwrite: bool) -> Iterator[_Journal]:
    """
    Raises:
        UserError: nothing can be written there, another process writes this set, or it was made with other options
            and ``overwrite`` is off.
    """
    path = directory / JOURNAL
    try:
        directory.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"'{directory}' cannot be written ({error.strerror}): choose another --out.") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"'{directory}' is being written by another process.") from None
        manifest = read_manifest(directory) if not overwrite else _manifest_or_none(directory)
        file.seek(0)
        head = file.readline()
        before = manifest["made_by"] if manifest else (_parsed(head) or {}).get("made_by")
        changed = sorted(k for k in {*(before or {}), *made_by} if (before or {}).get(k) != made_by.get(k))
        if (before is not None and changed) or (before is None and any(directory.glob("*.tar"))):
            if not overwrite:
                what = f"a set made with other options ({', '.join(changed)})" if before else "shards of unknown making"
                raise UserError(f"'{directory}' holds {what}: choose another --out, or --overwrite.")
            for old in [*directory.glob("*.tar"), directory / MANIFEST]:
                old.unlink(missing_ok=True)
            file.seek(0)
            file.truncate()
        for torn in directory.glob(".*.tar.*.tmp"):
            torn.unlink()
        try:
            yield _Journal(directory, made_by, file)
        finally:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()


def _manifest_or_none(directory: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(directory)
    except UserError:  # it is to be replaced
        return None


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
