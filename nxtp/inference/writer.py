"""Predictions on disk, as JSON lines or parquet. An unfinished file is resumed by the same command.

Of several ranks each writes a partial file of its share, whole batches in turn; the first makes one file of them.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from glob import escape
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from nxtp.errors import UserError, counted
from nxtp.inference.streaming import ImageItem, Prediction, batches
from nxtp.runs.atomic import atomic_file

SUFFIXES = (".jsonl", ".parquet")
_ROW_GROUP = 10_000  # rows in memory while parquet is written


def to_row(prediction: Prediction, score: str) -> dict[str, Any]:
    """A prediction as a row: ``image``, ``shard`` if it has one, ``labels`` or ``error``. Infinite scores are None."""
    row: dict[str, Any] = {"image": prediction.image}
    if prediction.shard is not None:
        row["shard"] = prediction.shard
    if prediction.labels is None:
        return row | {"error": prediction.error}
    finite = ((label, value if math.isfinite(value) else None) for label, value in prediction.labels)
    return row | {"labels": [{"label": label, score: value} for label, value in finite]}


def json_line(row: dict[str, Any]) -> str:
    """One line of JSON. Characters that UTF-8 cannot encode (a file name of other bytes) are written as escapes."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace").decode()


class PredictionWriter:
    """Writes rows to ``out.partial``; :meth:`finish` turns it into ``out``. An existing partial file is resumed.

    The first line of the partial file contains the settings, each other line one row. A truncated last line is
    dropped, and with it its batch: rows depend, in their last digits, on the images that they were computed with.

    Args:
        out: ends with one of :data:`SUFFIXES`.
        settings: what the rows depend on (model, number of labels, …), JSON values.
        score: the name of the number beside a label.
        overwrite: start again, and replace ``out``.
        batch_size: images that are predicted together.
        share: (rank, number of ranks). Rank r has the batches r, r + ranks, … of the source.

    Raises:
        UserError: another suffix, ``out`` exists, the partial file has other settings, was begun by another number of
            ranks, is in use or cannot be written, or pyarrow is missing.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        score: str = "probability",
        overwrite: bool = False,
        batch_size: int = 1,
        share: tuple[int, int] = (0, 1),
    ):
        if out.suffix not in SUFFIXES:
            raise UserError(f"--out {out}: the name must end with {' or '.join(SUFFIXES)}.")
        if out.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise UserError("Parquet needs pyarrow: pip install 'nxtp[parquet]', or end the name with .jsonl.")
        if out.exists() and not overwrite:
            raise UserError(f"'{out}' exists: choose another name, or use --overwrite.")
        self.out, self.score, self.batch_size = out, score, batch_size
        rank, ranks = share
        names = [f"{out.name}.partial{f'-{number}-of-{ranks}' * (ranks > 1)}" for number in range(ranks)]
        self.partials = [out.with_name(name) for name in names]  # of each rank
        self.partial = self.partials[rank]
        for path in out.parent.glob(f"{escape(out.name)}.partial*"):
            if path.name not in names and not overwrite:
                raise UserError(f"'{path}' was begun by another number of ranks than {ranks}: use that number, another "
                                "name, or --overwrite.")  # fmt: skip
            if path.name not in names and rank == 0:
                path.unlink()
        self.count = self.failed = 0
        try:
            self._file = open(self.partial, "a+b")  # noqa: SIM115  closed by close
        except OSError as error:
            raise UserError(f"'{self.partial}' cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if overwrite:
                self._file.truncate(0)
            hashes = np.fromiter(map(hash, self._resume(settings)), dtype=np.int64)
            self._hashes, self._counts = np.unique(hashes, return_counts=True)
            if not self._file.tell():
                self._append({"settings": settings})
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise UserError(f"'{self.partial}' is being written by another process.") from None
            raise

    def remaining(self, items: Iterable[ImageItem]) -> Iterator[ImageItem]:
        """The items that have no row yet; one that comes twice has two rows. Takes 16 bytes of memory per row."""
        for item in items:
            value = hash((item.shard, item.image))
            place = int(np.searchsorted(self._hashes, value))
            if place < len(self._hashes) and self._hashes[place] == value and self._counts[place]:
                self._counts[place] -= 1
            else:
                yield item

    def write(self, prediction: Prediction) -> None:
        """Append a row.

        Raises:
            UserError: it cannot be written, for instance because the disk is full.
        """
        self.count += 1
        self.failed += prediction.error is not None
        self._append(to_row(prediction, self.score))

    def finish(self) -> None:
        """Write ``out``, in one rename, and delete the partial files, which all ranks have completed."""
        try:
            with atomic_file(self.out) as file:
                rows = self._rows()
                self._to_parquet(rows, file) if self.out.suffix == ".parquet" else file.writelines(rows)
        except OSError as error:
            raise UserError(f"'{self.out}' cannot be written: {error.strerror or error}.") from error
        for path in self.partials:
            path.unlink()
        self.close()

    def close(self) -> None:
        """Close the partial file, to be resumed later."""
        with suppress(OSError):  # the disk is full, as reported when the row was written
            self._file.close()

    def summary(self) -> str:
        failed = f", {self.failed:,} of them could not be read" if self.failed else ""
        return f"{self.out}: {counted(self.count, 'image')}{failed}"

    def _append(self, row: dict[str, Any]) -> None:
        """Write a line and flush it, so that a killed process leaves it."""
        try:
            self._file.write(f"{json_line(row)}\n".encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"'{self.partial}' cannot be written: {error.strerror}.") from error

    def _resume(self, settings: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
        """(shard, image) of each row. Leaves the file at the end of its last whole batch, truncated there."""
        self._file.seek(0)
        head, end = self._file.readline(), 0
        if head and not head.startswith(b'{"settings"'):
            raise UserError(f"'{self.partial}' was not written by nxtp: move it, or use --overwrite.")
        if head.endswith(b"\n"):
            before = _parse(head).get("settings") or {}
            for name in settings:
                if before.get(name) != settings[name]:
                    raise UserError(
                        f"'{self.partial}' was begun with {name} {before.get(name)}, not {settings[name]}: use the "
                        "same settings, another name, or --overwrite."
                    )
            end = len(head)
            for lines in batches(self._file, self.batch_size):
                rows = [_parse(line) for line in lines if line.endswith(b"\n")]
                if len(rows) < self.batch_size or not all("image" in row for row in rows):
                    break
                end += sum(map(len, lines))
                self.count += len(rows)
                self.failed += sum("error" in row for row in rows)
                yield from ((row.get("shard"), row["image"]) for row in rows)
        self._file.truncate(end)
        self._file.seek(end)

    def _rows(self) -> Iterator[bytes]:
        """The lines of all ranks in the source's order."""
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")) for path in self.partials]
            for file in files:
                next(file)  # the settings
            while lines := [line for file in files for line in islice(file, self.batch_size)]:
                yield from lines

    def _to_parquet(self, lines: Iterable[bytes], out: IO[bytes]) -> None:
        import pyarrow
        import pyarrow.parquet

        text, score = pyarrow.string(), pyarrow.float32()
        pairs = pyarrow.list_(pyarrow.struct([("label", text), (self.score, score)]))
        schema = pyarrow.schema([("image", text), ("shard", text), ("labels", pairs), ("error", text)])
        with pyarrow.parquet.ParquetWriter(out, schema) as writer:
            for group in batches(map(json.loads, lines), _ROW_GROUP):
                for row in group:  # parquet's strings are UTF-8
                    row["image"] = row["image"].encode("utf-8", "backslashreplace").decode()
                writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _parse(line: bytes) -> dict[str, Any]:
    """A row; {} if the line is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
