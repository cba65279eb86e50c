"""`nxtp sweep search`: Optuna in place of a grid."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from nxtp.config import composed, explain, to_dataclass
from nxtp.errors import UserError, nearest

if TYPE_CHECKING:
    from nxtp.sweep.search.trials import Plan, Search

SHOWN = 10  # best trials


@click.command()
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--trials", type=click.IntRange(1), required=True, help="Trials in all, those done before included.")
@click.option("--n-jobs", "jobs", type=click.IntRange(1), default=1, show_default=True, help="Trials at a time.")
@click.option("--metric", help="Of the run record.  [default: the monitored one]")
@click.option("--direction", type=click.Choice(["maximize", "minimize"]), help="[default: minimize a loss]")
@click.option("--prune", is_flag=True, help="Stop trials that are below the median after a validation.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the proposals.")
def search(
    overrides: tuple[str, ...],
    trials: int,
    jobs: int,
    metric: str | None,
    direction: str | None,
    prune: bool,
    seed: int,
) -> None:
    """Search ranges for the best metric: OVERRIDES are those of nxtp train, some with a range in place of a value.

    \b
    nxtp sweep search --trials 20 experiment=scenes name=lr_search \\
        'optim.lr=tag(log,interval(1e-5,1e-2))' 'model.decoder.depth=range(1,5)'

    The same command again continues. Exit code 1 if no trial has finished, or some were killed.
    """
    try:
        from nxtp.sweep.search.trials import Search
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError("nxtp sweep search needs Optuna: pip install 'nxtp[search]'") from error
    plan = make_plan(overrides, metric, direction)
    if prune and plan.metric == "train/loss":
        raise UserError("--prune: train/loss is in the record only at the end; choose a metric of the validation.")
    with Search(plan, seed=seed, jobs=jobs, prune=prune) as done:
        done.run(trials)
        show(done, Console())
        require(done)


def make_plan(overrides: Sequence[str], metric: str | None = None, direction: str | None = None) -> Plan:
    """
    Raises:
        UserError: a range, a key, a value or a metric that is wrong; nothing has been started.
    """
    from nxtp.sweep.search.space import split
    from nxtp.sweep.search.trials import Plan

    axes, fixed = split(overrides)
    tries = [axis.tries for axis in axes]
    configs = []
    for number in range(max(map(len, tries))):
        cfg = composed("train", [*fixed, *(of_axis[min(number, len(of_axis) - 1)] for of_axis in tries)])
        try:
            study, directory = str(cfg.name), str(cfg.hydra.sweep.dir)
            known = _check(cfg)
            configs.append(OmegaConf.to_container(cfg, resolve=False))
        except OmegaConfBaseException as error:
            raise UserError(explain(error)) from error
    metric = metric or known[0]
    if metric not in known:
        raise UserError(f"No metric '{metric}'.{nearest(metric, known)} A run measures {', '.join(known)}.")
    if direction is None:
        direction = "minimize" if metric.endswith("loss") else "maximize"
    config = {key: value for key, value in configs[0].items() if key != "hydra"}
    return Plan(study, Path(directory), axes, fixed, config, metric, direction)


def _check(cfg) -> list[str]:
    """Whether the values are such as a run takes. The metrics that it will have."""
    from nxtp.train.command import SECTIONS, metric_names

    for name, section in SECTIONS.items():
        to_dataclass(section, cfg[name], name)
    return metric_names(cfg)


def show(done: Search, console: Console) -> None:
    """The best trials, and how the best is trained again."""
    axes, best = done.plan.axes, done.best()
    count = Counter(t.state.name.lower() for t in done.study.trials if "run" in t.user_attrs)
    title = f"{done.plan.study}: {', '.join(f'{n} {state}' for state, n in sorted(count.items()))}"
    table = Table(title=title)
    for name in ("", done.plan.metric):
        table.add_column(name, justify="right", no_wrap=True)
    for axis in axes:
        table.add_column(axis.key, overflow="fold")
    for place, trial in enumerate(best[:SHOWN], start=1):
        values = [axis.override(trial.params[axis.key]).partition("=")[2] for axis in axes]
        table.add_row(str(place), f"{trial.value:.4f}", *values, style="bold" if place == 1 else None)
    console.print(table)
    if best:
        name = f"name={done.plan.study}-best"
        console.print(f"Model directory: {done.plan.directory / best[0].user_attrs['run'] / 'model'}", soft_wrap=True)
        console.print(f"nxtp train {shlex.join([*done.overrides(best[0]), name])}", soft_wrap=True, highlight=False)


def require(done: Search) -> None:
    """
    Raises:
        UserError: nothing has finished, or trials were killed.
    """
    if done.killed:
        told = "".join(f"\n  {run}: {why}" for run, why in list(done.killed.items())[:5])
        raise UserError(f"{len(done.killed)} trials have not ended; the same command continues them.{told}")
    if not done.best():
        told = "".join(f"\n  {run}: {why}" for run, why in list(done.failed.items())[:5])
        raise UserError(f"No trial has finished.{told}")
