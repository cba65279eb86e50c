"""run.json, the record of a run: its configuration, code, device and results. Tables and plots are made from it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from nxtp.errors import UserError
from nxtp.runs.atomic import read_json, write_json

FORMAT = 3
FILE = "run.json"
PREDICTIONS_FILE = "predictions.jsonl"  # beside it: nxtp.eval.predictions
SILENT_S = 600  # seconds without an update after which a run on another machine counts as killed
_LIBRARIES = (
    *("nxtp", "torch", "lightning", "transformers"),
    *("open_clip_torch", "webdataset", "hydra-core", "torchmetrics"),
)


def code_version() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that this package runs from; empty without a checkout.

    Dirty are changes of tracked files and new files in nxtp/, but not a user's pictures beside them.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not (root / ".git").exists():
            return {}
        changed = git("status", "--porcelain", "--untracked-files=no")
        added = git("ls-files", "--others", "--exclude-standard", "nxtp")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed or added)}
    except (OSError, subprocess.SubprocessError):
        return {}


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def device_description() -> dict[str, Any]:
    import torch  # here: commands that only read records start without it

    if torch.cuda.is_available():
        return {"type": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
    return {"type": cpu_name(), "count": torch.get_num_threads()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def others_seconds() -> float:
    """CPU time that this machine has used, without this process, its children, and its run's other ranks."""
    machine, own, root = psutil.cpu_times(), 0.0, psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        root = root.parent() or root  # torchrun's or SLURM's process, which has started all ranks of this machine
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            own += times.user + times.system + times.children_user + times.children_system
    return sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - own


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class RunRecord:
    """The content of run.json.

    ``name``          of the run; within a sweep the settings that differ, and ``sweep`` is the sweep's name
    ``command``       train or evaluate
    ``status``        running, finished, failed or interrupted
    ``updated``       time of the last write; a running run writes every half minute
    ``step``          optimiser steps so far, of ``steps`` that are planned; ``validated``: at the last validation
    ``ended_by``      the limit that ended the training: trainer.max_steps=…, trainer.max_epochs=…, early stopping, …
    ``samples_read``  samples read, of which ``samples_skipped`` (by kind) could not be used
    ``monitor``       the metric that selects the best weights
    ``other_cores``   how many cores the other processes of this machine used meanwhile
    ``metrics``       measured values only: of the last validation while training, of the exported weights at the end
    """

    name: str
    config: dict[str, Any]
    overrides: list[str]
    seed: int
    sweep: str | None = None
    command: str = "train"
    data: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    started: str = field(default_factory=_now)
    updated: str = ""
    wall_time_s: float = 0.0
    other_cores: float = 0.0
    step: int = 0
    steps: int = 0
    validated: int = 0
    ended_by: str | None = None
    samples_seen: int = 0
    samples_read: int = 0
    samples_skipped: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    monitor: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    code: dict[str, Any] = field(default_factory=code_version)
    versions: dict[str, str] = field(default_factory=library_versions)
    device: dict[str, Any] = field(default_factory=device_description)
    process: dict[str, Any] = field(default_factory=lambda: {"host": platform.node(), "pid": os.getpid()})
    format: int = FORMAT

    def __post_init__(self) -> None:
        self._begin = time.perf_counter() - self.wall_time_s
        self._start, self._others = time.perf_counter(), others_seconds()

    def fail(self, error: BaseException) -> None:
        self.status = "failed"
        self.error = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"

    def write(self, directory: Path) -> None:
        """Replace run.json in ``directory``. Metrics that are not finite are skipped."""
        now = time.perf_counter()
        self.wall_time_s = round(now - self._begin, 2)
        self.other_cores = round(max(0.0, others_seconds() - self._others) / max(now - self._start, 1e-9), 3)
        self.updated = _now()
        self.metrics = {k: v for k, v in self.metrics.items() if v is not None and math.isfinite(v)}
        write_json(directory / FILE, asdict(self))


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record in ``directory``; None if it is missing or not JSON."""
    return read_json(directory / FILE)


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the process of a running run still exists; on another machine, whether it wrote its record lately."""
    process, updated = record.get("process") or {}, record.get("updated") or record.get("started")
    written = datetime.fromisoformat(updated).timestamp() if updated else time.time()
    if process.get("host") == platform.node():
        try:  # a process that started later only reuses the id
            return psutil.Process(process["pid"]).create_time() <= written + 1
        except psutil.NoSuchProcess:
            return False
    return time.time() - written < SILENT_S
