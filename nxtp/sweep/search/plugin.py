"""Hydra's sweeper ``hydra/sweeper=optuna``: Optuna chooses the runs of a sweep, any launcher runs them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from nxtp.config import to_dataclass
from nxtp.errors import UserError, at_least, nearest

if TYPE_CHECKING:
    from nxtp.sweep.search.space import Axis
    from nxtp.sweep.search.trials import Search

SHOWN = 10  # best trials


@dataclass
class SearchConfig:
    """conf/hydra/sweeper/optuna.yaml, which documents each key."""

    n_trials: int = 20
    n_jobs: int = 1
    metric: str | None = None
    direction: str | None = None
    prune: bool = False
    seed: int = 0
    params: dict[str, Any] = field(default_factory=dict)


class OptunaSweeper(Sweeper):
    """Searches ranges for the best metric of the run records."""

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, **options: Any):
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """
        Raises:
            UserError: an option, a range, a key or a value is wrong (then nothing has been started); or no trial is
                complete, or some were killed.
        """
        try:
            import optuna  # noqa: F401
        except ModuleNotFoundError:
            raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'nxtp[search]'.") from None
        from nxtp.sweep.search.space import split
        from nxtp.sweep.search.trials import Search, locked

        options = to_dataclass(SearchConfig, self.options, "hydra.sweeper")
        for name, lowest in (("n_trials", 1), ("n_jobs", 1), ("seed", 0)):
            at_least(f"hydra.sweeper.{name}", getattr(options, name), lowest)
        axes, fixed = split(options.params, arguments)
        metric, direction = self._goal(options)
        self._check(axes, fixed)
        composed: Any = OmegaConf.to_container(self.config, resolve=False)
        config = {key: value for key, value in composed.items() if key != "hydra"}
        directory = Path(str(self.config.hydra.sweep.dir))

        def launch(points: Sequence[list[str]], first: int) -> None:
            self.launcher.launch([[*fixed, *point] for point in points], initial_job_idx=first)

        with locked(directory):
            search = Search(directory, axes, config, metric, direction, seed=options.seed, prune=options.prune)
            search.run(launch, options.n_trials, options.n_jobs)
        self._print(search, fixed)
        search.require_finished()

    def _goal(self, options: SearchConfig) -> tuple[str, str]:
        """Metric and direction."""
        known: list[str] = []
        if self._command == "train":
            from nxtp.train.command import metric_names

            known = metric_names(self.config)
        metric = options.metric or (known[0] if known else None)
        if metric is None:
            raise UserError(f"hydra.sweeper.metric has no value: name a metric of nxtp {self._command}.")
        if known and metric not in known:
            message = f"no metric '{metric}'.{nearest(metric, known)} A run measures {', '.join(known)}."
            raise UserError(f"hydra.sweeper.metric: {message}")
        direction = options.direction or ("minimize" if metric.endswith("loss") else "maximize")
        if direction not in ("minimize", "maximize"):
            raise UserError(f"hydra.sweeper.direction must be minimize or maximize, got {direction}.")
        if options.prune and metric == "train/loss":
            raise UserError("hydra.sweeper.prune: train/loss is recorded only at the end; choose a validation metric.")
        if options.prune and "submitit" in self.config.hydra.launcher._target_:
            raise UserError("hydra.sweeper.prune: only runs on this machine can be stopped, not those of SLURM.")
        return metric, direction

    def _check(self, axes: list[Axis], fixed: list[str]) -> None:
        """Compose the configuration with every choice and both ends of every range."""
        extremes = [axis.extremes for axis in axes]
        for number in range(max(map(len, extremes))):
            point = [of_axis[min(number, len(of_axis) - 1)] for of_axis in extremes]
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, [*fixed, *point])
            if self._command == "train":
                from nxtp.train.command import SECTIONS

                for name, section in SECTIONS.items():
                    to_dataclass(section, cfg[name], name)

    @property
    def _command(self) -> str:
        return self.config.hydra.job.name

    def _print(self, search: Search, fixed: list[str]) -> None:
        """The best trials, and the command that repeats the best one."""
        from rich.console import Console
        from rich.table import Table

        best, console, name = search.best(), Console(), self.config.name
        counts = Counter(trial.state for trial in search.trials)
        table = Table(title=f"{name}: {', '.join(f'{n} {state}' for state, n in sorted(counts.items()))}")
        for title in ("", search.metric):
            table.add_column(title, justify="right", no_wrap=True)
        for axis in search.axes:
            table.add_column(axis.key, overflow="fold")
        for place, trial in enumerate(best[:SHOWN], start=1):
            values = [override.partition("=")[2] for override in search.overrides(trial)]
            table.add_row(str(place), f"{trial.value:.4f}", *values, style="bold" if place == 1 else None)
        console.print(table)
        if best:
            alone = ["hydra.mode=RUN"] if any(o.startswith("study=") for o in fixed) else []
            own = [o for o in fixed if not o.startswith("name=")]
            command = shlex.join([*own, *search.overrides(best[0]), *alone, f"name={name}-best"])
            console.print(f"Best run: {search.directory / best[0].run}", soft_wrap=True)
            console.print(f"nxtp {self._command} {command}", soft_wrap=True, highlight=False)


Plugins.instance().register(OptunaSweeper)
# Hydra instantiates only plugins whose _target_ is in the package hydra_plugins.
Plugins.instance().class_name_to_class["hydra_plugins.nxtp.OptunaSweeper"] = OptunaSweeper
