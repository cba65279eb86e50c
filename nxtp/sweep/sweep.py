"""Sweeps: which runs a command asks for, what each is called, and how one runs: in a process of its own."""

from __future__ import annotations

import hashlib
import logging
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

import nxtp.sweep.search.plugin  # noqa: F401  registers hydra/sweeper=optuna
from nxtp.config import compose_and_run, composed, explained, parse_arguments, quoted
from nxtp.errors import UserError
from nxtp.runs.lock import announce
from nxtp.runs.processes import SIGNALS
from nxtp.runs.record import read_record
from nxtp.runs.resume import is_finished
from nxtp.runs.secrets import refuse_secrets

log = logging.getLogger("nxtp")

LOG = "log.txt"  # a run's output, where several run at the same time
LONGEST_NAME = 180  # bytes; a file name has at most 255, and longer ones are derived from it
LISTED = 5  # runs in an error


@dataclass(frozen=True)
class Sweep:
    """The runs that a configuration with axes specifies.

    ``name``       its name
    ``directory``  contains a directory for each run
    ``points``     for each run, the overrides of the axes; none where the sweeper chooses the runs one after the other
    ``fixed``      keys on the command line that are not an axis
    """

    name: str
    directory: Path
    points: list[list[str]]
    fixed: list[str]

    @classmethod
    def of(cls, cfg: DictConfig) -> Sweep:
        """Of a composed configuration with its node ``hydra``, as Hydra passes it to a sweeper."""
        params = {str(k): v for k, v in (cfg.hydra.sweeper.get("params") or {}).items()}
        overrides = parse(cfg.hydra.overrides.task)
        axes = [*params, *(o.get_key_element() for o in overrides if o.is_sweep_override())]
        if "name" in axes:
            raise UserError("name=…: a sweep has one name, that of its directory; its runs are named by what differs.")
        points: list[list[str]] = []
        if cfg.hydra.sweeper._target_.endswith("BasicSweeper"):
            (grid,) = BasicSweeper.split_arguments([*parse(f"{k}={v}" for k, v in params.items()), *overrides], None)
            points = [[o for o in point if o.split("=", 1)[0] in axes] for point in grid]
        fixed = [o.key_or_group for o in overrides if o.get_key_element() not in axes]
        return cls(str(cfg.name), Path(cfg.hydra.sweep.dir), points, fixed)

    @classmethod
    def of_command(cls, command: str, argv: Sequence[str]) -> Sweep | None:
        """The sweep that ``argv`` asks for; None if it asks for one run, or for help."""
        arguments, _ = parse_arguments(argv)
        is_help = any((arguments.help, arguments.hydra_help, arguments.cfg, arguments.info))
        if is_help or not (arguments.multirun or any(o.startswith("study=") for o in arguments.overrides)):
            return None
        keys = {o.key_or_group: o for o in parse(arguments.overrides)}
        single = [str(o.input_line) for o in keys.values() if not o.is_sweep_override()]
        cfg = composed(command, single, arguments.config_dir)
        if cfg.hydra.mode is RunMode.RUN:
            return None
        with open_dict(cfg):
            task = [o for o in arguments.overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]
            cfg.hydra.overrides.task = task
        refuse_secrets(OmegaConf.to_container(cfg, resolve=False))
        refuse_secrets(single)
        sweep = cls.of(cfg)
        if sweep.points:  # report a misspelt axis before Hydra writes anything
            composed(command, [*single, *sweep.points[0]], arguments.config_dir)
        return sweep

    @property
    def runs(self) -> list[str]:
        """Their names, in order."""
        return [run_name(point) for point in self.points]

    def require_finished(self) -> None:
        """
        Raises:
            UserError: runs have failed or left no record; the message has the first few, and why.
        """
        reasons = {}
        for run in self.runs:
            record = read_record(self.directory / run)
            if record is None or record["status"] != "finished":
                reasons[run] = "left no record" if record is None else record.get("error") or record["status"]
        if reasons:
            count = f"{len(reasons)} of {len(self.runs)} runs have not finished"
            raise UserError(f"{count}; the same command goes on with these alone.{first_lines(reasons)}")


def run_or_sweep(function: Callable[[DictConfig], Any] | str, command: str, argv: Sequence[str]) -> None:
    """Run `nxtp COMMAND` (:func:`nxtp.config.compose_and_run`), or the sweep that ``argv`` asks for.

    Raises:
        UserError: a mistake in ``argv``; then nothing has been started. Or runs of the sweep have failed.
    """
    with explained(command):
        sweep = Sweep.of_command(command, argv)
    if sweep is None:
        compose_and_run(function, command, argv)
        return

    def run(cfg: DictConfig) -> Any:
        with open_dict(cfg):
            cfg.sweep, cfg.name = cfg.name, Path(HydraConfig.get().runtime.output_dir).name
        if is_scheduled():
            return (pkgutil.resolve_name(function) if isinstance(function, str) else function)(cfg)
        return run_in_process(command, cfg, sweep.runs)

    fixed = ",".join(quoted(key) for key in sweep.fixed)
    excluded = [*argv, f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"]
    failed = compose_and_run(run, command, excluded, multirun=True)
    sweep.require_finished()
    if failed and sweep.points:  # a finished run of other settings; in a search a trial may fail
        raise failed[0]


def parse(overrides: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def first_lines(reasons: dict[str, str]) -> str:
    """A line for each of the first few runs, with the reason, and how many more there are."""
    more = f"\n  and {len(reasons) - LISTED} more" if len(reasons) > LISTED else ""
    return "".join(f"\n  {run}: {reason}" for run, reason in list(reasons.items())[:LISTED]) + more


def run_name(point: Iterable[str]) -> str:
    """The directory of a run of a sweep, by the overrides that distinguish it: as Hydra makes it of conf/."""
    return file_name(",".join(sorted(point)))


def file_name(overrides: str) -> str:
    """Overrides as the name of a directory. A very long one is cut, and ends in its hash.

    >>> file_name("model/encoder=vit_tiny,seed=0")
    'model.encoder=vit_tiny,seed=0'
    """
    name = overrides.replace("/", ".")
    if len(name.encode()) > LONGEST_NAME:
        start = name.encode()[: LONGEST_NAME // 2].decode(errors="ignore")
        name = f"{start}…{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name or "run"


def run_in_process(command: str, cfg: DictConfig, runs: list[str]) -> float | None:
    """Run one of a sweep's ``runs`` as `nxtp COMMAND` in a process of its own, which may start further ones (DDP).

    A run that is killed, or runs out of memory, takes no other run with it. Under SLURM the tasks of a job are the
    processes (:func:`is_scheduled`): there the caller runs it itself.

    Returns:
        The metric that its record monitors, for sweepers.

    Raises:
        UserError: the run failed.
        SystemExit: this process was asked to stop; the run has saved its state, and the sweep ends.
    """
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    log.info("%s", f"{hydra.job.num + 1}/{len(runs)}  {out.name}" if runs else f"run {hydra.job.num + 1}  {out.name}")
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    if command == "evaluate":
        from nxtp.eval.settings import recorded_settings

        resolved = recorded_settings(cfg)
    if is_finished(out, resolved):
        log.info("%s: finished before", out.name)
        return _objective(out)
    given = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    arguments = [*(f"--config-dir={path}" for path in given), *hydra.overrides.task]
    arguments += [f"name={quoted(out.name)}", f"sweep={quoted(cfg.sweep)}"]
    arguments += ["hydra.mode=RUN", f"hydra.run.dir={quoted(os.path.relpath(out))}"]
    alone = _one_at_a_time()
    with nullcontext() if alone else (out / LOG).open("ab") as output:
        child = subprocess.Popen([sys.executable, "-m", "nxtp", command, *arguments], stdout=output, stderr=output)
        announce(out, ["nxtp", command, *arguments], child.pid)
        with forwarding(child) as signals:
            code = child.wait()
    if signals and code != 0:
        sys.exit(128 + signals[0])
    if code != 0:
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise UserError(f"{out.name} {end}" + ("" if alone else f"; see {os.path.relpath(out / LOG)}"))
    return _objective(out)


def _objective(run_dir: Path) -> float | None:
    record = read_record(run_dir) or {}
    return record.get("metrics", {}).get(record.get("monitor"))


def is_scheduled() -> bool:
    """Whether a scheduler has started this run's processes, one per GPU."""
    if _one_at_a_time():
        return False
    from lightning.fabric.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.detect()


def _one_at_a_time() -> bool:
    return HydraConfig.get().launcher._target_.endswith("BasicLauncher")


@contextmanager
def forwarding(child: subprocess.Popen) -> Iterator[list[int]]:
    """Forward signals that ask this process to stop: the child saves its state. The terminal sends it Ctrl-C itself.

    Yields:
        The signals that came.
    """
    signals: list[int] = []

    def forward(number: int, frame: object) -> None:
        signals.append(number)
        if number != signal.SIGINT and child.poll() is None:
            child.send_signal(number)

    try:
        before = {number: signal.signal(number, forward) for number in SIGNALS}
    except ValueError:  # not the main thread: its parent gets the signals
        before = {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


OmegaConf.register_new_resolver("nxtp.file_name", file_name, replace=True)
