"""Files and directories that are written whole or not at all: written beside their place, then renamed.

A directory cannot be replaced in one rename: the old one is set aside first. A process that is killed in between
leaves nothing at ``path``; :func:`recover` puts the old one back.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A new binary file that replaces ``path``, synced to disk, unless an error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _new(path)
    with open(new, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            remove(new)
            raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new directory that replaces ``path`` unless an error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _new(path)
    new.mkdir()
    try:
        yield new
        replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace(new: Path, path: Path) -> None:
    """Rename ``new``, a file or a directory, to ``path``; what was there is deleted."""
    old = _old(path)
    if path.exists() and (new.is_dir() or path.is_dir()):
        remove(old)
        os.rename(path, old)
    os.replace(new, path)
    remove(old)


def recover(path: Path) -> Path | None:
    """``path``, put back if a process was killed while it replaced it; None if there is none."""
    if not path.exists():
        with suppress(OSError):
            os.rename(_old(path), path)
    return path if path.exists() else None


def remove(path: Path) -> None:
    """Delete a file or a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` by ``content`` as indented JSON; values that JSON lacks are written as text."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
