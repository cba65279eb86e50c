"""Sweeps: which runs there are and their names, one process a run, what is skipped, taken up and told."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import hydra
import pytest
from click.testing import CliRunner
from helpers import TINY_OVERRIDES, nxtp_runs, write_shards
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from nxtp.config import compose_and_run, composed, conf_dir
from nxtp.errors import UserError
from nxtp.runs.lock import announce
from nxtp.runs.record import read_record
from nxtp.sweep import sweep
from nxtp.sweep.commands import RunState, print_states, run_state, states, status
from nxtp.sweep.sweep import Sweep, run_or_sweep

STUDY = """
# @package _global_
defaults:
  - override /objective: published
name: small/laptop
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      model.decoder.depth: 1,2
      model/encoder: vit_tiny,resnet10t
      seed: range(2)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "experiments" / "small"
    study.mkdir(parents=True)
    (study / "laptop.yaml").write_text(STUDY.lstrip())
    (study / "report.yaml").write_text("columns: {}\n")
    return tmp_path


# A run in place of `nxtp train`: fails at depth 3, takes its time at depth 4, else finishes.
STAND_IN = """#!{python}
import json, pathlib, re, sys, time
text = " ".join(sys.argv)
out = pathlib.Path(re.search(r"hydra.run.dir='(.*?)'", text)[1])
out.mkdir(parents=True, exist_ok=True)
depth = re.search(r"decoder.depth=(\\d)", text)[1]
pathlib.Path("arguments.json").write_text(json.dumps(sys.argv[1:]))
config = json.loads(pathlib.Path("config.json").read_text()) if pathlib.Path("config.json").exists() else {{}}
record = dict(status="finished", config=config, monitor="val/recall@10", metrics={{"val/recall@10": int(depth) / 10}})
with open("started.txt", "a") as file:
    file.write(out.name + "\\n")
if depth == "3":
    print("no such block"), sys.exit(1)
if depth == "4":
    time.sleep(60)
if depth == "5":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
(out / "run.json").write_text(json.dumps(record))
"""


@pytest.fixture
def stand_in(here, monkeypatch):
    script = here / "stand_in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sweep.sys, "executable", str(script))
    return here


def started(root: Path) -> list[str]:
    file = root / "started.txt"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def never(cfg):
    raise AssertionError("a sweep's own process computes no run")


def test_a_study_names_its_runs_by_what_differs(here):
    whole = Sweep.of_command("train", ["study=small/laptop", "data.batch_size=7"])
    assert (whole.name, whole.directory) == ("small/laptop", Path("runs/small/laptop"))
    assert len(whole.runs) == len(set(whole.runs)) == 8
    assert whole.runs[0] == "model.decoder.depth=1,model.encoder=vit_tiny,seed=0"
    assert whole.fixed == ["study", "data.batch_size"]
    part = Sweep.of_command("train", ["study=small/laptop", "seed=1", "model.decoder.depth=2,3"])
    assert set(part.runs) - set(whole.runs) == {
        "model.decoder.depth=3,model.encoder=vit_tiny,seed=1",
        "model.decoder.depth=3,model.encoder=resnet10t,seed=1",
    }
    assert len(part.runs) == 4


def test_a_study_can_be_tried_with_debug(here):
    tried = Sweep.of_command("train", ["study=small/laptop", "debug=smoke"])
    assert tried.directory == Path("runs/debug/smoke/small/laptop")
    assert tried.runs == Sweep.of_command("train", ["study=small/laptop"]).runs
    cfg = composed("train", ["study=small/laptop", "debug=smoke"])
    assert (cfg.trainer.max_steps, cfg.resume, cfg.name) == (4, "restart", "small/laptop")
    alone = composed("train", ["experiment=g3m", "debug=smoke"])
    assert alone.hydra.run.dir == "runs/debug/smoke/g3m"


def test_one_run_is_no_sweep(here):
    assert Sweep.of_command("train", ["name=x", "seed=1"]) is None
    assert Sweep.of_command("train", ["study=small/laptop", "hydra.mode=RUN"]) is None
    assert Sweep.of_command("train", ["-m", "name=x", "seed=1,2", "--cfg", "job"]) is None


def test_other_commands_see_what_a_studys_runs_share(here):
    seen = []
    compose_and_run(lambda cfg: seen.append((cfg.name, cfg.objective.name)), "train", ["study=small/laptop"])
    assert seen == [("small/laptop", "published")]


def test_a_long_name_is_cut_and_stays_its_own():
    one, two = (sweep.file_name("key=" + "é" * 200 + end) for end in "ab")
    assert one != two
    assert len(one.encode()) < 200
    assert one == sweep.file_name("key=" + "é" * 200 + "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study=smal/laptop"], r"No study 'smal/laptop'. Did you mean 'small/laptop'"),
        (["study=small/report"], r"No study 'small/report'"),
        (["study=small/laptop", "model.decoder.dept=1"], r"No configuration key 'model.decoder.dept'. Did you mean"),
        (["-m", "name=x", "model.decoder.dept=1,2"], r"No configuration key 'model.decoder.dept'"),
        (["-m", "name=x", "trainer=cpu,gpuu"], r"gpuu"),
        (["-m", "name=x,y"], r"a sweep has one name"),
    ],
)
def test_what_is_misspelt_is_told_before_anything_starts(stand_in, monkeypatch, arguments, message):
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", {k: v for k, v in store.repo.items() if k != "study"})  # none was used before
    with pytest.raises(UserError, match=message):
        run_or_sweep(never, "train", arguments)
    assert started(stand_in) == []
    assert not any((stand_in / "runs").rglob("run.json"))


ONE_OF_THE_STUDY = ["study=small/laptop", "seed=0", "model.decoder.depth=1", "model/encoder=vit_tiny"]


@pytest.mark.parametrize("arguments", [["-m", "name=x", "model.decoder.depth=1"], ONE_OF_THE_STUDY])
def test_runs_of_a_sweep_see_the_users_own_conf(stand_in, arguments):
    (stand_in / "conf").mkdir()
    run_or_sweep(never, "train", arguments)
    _, _, _, *given = json.loads((stand_in / "arguments.json").read_text())  # after -m nxtp train
    assert get_args_parser().parse_args(given).config_dir == str(stand_in / "conf")


def test_finished_runs_are_skipped_and_others_taken_up(stand_in):
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        overrides = ["name='model.decoder.depth=1'", "sweep=deep", "model.decoder.depth=1", "~logger", "~callbacks"]
        cfg = hydra.compose("train", overrides)
    (stand_in / "config.json").write_text(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 2 runs"):
            run_or_sweep(never, "train", ["-m", "name=deep", "model.decoder.depth=1,3"])
    assert started(stand_in) == [f"model.decoder.depth={d}" for d in (1, 3, 3)]
    with pytest.raises(UserError):  # other settings: the run itself refuses them
        run_or_sweep(never, "train", ["-m", "name=deep", "model.decoder.depth=1,3", "optim.lr=7"])
    assert started(stand_in)[3:] == ["model.decoder.depth=1", "model.decoder.depth=3"]


def test_a_finished_run_of_other_settings_fails_the_sweep(stand_in):
    out = stand_in / "runs/deep/model.decoder.depth=3"
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"status": "finished", "config": {"optim": {"lr": 7}}}))
    with pytest.raises(UserError, match="depth=3 failed with exit code 1"):
        run_or_sweep(never, "train", ["-m", "name=deep", "model.decoder.depth=3,1"])
    assert read_record(stand_in / "runs/deep/model.decoder.depth=1")["status"] == "finished"


@pytest.mark.slow
def test_runs_of_several_at_a_time_leave_their_output(here):
    """Joblib's workers are processes of their own; the failures are told all the same."""
    told = nxtp_runs(
        *(
            "train",
            "-m",
            "hydra/launcher=joblib",
            "hydra.launcher.n_jobs=2",
            "name=j",
            "data.train=nowhere",
            "seed=1,2",
        ),
        cwd=here,
        code=1,
    )
    assert "2 of 2 runs have not finished" in told
    for seed in (1, 2):
        assert "nowhere" in (here / f"runs/j/seed={seed}/log.txt").read_text()
        assert read_record(here / f"runs/j/seed={seed}")["status"] == "failed"
    seen = CliRunner().invoke(status, ["j"])
    assert seen.exit_code == 1
    assert "2 failed" in seen.output


def test_a_warning_reaches_the_run(stand_in):
    """SIGTERM is the run's, which saves itself; the sweep follows it, and starts no further run."""
    timer = threading.Thread(target=lambda: (_wait_for(stand_in), os.kill(os.getpid(), signal.SIGTERM)))
    timer.start()
    with pytest.raises(SystemExit) as stop:
        run_or_sweep(never, "train", ["-m", "name=deep", "model.decoder.depth=4,1"])
    timer.join()
    assert stop.value.code == 128 + signal.SIGTERM
    assert started(stand_in) == ["model.decoder.depth=4"]


def _wait_for(root: Path) -> None:
    end = time.monotonic() + 60
    while not started(root) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)


def test_a_failed_run_does_not_end_a_sweep_and_status_tells_each_runs_state(stand_in):
    with pytest.raises(UserError, match=r"^2 of 4 runs have not finished(.|\n)*depth=3: left no record"):
        run_or_sweep(never, "train", ["-m", "name=deep", "model.decoder.depth=1,3,5,2"])
    runs = stand_in / "runs" / "deep"
    assert started(stand_in) == [f"model.decoder.depth={d}" for d in (1, 3, 5, 2)]
    assert read_record(runs / "model.decoder.depth=2")["status"] == "finished"
    shutil.rmtree(runs / "model.decoder.depth=2")
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name, process, step in (("a", os.getpid(), 30), ("b", gone.pid, 20)):
        (runs / name).mkdir()
        record = {"status": "running", "process": {"host": os.uname().nodename, "pid": process}, "step": step}
        (runs / name / "run.json").write_text(json.dumps(record | {"steps": 60, "monitor": "val/recall@10"}))
    (runs / "c").mkdir()
    (runs / "c" / "run.json").write_text("{")
    found = {run.name: (run.state, run.done, run.metric) for run in states(runs)}
    assert found == {
        "model.decoder.depth=1": ("finished", None, 0.1),
        "model.decoder.depth=3": ("failed", None, None),  # without a record
        "model.decoder.depth=5": ("failed", None, None),  # killed before its first one
        "model.decoder.depth=2": ("planned", None, None),
        "a": ("running", 0.5, None),
        "b": ("killed", 1 / 3, None),
        "c": ("unreadable", None, None),
    }
    announce(runs / "model.decoder.depth=5", ["nxtp"], os.getpid())
    assert run_state(runs / "model.decoder.depth=5").state == "running"
    printed = CliRunner().invoke(status, ["deep"])
    assert printed.exit_code == 1
    assert "50%" in printed.output
    printed = CliRunner().invoke(status, ["deep", "--json"])
    assert printed.exit_code == 1
    rows = json.loads(printed.stdout)["runs"]
    found["model.decoder.depth=5"] = ("running", None, None)
    assert {row["name"]: (row["state"], row["done"], row["metric"]) for row in rows} == found
    with pytest.raises(UserError, match="Did you mean 'deep'"):
        states(stand_in / "runs" / "deap")


def test_status_compares_a_metric_with_itself_only_and_prints_errors_whole(capsys):
    runs = [RunState(f"top_k={k}", "finished", monitor=f"v/recall@{k}", metric=k / 10) for k in (5, 10)]
    print_states([*runs, RunState("bad", "failed", error="no such model " * 20)])
    shown = capsys.readouterr().out
    assert "v/recall@5 0.5000" in shown
    assert "v/recall@10 1.0000" in shown
    assert f"bad: {'no such model ' * 20}" in shown, "in one line"
    print_states(runs[:1])
    assert "recall@5 0.5" not in capsys.readouterr().out, "the name is the column's"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "seeds"), [("ddp", [3]), ("ddp", [3, 4]), ("fsdp", [3, 4])])
def test_runs_of_several_processes(here, strategy, seeds):
    """Lightning starts a run's further processes by its command line: of the run, not of the sweep."""
    write_shards(here / "train", [16])
    write_shards(here / "val", [9, 4], labels=True)
    arguments = [
        *("train", "-m", "name=two", "data.train=train", "+data.val.val=val", *TINY_OVERRIDES, "data.num_workers=0"),
        *("data.batch_size=4", "trainer.max_epochs=1", f"trainer={strategy}", "trainer.accelerator=cpu"),
        *("trainer.precision=32-true", f"seed=choice({','.join(map(str, seeds))})"),
    ]
    nxtp_runs(*arguments, cwd=here)
    for seed in seeds:
        record = read_record(here / "runs/two" / f"seed={seed}")
        assert (record["status"], record["samples_seen"], record["step"], record["steps"]) == ("finished", 16, 2, 2)
        assert (record["name"], record["sweep"]) == (f"seed={seed}", "two")
        assert (here / "runs/two" / f"seed={seed}" / "model/model.safetensors").is_file()
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["two"]
    assert "finished before" in nxtp_runs(*arguments, cwd=here)
