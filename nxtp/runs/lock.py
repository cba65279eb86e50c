"""One command at a time in a run directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shlex
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from nxtp.errors import UserError
from nxtp.runs.atomic import read_json
from nxtp.runs.record import is_alive

log = logging.getLogger("nxtp")

FILE = ".lock"  # never deleted: a process that creates it again would lock another file
WAIT_S = 60.0


@contextmanager
def run_lock(directory: Path, command: Sequence[str], timeout: float = WAIT_S) -> Iterator[None]:
    """Hold ``directory`` until the block ends. The system releases it when the process dies, however it dies.

    Waits up to ``timeout`` seconds for another command: a scheduler may start a run while the stopped one still saves.

    Raises:
        UserError: another command holds it, and which; or ``directory`` cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        opened = open(directory / FILE, "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"'{directory}' cannot be written: {error.strerror}.") from error
    with opened as file:
        end, waits = time.monotonic() + timeout, False
        while not _lock(file, directory):
            holder = _description(read_holder(directory))
            if time.monotonic() >= end:
                raise UserError(f"'{directory}' is in use by {holder}: wait for it, or choose another name.")
            if not waits:
                log.warning("%s is in use by %s: waiting up to %g s.", directory, holder, timeout)
            waits = True
            time.sleep(0.2)
        _write_holder(directory, command, os.getpid())
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # forked workers have the file open too


def _lock(file: TextIO, directory: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s): do not start a second command there.", directory, error.strerror)
    return True


def announce(directory: Path, command: Sequence[str], pid: int) -> None:
    """Write that the process ``pid``, which has just started, will hold ``directory``, if no other does."""
    holder = read_holder(directory)
    if holder is None or not is_alive(holder):
        _write_holder(directory, command, pid)


def _write_holder(directory: Path, command: Sequence[str], pid: int) -> None:
    process, started = {"host": platform.node(), "pid": pid}, datetime.now(UTC).isoformat()
    holder = {"command": shlex.join(command), "process": process, "started": started}
    (directory / FILE).write_text(json.dumps(holder) + "\n")


def read_holder(directory: Path) -> dict[str, Any] | None:
    """The command that holds ``directory``, will hold it or was the last to; None if there was none."""
    return read_json(directory / FILE)


def _description(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another command"
    command = textwrap.shorten(holder["command"], 100, placeholder=" …")
    return f"'{command}' (process {holder['process']['pid']} on {holder['process']['host']})"
