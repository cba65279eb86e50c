"""The trials of a search: Optuna proposes values, a run measures them, search.json stores both."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import optuna
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from nxtp.errors import UserError
from nxtp.runs.atomic import write_json
from nxtp.runs.record import FILE as RECORD
from nxtp.runs.record import is_alive, read_record
from nxtp.runs.resume import differences
from nxtp.sweep.search.space import Axis
from nxtp.sweep.sweep import first_lines, run_name

FORMAT = 2
FILE = "search.json"
COUNTED = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


@dataclass
class SearchTrial:
    """One proposal.

    ``run``           its directory inside the search's
    ``params``        axis → value as Optuna proposed it; the run has it rounded
    ``state``         running (or killed: it is resumed), complete, pruned, failed
    ``intermediate``  [optimiser step, metric of the validation after it] where trials may be pruned
    """

    number: int
    run: str
    params: dict[str, Any]
    state: str = "running"
    value: float | None = None
    error: str | None = None
    intermediate: list[tuple[int, float]] = field(default_factory=list)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory of a search, until the block or the process ends.

    Raises:
        UserError: the directory contains a run or another sweep, or another process searches there.
    """
    for name, what in ((RECORD, "a run"), ("multirun.yaml", "a sweep over a grid")):
        if (directory / name).exists():
            raise UserError(f"'{directory}' contains {what}: choose another name for the search.")
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process searches in '{directory}': wait for it.") from None
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # trials' processes, which may end later, have it open too
        os.close(lock)


@dataclass
class Search:
    """The trials in a search's directory. A new object resumes where an earlier one stopped, however it stopped.

    A proposal depends on the seed, its number and the trials that are done, on nothing else: a search that was killed
    proposes what it would have proposed.

    ``config``     of the runs, but for the axes: with other settings trials could not be compared
    ``metric``     of the run records; ``direction`` is minimize or maximize
    ``prune``      stop a run whose metric after a validation is below the median of the other runs' at that step
    ``failed``     run → why, of this process; ``killed`` likewise

    Raises:
        UserError: the directory contains a search with other settings.
    """

    directory: Path
    axes: list[Axis]
    config: dict[str, Any]
    metric: str
    direction: str
    seed: int = 0
    prune: bool = False
    trials: list[SearchTrial] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    killed: dict[str, str] = field(default_factory=dict)

    poll_s: ClassVar[float] = 1.0  # between two looks at the record of a run that may be pruned

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if not (self.directory / FILE).exists():
            return
        before = json.loads((self.directory / FILE).read_text())
        now = json.loads(json.dumps({"settings": self.settings, "config": self.config}))
        changed = differences(before["settings"], now["settings"])
        changed += differences(before["config"], now["config"], may_change_trainer=False)
        if changed:
            raise UserError(
                f"'{self.directory}' contains a search with other settings ({', '.join(changed[:6])}): "
                "choose another name or delete it."
            )
        self.trials = [SearchTrial(**trial) for trial in before["trials"]]

    @property
    def settings(self) -> dict[str, Any]:
        ranges = {axis.key: axis.text for axis in self.axes}
        return {"metric": self.metric, "direction": self.direction, "ranges": ranges}

    def run(self, launch: Callable[[Sequence[list[str]], int], Any], n_trials: int, n_jobs: int = 1) -> None:
        """Run trials until ``n_trials`` are complete or pruned. Failed ones do not count; the next call replaces them.

        Args:
            launch: runs some trials, each given as its overrides, and returns when all have ended; its second argument
                is the number of the first.
            n_jobs: trials per call of ``launch``.

        Raises:
            UserError: a run of a search that was killed still goes on.
        """
        killed = [trial for trial in self.trials if trial.state == "running"]
        for trial in killed:
            record = read_record(self.directory / trial.run)
            if record is not None and record["status"] == "running" and is_alive(record):
                process = record["process"]["pid"]
                raise UserError(f"'{self.directory / trial.run}' still runs, process {process}: wait for it or end it.")
        left = n_trials - sum(trial.state in COUNTED for trial in self.trials)
        while left > 0:
            size = min(left, n_jobs)
            batch, killed = killed[:size], killed[size:]
            batch += [self._propose() for _ in range(size - len(batch))]
            self._run(batch, launch)
            left -= size

    def overrides(self, trial: SearchTrial) -> list[str]:
        return [axis.override(trial.params[axis.key]) for axis in self.axes]

    def best(self) -> list[SearchTrial]:
        """Complete trials, the best first; one of each run."""
        runs = {trial.run: trial for trial in reversed(self.trials) if trial.state == "complete"}
        in_order = sorted(runs.values(), key=lambda trial: trial.number)
        return sorted(in_order, key=lambda trial: trial.value or 0.0, reverse=self.direction == "maximize")

    def require_finished(self) -> None:
        """
        Raises:
            UserError: trials were killed, or none is complete.
        """
        if self.killed:
            count = f"{len(self.killed)} of {len(self.trials)} trials have not finished"
            raise UserError(f"{count}; the same command goes on with these alone.{first_lines(self.killed)}")
        if not self.best():
            raise UserError(f"No trial is complete.{first_lines(self.failed)}")

    def _study(self, number: int) -> optuna.Study:
        """What Optuna knows when it proposes trial ``number``."""
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        study = optuna.create_study(direction=self.direction, sampler=TPESampler(seed=int(seed)), pruner=MedianPruner())
        for trial in self.trials:
            if trial.state in COUNTED:
                known = {"params": trial.params, "distributions": self._distributions, "value": trial.value}
                steps = dict(trial.intermediate)
                study.add_trial(create_trial(state=COUNTED[trial.state], intermediate_values=steps, **known))
        return study

    @property
    def _distributions(self) -> dict[str, Any]:
        return {axis.key: axis.distribution for axis in self.axes}

    def _propose(self) -> SearchTrial:
        number = len(self.trials)
        trial = SearchTrial(number, "", self._study(number).ask(self._distributions).params)
        trial.run = run_name(self.overrides(trial))
        self.trials.append(trial)
        return trial

    def _run(self, batch: list[SearchTrial], launch: Callable[[Sequence[list[str]], int], Any]) -> None:
        self._write()  # what is proposed survives a kill
        ended = self.failed | self.killed
        done = {t.run: t for t in self.trials if t.state in COUNTED or t.run in ended}
        new = {t.run: t for t in batch if t.run not in done}  # few choices: the same values are proposed again
        if new:
            with self._pruning(new.values()):
                launch([self.overrides(trial) for trial in new.values()], batch[0].number)
        for trial in new.values():
            self._end(trial)
        for trial in batch:
            if trial.run in done:
                click.echo(f"{trial.run}: known", err=True)
            same = done.get(trial.run) or new[trial.run]
            trial.state, trial.value, trial.error = same.state, same.value, same.error
            trial.intermediate = same.intermediate
        self._write()

    def _end(self, trial: SearchTrial) -> None:
        record = read_record(self.directory / trial.run) or {}
        status = record.get("status", "left no record")
        if status == "finished":
            trial.value = record["metrics"].get(self.metric)
            trial.state = "failed" if trial.value is None else "complete"
            trial.error = f"measured no finite {self.metric}" if trial.value is None else None
        elif status == "failed":
            trial.state, trial.error = "failed", record.get("error")
        elif trial.state != "pruned":
            self.killed[trial.run] = "killed" if status == "running" else status
        if trial.state == "failed":
            self.failed[trial.run] = trial.error or status
            click.echo(f"{trial.run} failed: {self.failed[trial.run]}", err=True)

    def _write(self) -> None:
        best = [asdict(trial) | {"overrides": self.overrides(trial)} for trial in self.best()[:1]]
        content = {"format": FORMAT, "settings": self.settings, "seed": self.seed, "best": best[0] if best else None}
        content |= {"trials": [asdict(trial) for trial in self.trials], "config": self.config}
        write_json(self.directory / FILE, content)

    @contextmanager
    def _pruning(self, trials: Collection[SearchTrial]) -> Iterator[None]:
        """Meanwhile, report the metric after each validation to Optuna, and stop the runs that it prunes."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(trials, ended))
        if self.prune:
            watcher.start()
        try:
            yield
        finally:
            ended.set()
            if self.prune:
                watcher.join()

    def _watch(self, trials: Collection[SearchTrial], ended: threading.Event) -> None:
        watched = []
        for trial in trials:
            study = self._study(trial.number)
            study.enqueue_trial(trial.params)
            watched.append((trial, study.ask(self._distributions)))
        while not ended.wait(self.poll_s):
            for trial, proposal in watched:
                record = read_record(self.directory / trial.run) or {}
                step, value = record.get("validated", 0), record.get("metrics", {}).get(self.metric)
                if value is None or step <= max((s for s, _ in trial.intermediate), default=0):
                    continue
                trial.intermediate.append((step, value))
                proposal.report(value, step)
                if proposal.should_prune() and record["status"] == "running" and is_alive(record):
                    trial.state = "pruned"
                    click.echo(f"{trial.run}: pruned after step {step}", err=True)
                    with suppress(ProcessLookupError):  # it has ended meanwhile
                        os.kill(record["process"]["pid"], signal.SIGTERM)
