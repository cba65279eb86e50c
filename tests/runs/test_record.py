"""run.json, and what a command needs to read one."""

import json
import subprocess
import sys

from nxtp.runs.record import FILE, RunRecord, read_record


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


def test_reading_records_imports_no_torch():
    code = "import json, sys, nxtp.runs.record, nxtp.runs.resume; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "lightning", "wandb", "hydra"} & set(json.loads(done.stdout))
