"""hydra/sweeper=optuna: ranges, trials that fail, are killed, pruned, known; and searches through Hydra."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from helpers import TINY_OVERRIDES, nxtp_runs, write_shards
from omegaconf import OmegaConf

from nxtp.config import composed
from nxtp.errors import UserError
from nxtp.runs.record import read_record
from nxtp.sweep import sweep
from nxtp.sweep.search.plugin import OptunaSweeper, SearchConfig
from nxtp.sweep.search.space import split
from nxtp.sweep.search.trials import Search, locked
from nxtp.sweep.sweep import parse, run_name, run_or_sweep

METRIC = "val/recall@10"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=range(1,5)", "IntDistribution(high=4, log=False, low=1, step=1)"),
        ("a=range(9,1,-3)", "IntDistribution(high=9, log=False, low=3, step=3)"),
        ("a=tag(log,range(1,65))", "IntDistribution(high=64, log=True, low=1, step=1)"),
        ("a=range(0,1,0.25)", "FloatDistribution(high=0.75, log=False, low=0.0, step=0.25)"),
        ("a=interval(1,2)", "FloatDistribution(high=2.0, log=False, low=1.0, step=None)"),
        ("a=int(interval(1,2))", "IntDistribution(high=2, log=False, low=1, step=1)"),
        ("a=tag(log,interval(1e-5,1e-2))", "FloatDistribution(high=0.01, log=True, low=1e-05, step=None)"),
        ("a=0,0.1,null", "CategoricalDistribution(choices=('0', '0.1', 'null'))"),
        ("a=choice('x y',[1,2])", r"CategoricalDistribution(choices=('x\\ y', '[1,2]'))"),
    ],
)
def test_ranges_are_in_hydras_syntax(given, expected):
    (axis,), fixed = split({}, [given, "b=1"])
    assert str(axis.distribution) == expected
    assert fixed == ["b=1"]
    parse(axis.extremes)  # Hydra reads them back


def test_the_command_line_replaces_ranges_of_the_configuration():
    axes, fixed = split({"a": "interval(0,1)", "b": "1,2", "c": "3"}, ["b=7", "d=range(2)", "e=1"])
    texts = {axis.key: axis.text for axis in axes}
    assert texts == {"a": "interval(0,1)", "b": "7", "c": "3", "d": "range(2)"}
    assert axes[1].extremes == ["b=7"]
    assert fixed == ["e=1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a=1", "no range"),
        ("a=range(5,1)", r"a=range\(5,1\): the range is empty"),
        ("a=range(1,5,0)", "step is 0"),
        ("a=interval(2,1)", r"low.*high"),
        ("a=tag(log,interval(0,1))", "low > 0"),
        ("a=tag(log,choice(1,2))", "log is for an interval"),
        ("a=tag(lgo,interval(1,2))", "unknown tag 'lgo'"),
        ("a=glob(*)", "name the choices"),
    ],
)
def test_a_wrong_range_is_an_error(given, message):
    with pytest.raises(UserError, match=message):
        split({}, [given])


# Trials with a stand-in for the launcher


class Runs:
    """In place of a launcher: ``how`` returns a run's metric, or writes its record and returns None."""

    def __init__(self, how):
        self.how, self.started, self.batches = how, [], []

    def __call__(self, points, first):
        self.batches.append(len(points))
        for point in points:
            out = Path("runs/s", run_name(point))
            self.started.append(out.name)
            out.mkdir(parents=True, exist_ok=True)
            result = self.how(out, **{k: float(v) for k, v in (o.split("=") for o in point)})
            if result is not None:
                record(out, status="finished", metrics={METRIC: result})


def record(out: Path, **fields) -> None:
    process = {"host": os.uname().nodename, "pid": os.getpid()}
    (out / "run.json").write_text(
        json.dumps({"process": process, "updated": datetime.now(UTC).isoformat(), "metrics": {}} | fields)
    )


def make(*axes: str, direction: str = "maximize", seed: int = 0, prune: bool = False, **config) -> Search:
    found, _ = split({}, axes or ("x=interval(0,1)", "y=range(1,5)"))
    return Search(Path("runs/s"), found, {"trainer": {}, **config}, METRIC, direction, seed=seed, prune=prune)


@pytest.fixture(autouse=True)
def directory(here):
    (here / "runs/s").mkdir(parents=True)


def told(name: str = "runs/s") -> dict:
    return json.loads(Path(name, "search.json").read_text())


def test_the_best_trial_is_found():
    runs = Runs(lambda out, x, y: -((x - 0.3) ** 2) - (y - 2) ** 2)
    search = make()
    search.run(runs, 20)
    search.require_finished()
    assert len(runs.started) == 20
    best = told()["best"]
    assert best["value"] == max(t["value"] for t in told()["trials"])
    assert best["params"]["y"] == 2
    assert abs(best["params"]["x"] - 0.3) < 0.2
    assert best["overrides"] == [f"x={best['params']['x']:.6g}", "y=2"]
    assert best["run"] == ",".join(best["overrides"])
    assert read_record(Path("runs/s", best["run"]))["metrics"][METRIC] == best["value"]


def test_a_loss_is_minimized():
    search = make("x=interval(0,1)", direction="minimize")
    search.run(Runs(lambda out, x: x), 5)
    assert told()["best"]["value"] == min(t["value"] for t in told()["trials"])


def test_a_failed_trial_does_not_end_a_search():
    def how(out, x, y):
        if y == 1:
            record(out, status="failed", error="no such block")
        elif y == 2:
            record(out, status="finished")  # NaN: RunRecord drops it
        else:
            return x

    runs = Runs(how)
    search = make()
    search.run(runs, 12)
    search.require_finished()
    assert len(runs.started) == 12
    ends = {(t["params"]["y"], t["state"], t["error"]) for t in told()["trials"]}
    assert ends == {
        (1, "failed", "no such block"),
        (2, "failed", f"measured no finite {METRIC}"),
        (3, "complete", None),
        (4, "complete", None),
    }
    finished = sum(t["state"] == "complete" for t in told()["trials"])
    make().run(runs, 12)  # as many more as have failed
    assert len(runs.started) == 12 + 12 - finished


def test_if_all_fail_it_is_an_error():
    search = make("x=interval(0,1)")
    search.run(Runs(lambda out, x: record(out, status="failed", error="no GPU")), 2)
    with pytest.raises(UserError, match=r"No trial is complete.\n  x=0.\d+: no GPU\n  x="):
        search.require_finished()


def test_a_killed_trial_is_resumed_and_the_search_goes_on_as_if_it_had_not_been():
    whole = Runs(lambda out, x, y: x * y)
    make(seed=3).run(whole, 14)
    Path("runs/s").rename("runs/whole")
    Path("runs/s").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()

    def killed(out, x, y):
        if len(runs.started) in (3, 13):
            record(out, status="running", process={"host": os.uname().nodename, "pid": gone.pid})
            return None
        if len(runs.started) == 14:
            raise SystemError("the search itself dies")
        return x * y

    runs = Runs(killed)
    search = make(seed=3)
    search.run(runs, 3)
    with pytest.raises(UserError, match=r"1 of \d trials have not finished; the same command goes on(.|\n)*: killed"):
        search.require_finished()
    make(seed=3).run(runs, 12)
    with pytest.raises(SystemError):
        make(seed=3).run(runs, 13)
    search = make(seed=3)
    search.run(runs, 14)
    search.require_finished()
    assert list(dict.fromkeys(runs.started)) == whole.started
    again = [name for name in whole.started if runs.started.count(name) > 1]
    assert again == [whole.started[2], whole.started[11]]
    assert runs.started.count(whole.started[11]) == 3
    complete = [t for t in told()["trials"] if t["state"] == "complete"]
    assert sorted(t["run"] for t in complete) == sorted(whole.started)
    assert told()["best"]["run"] == told("runs/whole")["best"]["run"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_known_values_are_not_run_again(jobs):
    runs = Runs(lambda out, x, y: x + y)
    make("x=1,2", "y=1,2").run(runs, 12, jobs)
    assert len(runs.started) == len(set(runs.started)) <= 4
    assert [t["value"] for t in told()["trials"]] == [sum(map(int, t["params"].values())) for t in told()["trials"]]
    assert len(told()["trials"]) == 12


def test_several_trials_per_batch():
    runs = Runs(lambda out, x: x)
    make("x=interval(0,1)").run(runs, 5, 2)
    assert runs.batches == [2, 2, 1]
    assert len(set(runs.started)) == 5
    assert {t["state"] for t in told()["trials"]} == {"complete"}


def test_a_trial_below_the_median_is_pruned(monkeypatch):
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # the records name this process

    def how(out, x):
        weak = len(runs.started) == 7
        record(out, status="running", validated=10, metrics={METRIC: 0.1 if weak else 0.5})
        end = time.monotonic() + 30
        while time.monotonic() < end and not stopped.is_set():
            if not weak and told_steps() == [10]:
                break
            time.sleep(0.005)
        if weak:
            assert stopped.is_set()
            record(out, status="interrupted", validated=10, metrics={METRIC: 0.1})
            stopped.clear()
            return None
        record(out, status="finished", validated=10, metrics={METRIC: 0.6})
        return None

    def told_steps() -> list[int]:
        return [step for step, _ in search.trials[-1].intermediate]

    monkeypatch.setattr(Search, "poll_s", 0.01)
    runs = Runs(how)
    try:
        search = make("x=interval(0,1)", prune=True)
        search.run(runs, 8)
        search.require_finished()
        assert [t["state"] for t in told()["trials"]] == ["complete"] * 6 + ["pruned", "complete"]
        make("x=interval(0,1)", prune=True).run(runs, 8)
        assert len(runs.started) == 8  # it counts
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_search_with_other_settings_is_refused():
    runs = Runs(lambda out, x: x)
    make("x=interval(0,1)", seed=0, lr=0).run(runs, 1)
    for other, changed in [
        (dict(lr=1), "lr"),
        (dict(lr=0, direction="minimize"), "direction"),
        (dict(lr=0, trainer={"max_steps": 5}), "trainer.max_steps"),
    ]:
        with pytest.raises(UserError, match=rf"contains a search with other settings \({changed}\)"):
            make("x=interval(0,1)", **other)
    with pytest.raises(UserError, match=r"other settings \(ranges.x\)"):
        make("x=interval(0,2)", lr=0)
    make("x=interval(0,1)", lr=0, logger="wandb").run(runs, 2)
    assert len(runs.started) == 2


def test_a_directory_in_use_is_refused():
    runs = Runs(lambda out, x: None)
    directory = Path("runs/s")
    with locked(directory):
        make("x=interval(0,1)").run(runs, 1)
        with pytest.raises(UserError, match="Another process searches"), locked(directory):
            pass
    record(directory / runs.started[0], status="running")  # by this process
    with locked(directory), pytest.raises(UserError, match=f"still runs, process {os.getpid()}"):
        make("x=interval(0,1)").run(runs, 1)
    (directory / "multirun.yaml").write_text("")
    with pytest.raises(UserError, match="contains a sweep over a grid"), locked(directory):
        pass
    record(directory)
    with pytest.raises(UserError, match="contains a run"), locked(directory):
        pass


# Searches through Hydra


def test_a_search_has_ended_although_a_trials_process_has_not(tmp_path):
    with locked(tmp_path / "search"):
        if (trial := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / "search"):
            pass
    finally:
        os.kill(trial, signal.SIGKILL)
        os.waitpid(trial, 0)


OPTUNA = ("-m", "hydra/sweeper=optuna")


def never(cfg):
    raise AssertionError("a sweep's own process computes no run")


def search_with(*arguments: str, command: str = "train") -> None:
    run_or_sweep(never, command, [*OPTUNA, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=interval(0,1)"], "No configuration key 'optim.lrr'. Did you mean 'optim.lr'"),
        (["optim.lr=interval(0,1)", "optim.waarmup=1"], "No configuration key 'optim.waarmup'"),
        (["optim.lr=interval(1"], "interval"),
        (["model/encoder=choice(vit_tiny,resnet10)"], "Did you mean 'model/encoder=resnet10t'"),
        (["optim.lr=choice(0.1,high)"], "optim.lr: Value 'high'"),
        (["optim.lr=interval(0,1)", "name=???"], "'name' has no value"),
        (["optim.lr=interval(0,1)", "name=x,y"], "a sweep has one name"),
        (["optim.lr=interval(0,1)", "hydra.verbose=true,false"], "hydra.verbose"),
        (["optim.lr=3"], "Nothing to search"),
        (["optim.lr=interval(0,1)", "hydra.sweeper.trials=3"], "No configuration key 'hydra.sweeper.trials'"),
    ],
)
def test_a_mistake_is_reported_before_anything_starts(here, arguments, message):
    with pytest.raises(UserError) as error:
        search_with("experiment=scenes", "name=x", *arguments)
    assert message in str(error.value)
    assert not (here / "runs/x").exists()


@pytest.fixture(scope="module")
def sweeper_config():
    return composed("train", ["hydra/sweeper=optuna", "experiment=scenes", "name=x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "val/recal@10"}, "no metric 'val/recal@10'. Did you mean 'val/recall@10'"),
        ({"direction": "up"}, "hydra.sweeper.direction must be minimize or maximize, got up"),
        ({"n_trials": 0}, "hydra.sweeper.n_trials must be ≥ 1, got 0"),
        ({"n_trials": "many"}, "hydra.sweeper.n_trials: Value 'many'"),
        ({"prune": True, "metric": "train/loss"}, "hydra.sweeper.prune: train/loss"),
    ],
)
def test_a_wrong_option_is_an_error(here, sweeper_config, options, message):
    sweeper = OptunaSweeper(**options)
    sweeper.config = sweeper_config
    with pytest.raises(UserError) as error:
        sweeper.sweep(["optim.lr=interval(0,1)"])
    assert message in str(error.value)
    assert not (here / "runs/x").exists()


def test_a_loss_is_minimized_by_default(sweeper_config):
    sweeper = OptunaSweeper()
    sweeper.config = sweeper_config
    assert sweeper._goal(SearchConfig()) == ("val/recall@10", "maximize")
    assert sweeper._goal(SearchConfig(metric="val/loss")) == ("val/loss", "minimize")
    sweeper.config = OmegaConf.merge(sweeper_config, {"data": {"val": None}, "validation": {"top_k": 5}})
    sweeper.config.data.val = {}
    assert sweeper._goal(SearchConfig()) == ("train/loss", "minimize")  # no validation


def test_without_optuna_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna: pip install 'nxtp\[search\]'"):
        search_with("name=x", "optim.lr=interval(0,1)")


# In place of `nxtp train`: killed the first time at depth 2, else finishes with its depth as the metric.
STAND_IN = """#!{python}
import json, os, pathlib, re, signal, sys
text = " ".join(sys.argv)
out = pathlib.Path(re.search(r"hydra.run.dir='(.*?)'", text)[1])
depth = re.search(r"decoder.depth=(\\d)", text)[1]
with open("started.txt", "a") as file:
    file.write(out.name + "\\n")
if depth == "2" and not (out / "once").exists():
    (out / "once").touch()
    os.kill(os.getpid(), signal.SIGKILL)
record = dict(status="finished", config={{}}, monitor="val/recall@5", metrics={{"val/recall@5": int(depth) / 10}})
(out / "run.json").write_text(json.dumps(record))
"""


def test_a_search_of_processes_is_resumed_by_the_same_command(here, monkeypatch, capfd):
    """A range in a study's file, another on the command line; run one after the other by Hydra's own launcher."""
    script = here / "stand_in"
    script.write_text(STAND_IN.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sweep.sys, "executable", str(script))
    study = here / "experiments/deep/search.yaml"
    study.parent.mkdir(parents=True)
    study.write_text(
        "# @package _global_\ndefaults:\n  - override /experiment: scenes\n  - override /hydra/sweeper: optuna\n"
        "name: deep/search\nvalidation: {top_k: 5}\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    n_trials: 6\n    params: {model.decoder.depth: 'range(1,4)'}\n"
    )
    arguments = ["study=deep/search", "seed=0,1"]
    with pytest.raises(
        UserError, match=r"trials have not finished(.|\n)*model.decoder.depth=2,seed=\d: left no record"
    ):
        run_or_sweep(never, "train", arguments)
    started = Path("started.txt").read_text().split()
    run_or_sweep(never, "train", arguments)
    content = told("runs/deep/search")
    assert content["settings"] == {
        "metric": "val/recall@5",
        "direction": "maximize",
        "ranges": {"model.decoder.depth": "range(1,4)", "seed": "0,1"},
    }
    assert len(content["trials"]) == 6
    again = Path("started.txt").read_text().split()[len(started) :]
    assert [name for name in again if name in started] == [name for name in started if "depth=2" in name] != []
    assert len(set(started)) == len(started)
    for trial in content["trials"]:
        assert trial["state"] == "complete"
        assert trial["value"] == trial["params"]["model.decoder.depth"] / 10
        assert trial["run"] == ",".join(f"{key}={value}" for key, value in trial["params"].items())
    best = content["best"]["params"]
    printed = capfd.readouterr().out
    assert "6 complete" in printed
    assert (
        f"nxtp train study=deep/search model.decoder.depth={best['model.decoder.depth']} seed={best['seed']} "
        "hydra.mode=RUN name=deep/search-best" in printed
    )


@pytest.mark.slow
def test_a_search_of_real_runs_two_at_a_time(here):
    write_shards(here / "train", [16])
    write_shards(here / "val", [9, 4], labels=True)
    arguments = [
        *("train", *OPTUNA, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", "name=real"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "data.train=train", "+data.val.val=val"),
        *(*TINY_OVERRIDES, "data.num_workers=0", "data.batch_size=4", "trainer.max_epochs=1"),
        "optim.lr=tag(log,interval(1e-5,1e-2))",
    ]
    printed = nxtp_runs(*arguments, cwd=here)
    content = told("runs/real")
    assert [t["state"] for t in content["trials"]] == ["complete", "complete"]
    for trial in content["trials"]:
        found = read_record(here / "runs/real" / trial["run"])
        assert (found["sweep"], found["name"], found["status"]) == ("real", trial["run"], "finished")
        assert found["config"]["optim"]["lr"] == float(trial["run"].removeprefix("optim.lr="))
        assert found["metrics"][METRIC] == trial["value"]
        assert found["validated"] == found["steps"] == 4
        assert (here / "runs/real" / trial["run"] / "model/model.safetensors").is_file()
        assert (here / "runs/real" / trial["run"] / "log.txt").is_file()
    assert f"{content['best']['overrides'][0]} name=real-best" in printed
    assert "2 complete" in printed
    nxtp_runs(*arguments, cwd=here)
    assert told("runs/real")["trials"] == content["trials"]
