"""A search's trials: Optuna proposes, a process of its own trains, and what is known survives a kill."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from nxtp.errors import UserError
from nxtp.runs.atomic import write_json
from nxtp.runs.record import FILE as RECORD
from nxtp.runs.record import is_alive, read_record
from nxtp.runs.resume import differences
from nxtp.sweep.search.space import Axis
from nxtp.sweep.sweep import LOG, file_name, forwarding, output, start

FORMAT = 1
FILE = "search.json"
STORAGE = "search.db"
COUNTS = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Plan:
    """What is searched. ``config`` is composed of ``fixed`` and one value of each axis, ``direction`` is Optuna's."""

    study: str
    directory: Path
    axes: list[Axis]
    fixed: list[str]
    config: dict[str, Any]
    metric: str
    direction: str

    @property
    def asked(self) -> dict[str, Any]:
        """What must be the same when a search goes on: its trials are compared."""
        ranges = {axis.key: axis.given for axis in self.axes}
        return json.loads(json.dumps({"ranges": ranges, "metric": self.metric, "direction": self.direction}))


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; without a ``state`` it has not: it was killed, or told to stop."""

    state: TrialState | None
    value: float | None = None
    why: str = ""


def tell(line: str) -> None:
    click.echo(line, err=True)


class Search:
    """The trials in a search's directory, continued where they stand.

    Storage is SQLite: a kill in the midst of a write leaves the file as it was before, where Optuna's journal could
    not be read any more. One process writes it, whatever the number of trials at a time.

    Each proposal is drawn with a seed of its own: a search that was killed proposes what it would have proposed.

    Args:
        jobs: trials at a time.
        prune: stop a trial whose metric after a validation is below the median of others' there.

    Raises:
        UserError: the directory holds something else, another search, or one that is running.
    """

    every = 1.0  # seconds between looks at the record of a run that may be pruned

    def __init__(self, plan: Plan, *, seed: int = 0, jobs: int = 1, prune: bool = False):
        self.plan, self.seed, self.jobs, self.prune = plan, seed, jobs, prune
        directory = plan.directory
        for name in (RECORD, "multirun.yaml"):
            if (directory / name).exists():
                what = "a run" if name == RECORD else "a sweep"
                raise UserError(f"'{directory}' holds {what}: give the search another name.")
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory, os.O_RDONLY)  # held until closed or this process ends, however it ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"Another nxtp sweep search is at work in '{directory}': wait for it.") from None
        try:
            self.study = self._open()
        except BaseException:
            os.close(self._lock)
            raise
        self._asking = threading.Lock()  # of what the trials at a time share
        self._names: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._children: list[subprocess.Popen] = []
        self._stopped: list[int] = []
        self._left = self._trials = 0
        self.failed: dict[str, str] = {}  # runs of this process, and why
        self.killed: dict[str, str] = {}

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _open(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{self.plan.directory / STORAGE}",
            study_name=self.plan.study,
            direction=self.plan.direction,
            pruner=MedianPruner() if self.prune else NopPruner(),
            load_if_exists=True,
        )
        before = study.user_attrs
        if "asked" not in before:
            study.set_user_attr("config", self.plan.config)
            study.set_user_attr("asked", self.plan.asked)
            return study
        changed = differences(before["config"], self.plan.config)
        changed += differences(before["config"]["trainer"], self.plan.config["trainer"], "its trainer")
        changed += differences(before["asked"], self.plan.asked)
        if changed:
            raise UserError(
                f"'{self.plan.directory}' holds a search with other settings ({', '.join(changed[:6])}): "
                "choose another name or delete it."
            )
        return study

    def run(self, trials: int) -> None:
        """Until there are ``trials`` that count; failed ones do not, and are not made up for before the next call.

        Raises:
            UserError: a run of a search that was killed is still at work.
            SystemExit: it was told to stop: its runs have saved themselves.
        """
        self._take_up()
        self._trials = trials
        self._left = max(0, trials - len(self._told(COUNTS)))
        with forwarding(self._children) as self._stopped, ThreadPoolExecutor(self.jobs) as pool:
            for worker in [pool.submit(self._work) for _ in range(self.jobs)]:
                worker.result()
        self.write()
        if self._stopped:
            sys.exit(128 + self._stopped[0])

    def _take_up(self) -> None:
        """Trials of a process that is gone are enqueued anew: their runs continue."""
        gone = self._told([TrialState.RUNNING])
        for trial in gone:
            out = self.plan.directory / trial.user_attrs.get("run", "none")
            record = read_record(out)
            if record is not None and record["status"] == "running" and is_alive(record):
                raise UserError(f"'{out}' is at work still, process {record['process']['pid']}: wait for it or end it.")
        for trial in gone:
            if trial.params.keys() == {axis.key for axis in self.plan.axes}:
                self.study.enqueue_trial(trial.params, user_attrs={"continues": trial.number})
            self.study.tell(trial.number, state=TrialState.FAIL)

    def _told(self, states: Any) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _work(self) -> None:
        try:
            while (trial := self._ask()) is not None:
                self._do(trial)
        except BaseException:
            self._left = 0
            raise

    def _ask(self) -> Trial | None:
        with self._asking:
            if self._left == 0 or self._stopped:
                return None
            self._left -= 1
            number = sum("continues" not in trial.user_attrs for trial in self._told(None))
            seed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
            self.study.sampler = TPESampler(seed=int(seed))
            trial = self.study.ask({axis.key: axis.distribution for axis in self.plan.axes})
            trial.set_user_attr("run", self._name(trial))
            return trial

    def _values(self, trial: Trial | FrozenTrial) -> list[str]:
        return [axis.override(trial.params[axis.key]) for axis in self.plan.axes]

    def _name(self, trial: Trial | FrozenTrial) -> str:
        return file_name(",".join(sorted(self._values(trial))))

    def _do(self, trial: Trial) -> None:
        name = self._name(trial)
        with self._asking:
            own = self._names[name]
        with own:  # where there are few values the same ones are proposed again, perhaps at a time
            outcome = self._trial(trial, name)
            with self._asking:
                self._tell(trial, outcome)

    def _trial(self, trial: Trial, name: str) -> Outcome:
        with self._asking:
            done = [t for t in self._told(COUNTS) if t.user_attrs.get("run") == name]
            place = f"{self._trials - self._left}/{self._trials}"
        if done:
            tell(f"{place}  {name}: known")
            for step, value in done[0].intermediate_values.items():
                trial.report(value, step)
            return Outcome(done[0].state, done[0].value if done[0].state == TrialState.COMPLETE else None)
        if name in self.failed:
            return Outcome(TrialState.FAIL, why=self.failed[name])
        if self._stopped:
            return Outcome(None, why="not begun")
        tell(f"{place}  {name}")
        return self._run(trial, self.plan.directory / name)

    def _run(self, trial: Trial, out: Path) -> Outcome:
        out.mkdir(parents=True, exist_ok=True)
        with output(None if self.jobs == 1 else out / LOG) as where:
            child = start("train", [*self.plan.fixed, *self._values(trial)], out, self.plan.study, where)
            self._children.append(child)
            if self._stopped:  # while it was started
                child.terminate()
            pruned = self._watch(child, trial, out) if self.prune else False
            code = child.wait()
            self._children.remove(child)
        record = read_record(out) or {}
        if code == 0:
            value = record.get("metrics", {}).get(self.plan.metric)
            if value is None:
                return Outcome(TrialState.FAIL, why=f"measured no finite {self.plan.metric}")
            return Outcome(TrialState.COMPLETE, value)
        if pruned:
            return Outcome(TrialState.PRUNED)
        if code < 0 or code > 128:
            number = -code if code < 0 else code - 128
            with suppress(ValueError):
                return Outcome(None, why=f"ended by {signal.Signals(number).name}")
        told = record.get("error") if record.get("status") == "failed" else None
        return Outcome(TrialState.FAIL, why=told or f"exit code {code}")

    def _watch(self, child: subprocess.Popen, trial: Trial, out: Path) -> bool:
        """Report each validation of a run until it ends; whether it was ended here."""
        reported = 0
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(self.every)
                return False
            record = read_record(out) or {}
            step, value = record.get("validated", 0), record.get("metrics", {}).get(self.plan.metric)
            if step <= reported or value is None:
                continue
            reported = step
            trial.report(value, step)
            if trial.should_prune() and not self._stopped:
                child.terminate()
                return True

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        name = self._name(trial)
        if outcome.state is None:
            self.killed[name] = outcome.why
            return
        if outcome.state == TrialState.FAIL:
            self.failed[name] = outcome.why
            trial.set_user_attr("why", outcome.why)
            tell(f"{name} failed: {outcome.why}")
        self.study.tell(trial, outcome.value, state=outcome.state)
        self.write()

    def best(self) -> list[FrozenTrial]:
        """Finished trials, the best first; one of each run."""
        trials = {t.user_attrs["run"]: t for t in reversed(self._told([TrialState.COMPLETE]))}
        sign = -1 if self.plan.direction == "maximize" else 1
        return sorted(trials.values(), key=lambda t: (sign * t.value, t.number))

    def write(self) -> None:
        """search.json."""
        best = self.best()
        content = {
            "format": FORMAT,
            "study": self.plan.study,
            **self.plan.asked,
            "overrides": self.plan.fixed,
            "seed": self.seed,
            "best": self._described(best[0]) | {"overrides": self.overrides(best[0])} if best else None,
            "trials": [self._described(t) for t in self._told(None) if t.params],
        }
        write_json(self.plan.directory / FILE, content)

    def overrides(self, trial: FrozenTrial) -> list[str]:
        """What `nxtp train` needs to train this one again, but for a name."""
        own = [o for o in self.plan.fixed if not o.startswith("name=")]
        alone = ["hydra.mode=RUN"] if any(o.startswith("study=") for o in own) else []
        return [*own, *self._values(trial), *alone]

    def _described(self, trial: FrozenTrial) -> dict[str, Any]:
        shown = {"number": trial.number, "run": self._name(trial), "state": trial.state.name.lower()}
        values = [value.partition("=")[2] for value in self._values(trial)]
        shown |= {"value": trial.value, "values": dict(zip([a.key for a in self.plan.axes], values, strict=True))}
        return shown | {k: v for k, v in trial.user_attrs.items() if k in ("why", "continues")}
