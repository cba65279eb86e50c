"""nxtp sweep search: ranges, trials that fail, are killed, pruned, known; and one search of real runs."""

import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import TINY_OVERRIDES, write_shards

from nxtp.errors import UserError
from nxtp.runs.record import RunRecord, read_record
from nxtp.sweep.search import trials as search_trials
from nxtp.sweep.search.command import make_plan, require, search
from nxtp.sweep.search.space import split
from nxtp.sweep.search.trials import Plan, Search
from nxtp.sweep.sweep import parse

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
def test_ranges_are_hydras(given, expected):
    (axis,), fixed = split([given, "b=1"])
    assert str(axis.distribution) == expected
    assert fixed == ["b=1"]
    parse(axis.tries)  # Hydra reads them back


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a=1", "no range"),
        ("a=range(5,1)", r"a=range\(5,1\): holds nothing"),
        ("a=range(1,5,0)", "step is 0"),
        ("a=interval(2,1)", r"low.*high"),
        ("a=tag(log,interval(0,1))", "low > 0"),
        ("a=tag(log,choice(1,2))", "log is of an interval"),
        ("a=tag(lgo,interval(1,2))", "unknown tag 'lgo'"),
        ("a=glob(*)", "name the choices"),
        ("a=interval(1", "interval"),
        ("name=x,y", "a search has one"),
        ("hydra.verbose=true,false", "a search has one"),
    ],
)
def test_a_wrong_range_is_told(given, message):
    with pytest.raises(UserError, match=message):
        split([given])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=interval(0,1)"], "No configuration key 'optim.lrr'. Did you mean 'lr'"),
        (["optim.lr=interval(0,1)", "optim.waarmup=1"], "No configuration key 'optim.waarmup'"),
        (["model/encoder=choice(vit_tiny,resnet10)"], "Did you mean 'resnet10t'"),
        (["optim.lr=choice(0.1,high)"], "optim.lr: Value 'high'"),
        (["optim.lr=interval(0,1)", "name=???"], "'name' has no value"),
        (
            ["optim.lr=interval(0,1)", "--metric", "val/recal@10"],
            "No metric 'val/recal@10'. Did you mean",
        ),
        (["optim.lr=interval(0,1)", "--prune", "--metric", "train/loss"], "--prune: train/loss"),
    ],
)
def test_what_is_misspelt_is_told_before_anything_starts(here, arguments, message):
    done = CliRunner().invoke(search, ["--trials", "2", "experiment=scenes", "name=x", *arguments])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert not (here / "runs").exists()


def test_the_plan_is_that_of_the_configuration():
    plan = make_plan(["experiment=scenes", "name=x", "optim.lr=interval(0,1)", "validation.top_k=5", "optim.lr=3"])
    assert (plan.study, plan.directory) == ("x", Path("runs/x"))
    assert (plan.metric, plan.direction) == ("val/recall@5", "maximize")
    assert plan.fixed == ["experiment=scenes", "name=x", "validation.top_k=5"]
    assert make_plan(["name=x", "optim.lr=interval(0,1)"]).direction == "minimize"  # no validation: train/loss


def test_without_optuna_its_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "nxtp.sweep.search.trials")
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = CliRunner().invoke(search, ["--trials", "2", "name=x", "optim.lr=interval(0,1)"])
    assert str(done.exception) == "nxtp sweep search needs Optuna: pip install 'nxtp[search]'"


# Trials with a stand-in for the process that trains


class Process:
    """Of a run that has ended with ``code``; or, without one, goes on until it is told to stop."""

    def __init__(self, code: int | None = 0):
        self.code, self._ended = code, threading.Event()
        if code is not None:
            self._ended.set()

    def poll(self):
        return self.code

    def wait(self, timeout=None):
        if not self._ended.wait(timeout):
            raise search_trials.subprocess.TimeoutExpired("nxtp", timeout)
        return self.code

    def send_signal(self, number):
        self.code = 128 + number
        self._ended.set()

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def values_of(arguments: list[str]) -> dict[str, float]:
    return {k: float(v) for k, v in (a.split("=") for a in arguments if a[0] in "xy")}


class Runs:
    """In place of `nxtp train`: ``how`` gives a run's metric, or its process."""

    def __init__(self, monkeypatch, how):
        self.how, self.started = how, []
        monkeypatch.setattr(search_trials, "start", self)

    def __call__(self, command, arguments, out, sweep, where):
        assert (command, sweep, out.is_dir()) == ("train", "s", True)
        self.started.append(out.name)
        result = self.how(out, **values_of(arguments))
        if isinstance(result, Process):
            return result
        record(out, status="finished", metrics={METRIC: result})
        return Process(0)


def record(out: Path, **fields) -> None:
    made = RunRecord(out.name, {}, [], 0, sweep="s")
    for key, value in fields.items():
        setattr(made, key, value)
    made.write(out)


def plan(*axes: str, direction: str = "maximize", **config) -> Plan:
    found, fixed = split([*(axes or ("x=interval(0,1)", "y=range(1,5)")), "experiment=demo", "name=s"])
    return Plan("s", Path("runs/s"), found, fixed, {"trainer": {}, **config}, METRIC, direction)


def told(name: str = "runs/s") -> dict:
    return json.loads(Path(name, "search.json").read_text())


def test_the_best_trial_is_found(monkeypatch):
    runs = Runs(monkeypatch, lambda out, x, y: -((x - 0.3) ** 2) - (y - 2) ** 2)
    with Search(plan()) as done:
        done.run(20)
        require(done)
    assert len(runs.started) == 20
    best = told()["best"]
    assert best["value"] == max(t["value"] for t in told()["trials"])
    assert best["values"]["y"] == "2"
    assert abs(float(best["values"]["x"]) - 0.3) < 0.2
    assert best["overrides"] == ["experiment=demo", f"x={best['values']['x']}", "y=2"]
    assert best["run"] == f"x={best['values']['x']},y=2"
    assert read_record(Path("runs/s", best["run"]))["metrics"][METRIC] == best["value"]


def test_a_loss_is_minimized(monkeypatch):
    Runs(monkeypatch, lambda out, x: x)
    with Search(plan("x=interval(0,1)", direction="minimize")) as done:
        done.run(5)
    assert told()["best"]["value"] == min(t["value"] for t in told()["trials"])


def test_a_failed_trial_does_not_end_a_search(monkeypatch):
    def how(out, x, y):
        if y == 1:
            record(out, status="failed", error="no such block")
            return Process(1)
        return math.nan if y == 2 else x

    runs = Runs(monkeypatch, how)
    with Search(plan()) as done:
        done.run(12)
        require(done)
    assert len(runs.started) == 12
    ends = {(t["values"]["y"], t["state"], t.get("why")) for t in told()["trials"]}
    assert ends == {
        ("1", "fail", "no such block"),
        ("2", "fail", f"measured no finite {METRIC}"),
        ("3", "complete", None),
        ("4", "complete", None),
    }
    finished = sum(t["state"] == "complete" for t in told()["trials"])
    with Search(plan()) as done:  # as many more as have failed
        done.run(12)
    assert len(runs.started) == 12 + 12 - finished


def test_if_all_fail_it_is_an_error(monkeypatch):
    Runs(monkeypatch, lambda out, x: Process(1))
    with Search(plan("x=interval(0,1)")) as done:
        done.run(2)
        with pytest.raises(UserError, match=r"No trial has finished.\n  x=0.\d+: exit code 1\n  x="):
            require(done)


def test_a_killed_trial_is_done_again_and_the_search_goes_on_as_if_it_had_not_been(monkeypatch):
    whole = Runs(monkeypatch, lambda out, x, y: x * y)
    with Search(plan(), seed=3) as done:
        done.run(14)
    Path("runs/s").rename("runs/whole")

    def killed(out, x, y):
        if len(runs.started) in (3, 13):
            return Process(-signal.SIGKILL)
        if len(runs.started) == 14:
            raise SystemError("the search itself dies")
        return x * y

    runs = Runs(monkeypatch, killed)
    with Search(plan(), seed=3) as done:
        done.run(3)
        with pytest.raises(UserError, match=r"1 trials have not ended; the same command(.|\n)*SIGKILL"):
            require(done)
    for count in (13, 14):
        with Search(plan(), seed=3) as done:
            if count == 14:
                with pytest.raises(SystemError):
                    done.run(13)
            else:
                done.run(12)
    with Search(plan(), seed=3) as done:
        done.run(14)
        require(done)
    assert list(dict.fromkeys(runs.started)) == whole.started
    again = [name for name in whole.started if runs.started.count(name) > 1]
    assert again == [whole.started[2], whole.started[11]]
    complete = [t for t in told()["trials"] if t["state"] == "complete"]
    assert sorted(t["run"] for t in complete) == sorted(whole.started)
    assert told()["best"]["run"] == told("runs/whole")["best"]["run"]


def test_sigterm_reaches_the_runs_and_ends_the_search(monkeypatch):
    def how(out, x):
        if len(runs.started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            return Process(None)
        return x

    runs = Runs(monkeypatch, how)
    with Search(plan("x=interval(0,1)")) as done, pytest.raises(SystemExit) as stop:
        done.run(4)
    assert stop.value.code == 128 + signal.SIGTERM
    assert [t["state"] for t in told()["trials"]] == ["complete", "running"]
    runs.how = lambda out, x: x
    with Search(plan("x=interval(0,1)")) as done:
        done.run(4)
    assert len(runs.started) == 5
    assert runs.started[2] == runs.started[1]


@pytest.mark.parametrize("jobs", [1, 2])
def test_values_that_are_known_are_not_run_again(monkeypatch, jobs):
    runs = Runs(monkeypatch, lambda out, x, y: x + y)
    with Search(plan("x=1,2", "y=1,2"), jobs=jobs) as done:
        done.run(12)
    assert len(runs.started) == len(set(runs.started)) <= 4
    assert [t["value"] for t in told()["trials"]] == [sum(map(int, t["values"].values())) for t in told()["trials"]]
    assert len(told()["trials"]) == 12


def test_two_at_a_time(monkeypatch):
    both = threading.Barrier(2, timeout=30)

    def how(out, x):
        both.wait()
        return x

    runs = Runs(monkeypatch, how)
    with Search(plan("x=interval(0,1)"), jobs=2) as done:
        done.run(6)
    assert len(set(runs.started)) == 6
    assert {t["state"] for t in told()["trials"]} == {"complete"}


def test_a_trial_below_the_median_is_pruned(monkeypatch):
    def how(out, x):
        value = 0.1 if len(runs.started) == 7 else 0.5
        record(out, status="running", validated=10, metrics={METRIC: value})
        process = Process(None)

        def finish():
            record(out, status="finished", validated=10, metrics={METRIC: 0.6})
            process.code = 0
            process._ended.set()

        if value == 0.5:
            threading.Timer(0.15, finish).start()
        return process

    monkeypatch.setattr(Search, "every", 0.02)
    runs = Runs(monkeypatch, how)
    with Search(plan("x=interval(0,1)"), prune=True) as done:
        done.run(8)
        require(done)
    states = ["complete"] * 6 + ["pruned", "complete"]
    assert [t["state"] for t in told()["trials"]] == states
    with Search(plan("x=interval(0,1)"), prune=True) as done:
        done.run(8)
    assert len(runs.started) == 8  # it counts


@pytest.mark.parametrize(
    ("other", "changed"),
    [
        (plan("x=interval(0,1)", seed=1), "seed"),
        (plan("x=interval(0,2)", seed=0), "ranges.x"),
        (plan("x=interval(0,1)", seed=0, direction="minimize"), "direction"),
        (plan("x=interval(0,1)", seed=0, trainer={"max_steps": 5}), "its trainer.max_steps"),
    ],
)
def test_a_search_with_other_settings_is_refused(monkeypatch, other, changed):
    runs = Runs(monkeypatch, lambda out, x: x)
    with Search(plan("x=interval(0,1)", seed=0)) as done:
        done.run(1)
    with pytest.raises(UserError, match=rf"holds a search with other settings \({changed}\)"):
        Search(other)
    with Search(plan("x=interval(0,1)", seed=0, logger="wandb")) as done:
        done.run(2)
    assert len(runs.started) == 2


def test_a_directory_in_use_is_refused(monkeypatch):
    runs = Runs(monkeypatch, lambda out, x: Process(-9))
    with Search(plan("x=interval(0,1)")) as done:
        done.run(1)
        with pytest.raises(UserError, match="Another nxtp sweep search"):
            Search(plan("x=interval(0,1)"))
    record(Path("runs/s", runs.started[0]), status="running")  # by this process
    with (
        Search(plan("x=interval(0,1)")) as done,
        pytest.raises(UserError, match=f"at work still, process {os.getpid()}"),
    ):
        done.run(1)
    record(Path("runs/s"))
    with pytest.raises(UserError, match="contains a run"):
        Search(plan("x=interval(0,1)"))


@pytest.mark.slow
def test_a_search_of_real_runs(here):
    write_shards(here / "train", [16])
    write_shards(here / "val", [9, 4], labels=True)
    arguments = [
        *("--n-jobs", "2", "name=real", "data.train=train", "+data.val.val=val", *TINY_OVERRIDES, "data.num_workers=0"),
        *("data.batch_size=4", "trainer.max_epochs=1", "optim.lr=tag(log,interval(1e-5,1e-2))"),
    ]
    done = CliRunner().invoke(search, ["--trials", "2", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    content = told("runs/real")
    assert [t["state"] for t in content["trials"]] == ["complete", "complete"]
    for trial in content["trials"]:
        found = read_record(here / "runs/real" / trial["run"])
        assert (found["sweep"], found["name"], found["status"]) == ("real", trial["run"], "finished")
        assert found["config"]["optim"]["lr"] == float(trial["values"]["optim.lr"])
        assert found["metrics"][METRIC] == trial["value"]
        assert found["validated"] == found["steps"] == 4
        assert (here / "runs/real" / trial["run"] / "model/model.safetensors").is_file()
        assert (here / "runs/real" / trial["run"] / "log.txt").is_file()
    assert f"optim.lr={content['best']['values']['optim.lr']} name=real-best" in done.output
    assert "2 complete" in done.output
    again = CliRunner().invoke(search, ["--trials", "2", *arguments], catch_exceptions=False)
    assert (again.exit_code, told("runs/real")["trials"]) == (0, content["trials"])
