"""What a run directory holds already: nothing, a run to continue, one that has finished, or another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nxtp.errors import UserError
from nxtp.runs.record import read_record
from nxtp.runs.atomic import find

# Settings that may differ between a run and its continuation: where it is computed, and what is told of it.
MAY_CHANGE = ("resume", "logger", "callbacks", "trainer", "parallel", "debug", "hydra")
MAY_CHANGE += tuple(f"data.{key}" for key in ("num_workers", "cache_dir", "cache_gb", "read_timeout", "index_dir"))


def find_checkpoint(run_dir: Path, resolved: dict[str, Any]) -> str | None:
    """What ``resume`` means here: a checkpoint's path, None to begin, or "finished".

    Raises:
        UserError: the directory holds another run, or ``resume=never`` and it holds one at all.
    """
    resume = resolved["resume"]
    if resume not in ("auto", "never"):
        if not Path(resume).exists():
            raise UserError(f"resume={resume}: no such checkpoint. Say auto, never, or the path of a checkpoint.")
        return str(resume)
    previous = read_record(run_dir)
    if previous is None:
        return None
    if resume == "never":
        raise UserError(f"'{run_dir}' already holds a run and resume=never: choose another name, or delete it.")
    last = find(last_checkpoint(run_dir))
    changed = differences(previous["config"], resolved)
    if changed and not (previous["status"] == "failed" and last is None):  # then there is nothing to lose
        raise UserError(
            f"'{run_dir}' holds a run with other settings ({', '.join(changed[:6])}): choose another name or delete it."
        )
    if previous["status"] == "finished":
        return "finished"
    return str(last) if last else None


def last_checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations differ, but for those in ``MAY_CHANGE``."""
    if prefix in MAY_CHANGE:
        return []
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    keys = dict.fromkeys([*old, *new])
    return [d for k in keys for d in differences(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]


def is_finished(run_dir: Path, resolved: dict[str, Any]) -> bool:
    """Whether the directory holds this very run, finished."""
    previous = read_record(run_dir)
    return (
        previous is not None
        and previous["status"] == "finished"
        and resolved.get("resume", "auto") == "auto"
        and not differences(previous["config"], resolved)
    )
