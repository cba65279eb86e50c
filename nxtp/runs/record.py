"""The record of a run, run.json: what was run, on what, and what came out. Tables and plots are made from it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from nxtp.errors import UserError

FORMAT = 2
FILE = "run.json"
SILENT_S = 600  # a run elsewhere that has not written its record for so long is taken for killed
_LIBRARIES = (
    "nxtp",
    "torch",
    "lightning",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "hydra-core",
    "torchmetrics",
)


@dataclass
class RunRecord:
    """What run.json holds.

    ``name``     the run's; of a run of a sweep what differs there, ``sweep`` being the sweep's name
    ``command``  train or evaluate
    ``status``   running, finished, failed or interrupted
    ``updated``  when it was last written: a run that goes on writes it every half minute
    ``step``     optimiser steps so far, of ``steps``; the last validation was after ``validated``
    ``monitor``  the metric that chooses the best weights
    ``metrics``  only what was measured: while training the last validation's, at the end those of the exported weights
    """

    name: str
    config: dict[str, Any]
    overrides: list[str]
    seed: int
    sweep: str | None = None
    command: str = "train"
    data: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    started: str = field(default_factory=lambda: now())
    updated: str = ""
    wall_time_s: float = 0.0
    step: int = 0
    steps: int = 0
    validated: int = 0
    samples_seen: int = 0
    samples_read: int = 0
    samples_skipped: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    monitor: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    code: dict[str, Any] = field(default_factory=lambda: code_version())
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    device: dict[str, Any] = field(default_factory=lambda: device_description())
    process: dict[str, Any] = field(default_factory=lambda: {"host": platform.node(), "pid": os.getpid()})
    format: int = FORMAT

    def __post_init__(self) -> None:
        self._begin = time.perf_counter() - self.wall_time_s

    def fail(self, error: BaseException) -> None:
        self.status = "failed"
        self.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"

    def write(self, directory: Path) -> None:
        """Write run.json, aside and renamed. Values that are not finite are left out of the metrics."""
        self.wall_time_s = round(time.perf_counter() - self._begin, 2)
        self.updated = now()
        self.metrics = {k: v for k, v in self.metrics.items() if v is not None and math.isfinite(v)}
        write_json(directory / FILE, asdict(self))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record in ``directory``, or None where there is none that can be read."""
    try:
        return json.loads((directory / FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None




def code_version() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this package runs from; empty when installed without one."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not (root / ".git").exists():
        return {}
    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))} if commit else {}


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def device_description() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "type": torch.cuda.get_device_name() if cuda else cpu_name(),
        "count": torch.cuda.device_count() if cuda else torch.get_num_threads(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the process that writes the record of a running run is still there."""
    process, updated = record.get("process") or {}, record.get("updated") or record.get("started")
    written = datetime.fromisoformat(updated).timestamp() if updated else time.time()
    if process.get("host") == platform.node():
        try:  # a process that began later only has its number
            return psutil.Process(process["pid"]).create_time() <= written + 1
        except psutil.NoSuchProcess:
            return False
    return time.time() - written < SILENT_S
