"""The finished shards of an unfinished set: what a killed preparation continues from."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nxtp.errors import UserError
from nxtp.shards import MANIFEST, read_manifest

JOURNAL = ".unfinished.jsonl"


class Journal:
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
def open_journal(directory: Path, made_by: Mapping[str, Any], overwrite: bool) -> Iterator[Journal]:
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
            yield Journal(directory, made_by, file)
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
