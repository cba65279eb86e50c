"""Our results against those that the published implementation computed.

The directory has ``release_format.pth`` (all parameters of a small model, in the released naming), ``meta.json`` (its
dimensions and token ids), ``expected.safetensors`` (inputs and results) and, optionally, ``samplers.safetensors`` and
``ranked_labels.json``. A row compares one result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from nxtp.paper.parity_checks import Check, Miss, Ours, Skip, checks
from nxtp.paper.parity_fixture import Recording

TOLERANCE = 1e-4  # max |ours - theirs| / max |theirs|, float32
_STYLE = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


@dataclass
class Row:
    """One comparison.

    ``shape``    of what was compared, None if nothing was
    ``error``    max |ours - theirs| / max |theirs|; for tokens the share that differs; None if skipped
    ``verdict``  pass, fail or skipped
    ``reason``   why it was skipped or what failed, else empty
    """

    name: str
    shape: tuple[int, ...] | None
    error: float | None
    verdict: str
    reason: str = ""


def run_parity(directory: Path) -> list[Row]:
    """Compare every result in the directory.

    Raises:
        UserError: the directory is unusable.
    """
    recording = Recording.read(Path(directory))
    ours, every = Ours(recording), list(checks(recording))
    rows = [_row(check, ours, recording) for check in every]
    compared = {name for check in every for name in check.needs} | {"images"}
    for name in sorted(recording.expected.keys() - compared):
        rows.append(Row(name, tuple(recording.expected[name].shape), None, "skipped", "no row for it"))
    return rows


def _row(check: Check, ours: Ours, recording: Recording) -> Row:
    missing = [name for name in check.needs if name not in recording.expected]
    if missing:
        return Row(check.name, None, None, "skipped", f"not recorded: {', '.join(missing)}")
    try:
        mine, theirs = check.compare(ours, recording.expected[check.needs[-1]])
    except Skip as reason:
        return Row(check.name, None, None, "skipped", str(reason))
    except Miss as miss:
        return Row(check.name, None, None, "fail", str(miss))
    shape = tuple(theirs.shape)
    if mine.shape != theirs.shape:
        return Row(check.name, shape, None, "fail", f"ours has shape {tuple(mine.shape)}")
    error = difference(mine, theirs)
    passed = error <= TOLERANCE  # NaN fails
    return Row(check.name, shape, error, "pass" if passed else "fail", "" if passed else f"more than {TOLERANCE:g}")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; of integers the share that differs."""
    if not theirs.is_floating_point():
        return (ours != theirs).float().mean().item()
    largest = theirs.abs().max()
    error = (ours - theirs).abs().max()
    return (error / largest if largest > 0 else error).item()


def report(rows: list[Row], console: Console | None = None) -> int:
    """Print the table; the exit code: 1 if a row failed or nothing was compared, else 0."""
    table = Table(title=f"Our results against the published implementation's (tolerance {TOLERANCE:g} relative)")
    table.add_column("result", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("max error", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        shape = "" if row.shape is None else "×".join(map(str, row.shape)) or "scalar"
        error = "" if row.error is None else f"{row.error:.1e}"
        name = Text(row.name)
        if row.reason:
            name.append(f"\n{row.reason}", "dim")
        table.add_row(name, shape, error, Text(row.verdict, _STYLE[row.verdict]))
    (console or Console()).print(table)
    verdicts = {row.verdict for row in rows} - {"skipped"}
    return 0 if verdicts == {"pass"} else 1
