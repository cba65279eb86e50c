"""run.json, and what a command needs to read one."""

import json
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest

from nxtp.runs.record import FILE, RunRecord, code_version, others_seconds, read_record


def test_a_record_is_written_and_read(tmp_path):
    assert read_record(tmp_path) is None
    record = RunRecord("a", {"x": 1}, ["x=1"], seed=0)
    record.metrics = {"loss": 1.0, "nan": float("nan"), "none": None}
    record.write(tmp_path)
    read = read_record(tmp_path)
    assert (read["name"], read["status"], read["metrics"]) == ("a", "running", {"loss": 1.0})
    assert read["versions"]["torch"]
    assert read["device"]["count"] >= 1
    (tmp_path / FILE).write_text("{")
    assert read_record(tmp_path) is None


def test_dirty_is_changed_code_and_not_a_users_files(tmp_path, monkeypatch):
    code = tmp_path / "nxtp" / "runs" / "record.py"
    code.parent.mkdir(parents=True)
    code.touch()
    monkeypatch.setattr("nxtp.runs.record.__file__", str(code))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ("init -q", "add .", "commit -qm first"):
        subprocess.run([*git, *command.split()], check=True)
    (tmp_path / "sheet.png").touch()
    assert code_version()["dirty"] is False
    (tmp_path / "nxtp" / "mine.py").touch()
    assert code_version()["dirty"] is True
    (tmp_path / "nxtp" / "mine.py").unlink()
    code.write_text("changed = True")
    assert code_version()["dirty"] is True


def test_reading_records_imports_no_torch():
    code = "import json, sys, nxtp.runs.record, nxtp.runs.resume; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "lightning", "wandb", "hydra"} & set(json.loads(done.stdout))


Times = namedtuple("Times", "user system idle iowait children_user children_system", defaults=[0.0] * 6)


def test_cores_that_others_use_are_measured_without_ones_own(monkeypatch, tmp_path):
    machine, own, now = Times(user=10.0, idle=3.0, iowait=1.0), Times(user=5.0), [0.0]
    process = SimpleNamespace(cpu_times=lambda: own, children=lambda recursive: [process])
    monkeypatch.setattr(psutil, "cpu_times", lambda: machine)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr("nxtp.runs.record.time.perf_counter", lambda: now[0])
    record = RunRecord("a", {}, [], 0)
    machine, own, now[0] = Times(user=45.0, idle=8.0, iowait=2.0), Times(user=10.0, children_user=5.0), 10.0
    record.write(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["other_cores"] == 1.5


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", None])
def test_ranks_of_the_same_run_are_no_others(monkeypatch, variable):
    """A launcher has started two ranks; the machine has used only their CPU time."""
    ranks = [
        SimpleNamespace(cpu_times=lambda: Times(user=7.0), children=lambda recursive: [], parent=lambda: launcher)
        for _ in range(2)
    ]
    launcher = SimpleNamespace(cpu_times=lambda: Times(user=1.0), children=lambda recursive: ranks)
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(user=15.0, idle=3.0))
    monkeypatch.setattr(psutil, "Process", lambda: ranks[0])
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "2")
    assert others_seconds() == (0 if variable else 8)
