"""Answers on disk, as JSON lines or parquet: the file appears when it is whole; until then the same command goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nxtp.errors import UserError, counted, printable
from nxtp.inference.streaming import Item, Prediction
from nxtp.runs.atomic import atomic_file

SUFFIXES = (".jsonl", ".parquet")
_ROW_GROUP = 10_000  # rows that are in memory while parquet is written


def row_of(answer: Prediction, score: str) -> dict[str, Any]:
    """An answer as a row: ``image``, ``shard`` if it has one, ``labels`` or ``error``."""
    row: dict[str, Any] = {"image": answer.image}
    if answer.shard is not None:
        row["shard"] = answer.shard
    if answer.error is not None:
        return row | {"error": answer.error}
    return row | {"labels": [{"label": label, score: value} for label, value in answer.labels]}


def json_line(row: dict[str, Any]) -> str:
    """One line of JSON; a file name that is not Unicode is written in escapes, which readers turn back into it."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line


class AnswerFile:
    """Rows for ``out``, kept in ``out.partial`` until :meth:`finish`; what lies there from before is taken up.

    The first line of the partial file says what its rows depend on; the others are rows, a line each. A line that was
    cut off is dropped.

    Args:
        out: ends in one of :data:`SUFFIXES`.
        settings: what the rows depend on (model, number of labels, …), as JSON can hold it.
        score: what the number beside a label is called.
        overwrite: begin anew, and replace ``out``.

    Raises:
        UserError: another ending, ``out`` is there already, the partial file is of other settings or in use, it cannot
            be written, or pyarrow is missing.
    """

    def __init__(self, out: Path, settings: dict[str, Any], score: str = "probability", overwrite: bool = False):
        if out.suffix not in SUFFIXES:
            raise UserError(f"--out {out}: end its name with {' or '.join(SUFFIXES)}.")
        if out.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise UserError("Parquet needs pyarrow: pip install 'nxtp[parquet]', or end the name with .jsonl.")
        if out.exists() and not overwrite:
            raise UserError(f"'{out}' exists: choose another name, or say --overwrite.")
        self.out, self.score = out, score
        self.partial = out.with_name(f"{out.name}.partial")
        self.count = self.failed = 0
        try:
            self._file = open(self.partial, "a+b")  # noqa: SIM115  closed by finish or close
        except OSError as error:
            raise UserError(f"'{self.partial}' cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"'{self.partial}' is being written by another process.") from None
        try:
            if overwrite:
                self._file.truncate(0)
            self._done = _Done(self._taken_up(settings))
            if not self._file.tell():
                self._write({"settings": settings})
        except BaseException:
            self._file.close()
            raise

    def left(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items that have no row yet."""
        return (item for item in items if not self._done.take(item.shard, item.image))

    def add(self, answer: Prediction) -> None:
        """Append a row.

        Raises:
            UserError: the disk is full, or the like.
        """
        self.count += 1
        self.failed += answer.error is not None
        self._write(row_of(answer, self.score))

    def finish(self) -> None:
        """Make ``out`` of the rows, in one rename, and remove the partial file."""
        try:
            with atomic_file(self.out) as file:
                self._copy(file) if self.out.suffix == ".jsonl" else self._to_parquet(file)
        except OSError as error:
            raise UserError(f"'{self.out}' cannot be written: {error.strerror or error}.") from error
        self.partial.unlink()
        self.close()

    def close(self) -> None:
        """Leave the partial file for another time."""
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        """A line, given to the operating system at once: a killed process keeps it."""
        try:
            self._file.write(f"{json_line(row)}\n".encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"'{self.partial}' cannot be written: {error.strerror}.") from error

    def _taken_up(self, settings: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
        """Of each whole row its shard and image. Leaves the file at its last whole line, cut off there."""
        self._file.seek(0)
        head, sound = self._file.readline(), 0
        if head and not head.startswith(b'{"settings"'):
            raise UserError(f"'{self.partial}' is not what nxtp leaves unfinished: move it, or say --overwrite.")
        if head.endswith(b"\n"):
            begun = _row(head).get("settings") or {}
            differing = [name for name in settings if begun.get(name) != settings[name]]
            if differing:
                name = differing[0]
                raise UserError(
                    f"'{self.partial}' was begun with {name} {begun.get(name)}, not {settings[name]}: finish it so, "
                    "choose another name, or say --overwrite."
                )
            sound = len(head)
            for line in self._file:
                row = _row(line)
                if not line.endswith(b"\n") or "image" not in row:
                    break
                sound += len(line)
                self.count += 1
                self.failed += "error" in row
                yield row.get("shard"), row["image"]
        self._file.truncate(sound)
        self._file.seek(sound)

    def _rows(self) -> Iterator[bytes]:
        with open(self.partial, "rb") as file:
            next(file)
            yield from file

    def _copy(self, out: BinaryIO) -> None:
        for line in self._rows():
            out.write(line)

    def _to_parquet(self, out: BinaryIO) -> None:
        import pyarrow
        import pyarrow.parquet

        pair = pyarrow.struct([("label", pyarrow.string()), (self.score, pyarrow.float32())])
        text = pyarrow.string()
        columns = {"image": text, "shard": text, "labels": pyarrow.list_(pair), "error": text}
        schema = pyarrow.schema(list(columns.items()))
        with pyarrow.parquet.ParquetWriter(out, schema) as writer:
            rows: list[dict[str, Any]] = []
            for line in self._rows():
                row = json.loads(line)
                rows.append(row | {"image": printable(row["image"])} if _odd(row["image"]) else row)
                if len(rows) == _ROW_GROUP:
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                    rows = []
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))

    def summary(self) -> str:
        failed = f", {self.failed:,} of them could not be used" if self.failed else ""
        return f"{self.out}: {counted(self.count, 'image')}{failed}"


class _Done:
    """How often each image has a row; 12 bytes of memory a row."""

    def __init__(self, rows: Iterator[tuple[str | None, str]]):
        hashes = np.fromiter((_hash(*row) for row in rows), dtype=np.uint64)
        self._hashes, self._counts = np.unique(hashes, return_counts=True)
        self._counts = self._counts.astype(np.uint32)

    def take(self, shard: str | None, image: str) -> bool:
        """Whether there is a row for it that was not taken before."""
        value = np.uint64(_hash(shard, image))
        place = int(np.searchsorted(self._hashes, value))
        if place == len(self._hashes) or self._hashes[place] != value or not self._counts[place]:
            return False
        self._counts[place] -= 1
        return True


def _hash(shard: str | None, image: str) -> int:
    name = f"{shard or ''}\0{image}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _odd(name: str) -> bool:
    """Whether a file's name is not Unicode: parquet holds nothing else."""
    return any("\ud800" <= c <= "\udfff" for c in name)
