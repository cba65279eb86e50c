"""The finished shards of an unfinished set: what a killed preparation continues from."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from nxtp.data.shards.manifest import MANIFEST, ShardInfo, read_manifest
from nxtp.errors import UserError

JOURNAL = ".unfinished.jsonl"
_LEFT_BY_A_KILL = (".*.tar.*.tmp", f".{MANIFEST}.*.tmp")


class Journal:
    """A line for each finished shard, headed by what makes the set; of two lines for one shard the later holds.

    A set with a manifest is whole: its journal begins (:meth:`begin`) only when a shard of it must be made again. At
    any instant either the manifest or the journal names all finished shards.

    ``whole``    the manifest is there, the journal has not begun
    ``skipped``  what was left out of a set that was whole: the same source leaves out the same; None: not known yet
    """

    def __init__(self, directory: Path, made_by: Mapping[str, Any], file: TextIO):
        self.directory, self.made_by, self.file = directory, made_by, file
        self.skipped: dict[str, int] | None = None
        self._rows: list[dict[str, Any]] = []
        manifest = read_manifest(directory)
        self.whole = manifest is not None
        if manifest is not None:
            self.file.truncate(0)  # of a run that was killed between its manifest and its end
            self._rows = [{"info": row, "skipped": {}, "names": {}} for row in manifest["shards"]]
            self.skipped = manifest["skipped"]
            return
        self.file.seek(0)
        text = self.file.read()
        head, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
        self._rows = [row for row in map(_parsed, lines) if row is not None]
        self.skipped = (_parsed(head) or {}).get("skipped")
        if not head:
            self.file.truncate(0)
            self.add({"made_by": self.made_by, "skipped": None})
        elif not text.endswith("\n"):  # the last line is torn
            self.file.truncate(len(text[: text.rfind("\n") + 1].encode()))

    def finished(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Rows by shard name of those of ``names`` that are finished; a whole set lists no shard without samples."""
        rows = {row["info"]["name"]: row for row in self._rows}
        if self.whole:
            empty = {name: {"info": asdict(ShardInfo(name, 0, 0, "")), "skipped": {}, "names": {}} for name in names}
            rows = empty | rows
        return rows

    def begin(self) -> None:
        """The set is not whole any longer: what the manifest says goes into the journal, and the manifest goes."""
        if not self.whole:
            return
        self.add({"made_by": self.made_by, "skipped": self.skipped}, *self._rows)
        (self.directory / MANIFEST).unlink()
        self.whole = False

    def add(self, *rows: Mapping[str, Any]) -> None:
        self.file.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """The manifest is written."""
        self.file.truncate(0)


@contextmanager
def open_journal(directory: Path, made_by: Mapping[str, Any], overwrite: bool) -> Iterator[Journal]:
    """
    Raises:
        UserError: nothing can be written there, another process writes this set, or it was made with other options
            and ``overwrite`` is off.
    """
    path = directory / JOURNAL
    with _locked(path) as file:
        manifest = read_manifest(directory) if not overwrite else _manifest_or_none(directory)
        file.seek(0)
        head = file.readline()
        before = manifest["made_by"] if manifest else (_parsed(head) or {}).get("made_by")
        changed = sorted(k for k in {*(before or {}), *made_by} if (before or {}).get(k) != made_by.get(k))
        unknown = before is None and (any(directory.glob("*.tar")) or (directory / MANIFEST).exists())
        if (before is not None and changed) or unknown:
            if not overwrite:
                what = f"a set made with other options ({', '.join(changed)})" if before else "shards of unknown making"
                raise UserError(f"'{directory}' holds {what}: choose another --out, or --overwrite.")
            for old in [*directory.glob("*.tar"), directory / MANIFEST]:
                old.unlink(missing_ok=True)
            file.seek(0)
            file.truncate()
        for pattern in _LEFT_BY_A_KILL:
            for torn in directory.glob(pattern):
                torn.unlink()
        try:
            yield Journal(directory, made_by, file)
        finally:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """The journal's file, to be written by this process alone."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"'{path.parent}' cannot be written ({error.strerror}): choose another --out.") from error
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"'{path.parent}' is being written by another process.") from None
            try:
                current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:  # else another run has ended and deleted it since it was opened
                yield file
                return


def _manifest_or_none(directory: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(directory)
    except UserError:  # it is to be replaced
        return None


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the journal; None of one that is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
