"""Shards made by several processes at once, with a progress bar; what is finished is verified instead."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nxtp.data.shards.manifest import sha256_of
from nxtp.errors import UserError, counted, some_of
from nxtp.prepare.journal import Journal
from nxtp.prepare.options import Writing
from nxtp.prepare.shard_writer import write_shard
from nxtp.prepare.skipped import LeftOut


class Skip(Exception):
    """A source item that gives no sample: ``kind`` is counted in the manifest, ``name`` is what to call the item."""

    def __init__(self, kind: str, name: str = ""):
        super().__init__(kind, name)
        self.kind, self.name = kind, name


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
    skipped = LeftOut()

    def samples() -> Iterator[Mapping[str, Any]]:
        for number, item in enumerate(items, start=1):
            try:
                yield make(item)
            except Skip as skip:
                skipped.add(skip.kind, skip.name)
            if _count is not None and (number % 50 == 0 or number == len(items)):
                with _count.get_lock():
                    _count.value += (number - 1) % 50 + 1

    info = write_shard(path, samples())
    if info.samples == 0:
        path.unlink()
    return {"info": asdict(info), "skipped": dict(skipped.counts), "names": skipped.names}


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


def write_shards(
    out: Path,
    items: Sequence[Any],
    make: Callable[[Any], Mapping[str, Any]],
    jobs: Mapping[str, slice],
    done: Mapping[str, dict[str, Any]],
    journal: Journal,
    writing: Writing,
    console: Console,
) -> list[dict[str, Any]]:
    """All rows: those of ``done`` that still hold, and those made now. Says which were made again."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True), console=console)
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    count = context.Value("q", 0)
    rows: list[dict[str, Any]] = []
    again: list[str] = []
    with progress, _executor(min(writing.workers, len(jobs)), context, count) as pool:
        bar = progress.add_task(f"{out.name:10}", total=len(items), rate="")

        def show() -> None:
            elapsed = progress.tasks[bar].elapsed or 1e-9
            progress.update(bar, completed=count.value, rate=f"{count.value / elapsed:,.0f} samples/s")

        pending: dict[Future, str] = {}

        def collect(future: Future) -> None:
            name = pending.pop(future)
            row = future.result()
            if row is None:  # no longer what the journal or the manifest says
                again.append(name)
                journal.begin()
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
    if again:
        told = f"{out}: {counted(len(again), 'shard')} missing or damaged, made again: {some_of(sorted(again))}."
        console.print(told, highlight=False, soft_wrap=True)
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
