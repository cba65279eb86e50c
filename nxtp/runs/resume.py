"""Where a killed run resumes: what a run directory already contains, and whether it is the same run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nxtp.errors import UserError
from nxtp.runs.atomic import recover
from nxtp.runs.record import FILE, PREDICTIONS_FILE, read_record

MODES = ("auto", "never", "restart")  # of `resume`; anything else is the path of a checkpoint
# Settings of data that may differ between the machines of a run.
PER_MACHINE = ("num_workers", "cache_dir", "cache_gb", "read_timeout", "retries", "index_dir", "index_gb")
# Settings that may differ between two commands of one run: where it is computed, and what is logged.
MAY_CHANGE = (
    *("resume", "lock_timeout", "logger", "callbacks", "parallel", "debug", "hydra"),
    *(f"data.{key}" for key in (*PER_MACHINE, "allow_missing_shards", "allow_changed_shards", "nodes")),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "inference_mode", "benchmark")),
    *(f"trainer.{key}" for key in ("log_every_n_steps", "profiler", "detect_anomaly", "num_sanity_val_steps")),
    *(f"trainer.enable_{key}" for key in ("checkpointing", "model_summary", "progress_bar")),
)
WRITTEN = ("checkpoints", "csv", "tensorboard", "wandb", "model")  # directories that a new start would add to, or keep


def find_checkpoint(run_dir: Path, resolved: dict[str, Any]) -> str | None:
    """Where a killed run resumes: the checkpoint's path, None to start from scratch, or "finished".

    Args:
        resolved: the configuration of the run that starts; ``resume`` is auto, never, restart or a checkpoint's path.

    Raises:
        UserError: the directory contains another run, or any run with ``resume=never``; no such checkpoint. A run may
            start from any checkpoint of its own directory, with other settings too.
    """
    resume, previous = resolved["resume"], read_record(run_dir)
    if resume not in MODES:
        if not Path(resume).exists():
            known = f"{', '.join(MODES)}, or the path of a checkpoint"
            raise UserError(f"resume={resume}: no such checkpoint. Use {known}.")
        is_own = Path(resume).resolve().is_relative_to(run_dir.resolve())
        if previous is not None and not is_own:
            refuse_others(run_dir, previous, differences(previous["config"], resolved))
        return str(resume)
    if previous is None:
        return None
    if resume == "never":
        raise UserError(f"'{run_dir}' already contains a run and resume=never: choose another name, or delete it.")
    if resume == "restart":
        if previous["config"].get("resume") != "restart":
            raise UserError(f"'{run_dir}' contains a run without resume=restart: choose another name, or delete it.")
        return None
    last = recover(last_checkpoint(run_dir))
    finished = previous["status"] == "finished"
    changed = differences(previous["config"], resolved, may_change_trainer=not finished)
    if finished and changed and all(key.startswith("trainer.") for key in changed):
        raise UserError(
            f"'{run_dir}' contains this run, finished with another {', '.join(changed)}. To train it longer: "
            f"resume={last_checkpoint(run_dir)}; to train it again: another name."
        )
    refuse_others(run_dir, previous, changed)
    if finished:
        return "finished"
    return str(last) if last else None


def refuse_others(run_dir: Path, previous: dict[str, Any], changed: list[str]) -> None:
    """
    Raises:
        UserError: settings have ``changed``, unless the directory's run failed before its first checkpoint.
    """
    if changed and not (previous["status"] == "failed" and recover(last_checkpoint(run_dir)) is None):
        changes = ", ".join(changed[:6])
        raise UserError(
            f"'{run_dir}' contains a run with other settings ({changes}): choose another name, or delete it."
        )


def last_checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def differences(old: dict[str, Any], new: dict[str, Any], *, may_change_trainer: bool = True) -> list[str]:
    """Dotted keys in which two configurations differ, without those in ``MAY_CHANGE``.

    Args:
        may_change_trainer: ignore all of ``trainer``, as for a run that is not finished.
    """
    ignored = {*MAY_CHANGE, *(["trainer"] if may_change_trainer else [])}
    if new.get("global_batch"):  # then another number of ranks accumulates another number of batches
        ignored.add("trainer.accumulate_grad_batches")

    return [key for key, *_ in differing(old, new) if not any(f"{key}.".startswith(f"{each}.") for each in ignored)]


def differing(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where nested dictionaries differ: the dotted key and both values, None for a missing one."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differing(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
    elif old != new:
        yield where, old, new


def is_finished(run_dir: Path, resolved: dict[str, Any]) -> bool:
    """Whether the directory contains this run, finished."""
    previous = read_record(run_dir)
    if previous is None or previous["status"] != "finished" or resolved.get("resume", "auto") != "auto":
        return False
    return not differences(previous["config"], resolved, may_change_trainer=False)


def clear(run_dir: Path) -> None:
    """Delete the run that a directory contains; its logs remain, and are appended to."""
    for name in (FILE, PREDICTIONS_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for name in WRITTEN:
        shutil.rmtree(run_dir / name, ignore_errors=True)
