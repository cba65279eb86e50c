"""Records of finished runs: collected, slimmed to what a report may show, and merged. What is unusable is told."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nxtp.runs.record import FILE, FORMAT

Record = dict[str, Any]
Tell = Callable[[str], None]

NEEDED = ("name", "config", "status", "metrics", "seed")
KEPT = (
    *("format", "name", "sweep", "command", "config", "seed", "data", "started", "wall_time_s", "step", "steps"),
    *("samples_seen", "samples_read", "samples_skipped", "parameters", "monitor", "metrics"),
    *("code", "versions", "device"),
)
ELSEWHERE = ("callbacks", "logger", "hydra", "debug", "resume", "out", "device", "name", "sweep", "seed", "grid")
TRAINER = ("max_steps", "max_epochs", "precision", "devices")
_ABSOLUTE = re.compile(r"(?:^|[\s=:,'\"\[{(])(?:~?/|[A-Za-z]:[\\/]|file:)")


def usable(record: Any, where: str, tell: Tell) -> Record | None:
    """A finished run's record, slimmed; None, and a line by ``tell``, for one that cannot be used."""
    if not isinstance(record, dict):
        tell(f"{where}: holds no record; left out")
        return None
    version = record.get("format", 1)
    if version != FORMAT:
        age = "an older" if isinstance(version, int) and version < FORMAT else "a newer"
        tell(f"{where}: {age} format ({version}; this version reads {FORMAT}); left out")
        return None
    missing = [key for key in NEEDED if key not in record]
    if missing or not isinstance(record["config"], dict) or not isinstance(record["metrics"], dict):
        tell(f"{where}: lacks {', '.join(missing) or 'a config or metrics by name'}; left out")
        return None
    if record["status"] != "finished":
        tell(f"{where}: {record['status']}, not finished; left out")
        return None
    metrics = {k: v for k, v in sorted(record["metrics"].items()) if is_finite(v)}
    for name in sorted(set(record["metrics"]) - set(metrics)):
        tell(f"{where}: {name} is {record['metrics'][name]}; left blank")
    return slim(record) | {"metrics": metrics}


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def slim(record: Record) -> Record:
    """Without what says only where the run was computed, and without absolute paths."""
    kept = {k: record[k] for k in KEPT if k in record}
    config = {k: v for k, v in kept["config"].items() if k not in ELSEWHERE}
    if isinstance(config.get("trainer"), dict):
        config["trainer"] = {k: v for k, v in config["trainer"].items() if k in TRAINER}
    return _without_paths(kept | {"config": config})


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if not _is_path(v) and not _is_path(k)}
    if isinstance(value, list):
        return [_without_paths(v) for v in value if not _is_path(v)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(_ABSOLUTE.search(value))


def key(record: Record) -> tuple[str, str]:
    return (str(record.get("sweep") or ""), str(record["name"]))


def collect(directories: Iterable[Path], tell: Tell) -> list[Record]:
    """Of the runs that lie in ``directories``, or in directories of theirs."""
    found = []
    for file in sorted({f for d in directories for f in d.glob(f"**/{FILE}")}):
        where = f"{file.parent.parent.name}/{file.parent.name}/{FILE}"
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            tell(f"{where}: is no JSON ({error}); left out")
            continue
        found.append(usable(content, where, tell))
    return unique([r for r in found if r], tell)


def unique(records: Iterable[Record], tell: Tell) -> list[Record]:
    """By sweep and name, in order; of two with the same the one that was started later."""
    chosen: dict[tuple[str, str], Record] = {}
    for record in sorted(records, key=lambda r: str(r.get("started") or "")):
        if key(record) in chosen:
            tell(f"two runs are named {'/'.join(key(record))}; the one started later counts")
        chosen[key(record)] = record
    return [chosen[k] for k in sorted(chosen)]


def of_study(records: Iterable[Record], study: str, tell: Tell) -> list[Record]:
    kept = []
    for record in records:
        if str(record.get("sweep") or "").split("/")[0] == study:
            kept.append(record)
        else:
            tell(f"{record['name']}: a run of {record.get('sweep') or 'no sweep'}, not of {study}; left out")
    return kept


def read_lines(path: Path, tell: Tell) -> list[Record]:
    """records.jsonl; none where there is no file."""
    found = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        where = f"{path.name}, line {number}"
        try:
            content = json.loads(line)
        except ValueError as error:
            tell(f"{where}: is no JSON ({error}); left out")
            continue
        found.append(usable({"status": "finished", **content} if isinstance(content, dict) else content, where, tell))
    return unique([r for r in found if r], tell)


def merge(old: list[Record], new: list[Record]) -> list[Record]:
    """A run that was done again replaces its record."""
    both = {key(r): r for r in (*old, *new)}
    return [both[k] for k in sorted(both)]


def as_lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(r, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
