"""Where a killed run resumes: what a run directory already contains, and whether it is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nxtp.errors import UserError
from nxtp.runs.atomic import recover
from nxtp.runs.record import read_record

# Settings of data that may differ between the machines of a run.
PER_MACHINE = ("num_workers", "cache_dir", "cache_gb", "read_timeout", "index_dir")
# Settings that may change when a run resumes: where it is computed, and what is logged.
MAY_CHANGE = (
    *("resume", "lock_timeout", "logger", "callbacks", "trainer", "parallel", "debug", "hydra"),
    *(f"data.{key}" for key in PER_MACHINE),
)


def find_checkpoint(run_dir: Path, resolved: dict[str, Any]) -> str | None:
    """Where a killed run resumes: the checkpoint's path, None to start from scratch, or "finished".

    Args:
        resolved: the configuration of the run that starts; ``resume`` is auto, never or a checkpoint's path.

    Raises:
        UserError: the directory contains another run, or any run with ``resume=never``; no such checkpoint.
    """
    resume = resolved["resume"]
    if resume not in ("auto", "never"):
        if not Path(resume).exists():
            raise UserError(f"resume={resume}: no such checkpoint. Use auto, never, or the path of a checkpoint.")
        return str(resume)
    previous = read_record(run_dir)
    if previous is None:
        return None
    if resume == "never":
        raise UserError(f"'{run_dir}' already contains a run and resume=never: choose another name, or delete it.")
    last = recover(last_checkpoint(run_dir))
    changed = differences(previous["config"], resolved)
    if changed and not (previous["status"] == "failed" and last is None):  # then there is nothing to lose
        changes = ", ".join(changed[:6])
        raise UserError(
            f"'{run_dir}' contains a run with other settings ({changes}): choose another name, or delete it."
        )
    if previous["status"] == "finished":
        return "finished"
    return str(last) if last else None


def last_checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations differ, without those in ``MAY_CHANGE``."""
    if prefix in MAY_CHANGE:
        return []
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    keys = dict.fromkeys([*old, *new])
    return [d for k in keys for d in differences(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]


def is_finished(run_dir: Path, resolved: dict[str, Any]) -> bool:
    """Whether the directory contains this run, finished."""
    previous = read_record(run_dir)
    if previous is None or previous["status"] != "finished" or resolved.get("resume", "auto") != "auto":
        return False
    return not differences(previous["config"], resolved)
