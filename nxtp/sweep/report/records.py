"""Records of finished runs: collected, reduced to what a report may show, merged. A note says why one is skipped."""

from __future__ import annotations

import json
import math
import re
import tempfile
import zlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import click

from nxtp.errors import UserError, one_line
from nxtp.eval.hits import Hits
from nxtp.runs import secrets
from nxtp.runs.record import FILE, FORMAT, PREDICTIONS_FILE
from nxtp.sweep.report.hits import read_hits

Record = dict[str, Any]

NEEDED = ("name", "config", "metrics", "seed")
KEPT = (
    *("format", "name", "sweep", "command", "config", "seed", "data", "started", "wall_time_s", "step", "steps"),
    *("samples_seen", "samples_read", "samples_skipped", "parameters", "monitor", "metrics"),
    *("code", "versions", "device", "other_cores", "hits"),
)
ELSEWHERE = ("callbacks", "logger", "hydra", "debug", "resume", "out", "device", "name", "sweep", "seed", "grid")
TRAINER = ("max_steps", "max_epochs", "precision", "devices")
TOLERANCE = 1e-3  # of a metric, as hits give it
_ABSOLUTE = re.compile(r"(?:^|[\s=:,'\"\[{(])(?:~?/|[A-Za-z]:[\\/]|file:)")


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; lists are values."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {k: v for name, c in config.items() for k, v in leaves(c, f"{prefix}.{name}" if prefix else name).items()}


def settings(record: Record) -> dict[str, Any]:
    return leaves(record["config"]) | {"seed": record["seed"]}


def note(line: str) -> None:
    click.echo(f"note: {one_line(line)}", err=True)


def parsed(text: str, where: str) -> Record | None:
    """A finished run's record from JSON, reduced; None, and a note, for one that cannot be used."""
    try:
        record = json.loads(text)
        reason = _unusable(record)
    except ValueError as error:
        reason = f"not JSON ({error})"
    if reason:
        note(f"{where}: {reason}; skipped")
        return None
    metrics = {k: v for k, v in sorted(record["metrics"].items()) if is_finite(v)}
    for name in sorted(set(record["metrics"]) - set(metrics)):
        note(f"{where}: {name} is {record['metrics'][name]}; left blank")
    return _with_true_hits(reduced(record) | {"metrics": metrics}, where)


def _with_true_hits(record: Record, where: str) -> Record:
    """Without hits that are damaged or of another evaluation: they do not give the record's metrics."""
    kept = {}
    for name, each in (record.get("hits") or {}).items():
        own = {m.partition("/")[2]: v for m, v in record["metrics"].items() if m.partition("/")[0] == name}
        try:
            hits = Hits.unpacked(each["packed"])
            found = {m: float(values.mean()) for m in own if (values := hits.metric(m)) is not None}
        except (ValueError, LookupError, TypeError, OSError, EOFError, BadZipFile, zlib.error) as error:
            note(f"{where}: the hits of {name} cannot be read ({one_line(error)}); compared by seeds only")
            continue
        if wrong := [f"{m} {own[m]:.3f} but {v:.3f}" for m, v in found.items() if abs(v - own[m]) > TOLERANCE]:
            note(f"{where}: the hits of {name} give not {wrong[0]}; compared by seeds only")
        elif found:
            kept[name] = each
    return record | {"hits": kept} if "hits" in record else record


def _unusable(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "not a record"
    version = record.get("format", 1)
    if version != FORMAT:
        age = "an older" if isinstance(version, int) and version < FORMAT else "a newer"
        return f"{age} format ({version}; this version reads {FORMAT})"
    missing = [key for key in NEEDED if key not in record]
    if missing or not isinstance(record["config"], dict) or not isinstance(record["metrics"], dict):
        return f"lacks {', '.join(missing) or 'a config or metrics by name'}"
    try:
        datetime.fromisoformat(record.get("started") or "2026-01-01")
    except (ValueError, TypeError):
        return f"started is '{record['started']}', no time"
    if wrong := [k for k in ("other_cores", "wall_time_s") if not is_finite(record.get(k) or 0)]:
        return f"{wrong[0]} is '{record[wrong[0]]}', no number"
    status = record.get("status", "finished")  # records.jsonl has finished runs only
    return None if status == "finished" else f"{status}, not finished"


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def reduced(record: Record) -> Record:
    """Without what describes only the place where the run was computed, and without absolute paths."""
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


def collect(directories: Iterable[Path]) -> list[Record]:
    """Of the runs in ``directories`` and in all directories below, with the hits of their predictions.jsonl; W&B's
    copies of records are skipped."""
    found = {file for directory in directories for file in directory.glob(f"**/{FILE}")}
    files = sorted(file for file in found if not file.match(f"wandb/*/files/{FILE}"))
    records = []
    for file in files:
        where = f"{file.parent.parent.name}/{file.parent.name}"
        record = parsed(file.read_text(errors="replace"), f"{where}/{FILE}")
        if record and (predictions := file.with_name(PREDICTIONS_FILE)).is_file():
            read = record | {"hits": read_hits(predictions, record)}
            record = _with_true_hits(read, f"{where}/{PREDICTIONS_FILE}")
        records.append(record)
    return unique(records)


def read_lines(path: Path) -> list[Record]:
    """Of records.jsonl; none where there is no file."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return unique(parsed(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1))


def from_wandb(project: str) -> list[Record]:
    """Of a W&B project, where each run has uploaded its run.json.

    Args:
        project: "entity/project", or "project" of the key's own entity.

    Raises:
        UserError: there is no key, or W&B cannot read this project.
    """
    import wandb

    if not secrets.has_key():
        raise UserError(f"Reading W&B project '{project}' needs a key: `wandb login`, or set WANDB_API_KEY.")
    records: list[Record | None] = []
    try:
        for run in wandb.Api().runs(project):
            where = f"{project}, run '{run.name}' ({run.id})"
            if any(file.name == FILE for file in run.files([FILE])):
                with tempfile.TemporaryDirectory() as directory:
                    run.file(FILE).download(root=directory, replace=True).close()
                    records.append(parsed((Path(directory) / FILE).read_text(), where))
            else:
                note(f"{where}: no {FILE}; skipped")
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"W&B project '{project}' cannot be read: {error}") from error
    return unique(records)


def _key(record: Record) -> tuple[str, str]:
    return (str(record.get("sweep") or ""), str(record["name"]))


def _started(record: Record) -> str:
    return str(record.get("started") or "")


def unique(records: Iterable[Record | None]) -> list[Record]:
    """By sweep and name, in order; of two with the same the one that was started later."""
    chosen: dict[tuple[str, str], Record] = {}
    for record in sorted(filter(None, records), key=_started):
        if _key(record) in chosen:
            note(f"two runs are named {'/'.join(_key(record))}; the one started later counts")
        chosen[_key(record)] = record
    return [chosen[k] for k in sorted(chosen)]


def of_study(records: Iterable[Record], study: str) -> list[Record]:
    kept = []
    for record in records:
        if str(record.get("sweep") or "").split("/")[0] == study:
            kept.append(record)
        else:
            note(f"{record['name']}: a run of {record.get('sweep') or 'no sweep'}, not of {study}; skipped")
    return kept


def merge(old: list[Record], new: list[Record]) -> list[Record]:
    """By sweep and name, in order; a run that was repeated replaces its record, unless it was started before it."""
    both = {_key(r): r for r in old}
    for record in new:
        kept = both.setdefault(_key(record), record)
        name = "/".join(_key(record))
        if _started(kept) > _started(record):
            note(f"{name}: records.jsonl has a run that was started later, which counts")
            continue
        was, now = settings(kept), settings(record)
        if changed := [f"{k}={was[k]} by {now[k]}" for k in was if k in now and was[k] != now[k]]:
            note(f"{name}: replaces {', '.join(changed)} of records.jsonl; with another name= both are kept")
        both[_key(record)] = record
    return [both[k] for k in sorted(both)]


def as_lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(r, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
