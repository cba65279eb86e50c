"""Sweeps: which runs there are, what each is called, and how one is run: as a process of its own."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from nxtp.config import conf_dir, quoted, with_override
from nxtp.errors import UserError
from nxtp.runs.record import read_record
from nxtp.runs.resume import is_finished
from nxtp.runs.secrets import refuse_secrets
from nxtp.sweep.study import GROUP

log = logging.getLogger("nxtp")

LOG = "log.txt"  # what a run of several at a time prints
LONGEST_NAME = 180  # bytes; a file name has at most 255, and others are made from it
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Sweep:
    """What a configuration with axes asks for.

    ``study``      its name
    ``directory``  where its runs lie
    ``points``     the overrides of each run that differ; none where a sweeper of another kind decides as it goes
    ``fixed``      keys on the command line that are no axis
    """

    study: str
    directory: Path
    points: list[list[str]]
    fixed: list[str]

    @classmethod
    def of(cls, cfg: DictConfig) -> Sweep:
        """
        Args:
            cfg: a composed configuration with its node ``hydra``, as Hydra hands it to a sweeper.
        """
        params = {str(k): v for k, v in (cfg.hydra.sweeper.get("params") or {}).items()}
        given = parse(cfg.hydra.overrides.task)
        axes = [*params, *(o.get_key_element() for o in given if o.is_sweep_override())]
        if "name" in axes:
            raise UserError("name=…: a sweep has one name, that of its directory; its runs are named by what differs.")
        points: list[list[str]] = []
        if cfg.hydra.sweeper._target_.endswith("BasicSweeper"):
            overrides = [*parse(f"{k}={v}" for k, v in params.items()), *given]
            (grid,) = BasicSweeper.split_arguments(overrides, None)
            points = [[o for o in point if o.split("=", 1)[0] in axes] for point in grid]
        fixed = [o.key_or_group for o in given if o.get_key_element() not in axes]
        return cls(str(cfg.name), Path(cfg.hydra.sweep.dir), points, fixed)

    @classmethod
    def asked_for(cls, command: str, argv: Sequence[str]) -> Sweep | None:
        """The sweep that ``argv`` asks for; None if it asks for one run, or for help."""
        asked = get_args_parser().parse_args(argv)
        keys = {o.key_or_group: o for o in parse(asked.overrides)}
        several = asked.multirun or GROUP in keys
        if not several or any((asked.help, asked.hydra_help, asked.cfg, asked.info)):
            return None
        settled = [o.input_line for o in keys.values() if not o.is_sweep_override()]
        if asked.config_dir:
            settled.append(f"hydra.searchpath=[study://,{quoted('file://' + os.path.abspath(asked.config_dir))}]")
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = hydra.compose(command, settled, return_hydra_config=True)
            if cfg.hydra.mode is RunMode.RUN:
                return None
            with open_dict(cfg):
                task = [o for o in asked.overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]
                cfg.hydra.overrides.task = task
            refuse_secrets(OmegaConf.to_container(cfg, resolve=False))
            refuse_secrets(settled)
            sweep = cls.of(cfg)
            if sweep.points:  # a misspelt axis is reported before Hydra writes anything
                hydra.compose(command, [*settled, *sweep.points[0]])
        return sweep

    @property
    def runs(self) -> list[str]:
        """Their names, in order."""
        return [file_name(",".join(sorted(point))) for point in self.points]

    def require_finished(self) -> None:
        """
        Raises:
            UserError: runs failed or left no record; names the first few, and why.
        """
        whys = {}
        for run in self.runs:
            record = read_record(self.directory / run)
            if record is None or record["status"] != "finished":
                whys[run] = "left no record" if record is None else record.get("error") or record["status"]
        if whys:
            told = "".join(f"\n  {run}: {why}" for run, why in list(whys.items())[:5])
            more = f"\n  and {len(whys) - 5} more" if len(whys) > 5 else ""
            count = f"{len(whys)} of {len(self.runs)} runs have not finished"
            raise UserError(f"{count}; the same command takes them up again.{told}{more}")


class Sweeper:
    """Sweeps of ``nxtp <command>``, for :func:`nxtp.config.compose_and_run`."""

    def __init__(self, command: str):
        self.command = command
        self.sweep: Sweep | None = None

    def prepare(self, argv: list[str]) -> list[str]:
        self.sweep = Sweep.asked_for(self.command, argv)
        if self.sweep is None:
            return argv
        fixed = ",".join(quoted(key) for key in self.sweep.fixed)
        return with_override(f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]", argv)

    def run(self, function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
        if not is_scheduled():
            return run_apart(self.command, cfg, self.sweep.runs if self.sweep else [])
        name_run(cfg)
        return function(cfg)

    def finish(self) -> None:
        self.sweep.require_finished()


def parse(overrides: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def file_name(differs: str) -> str:
    """What differs, as the name of a directory. One that is very long is cut, and ends in its hash.

    >>> file_name("model/encoder=vit_tiny,seed=0")
    'model.encoder=vit_tiny,seed=0'
    """
    name = differs.replace("/", ".")
    if len(name.encode()) > LONGEST_NAME:
        start = name.encode()[: LONGEST_NAME // 2].decode(errors="ignore")
        name = f"{start}…{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name or "run"


def run_apart(command: str, cfg: DictConfig, runs: list[str]) -> float | None:
    """One of a sweep's ``runs`` by `nxtp COMMAND` in a process of its own, which may start further ones (DDP).

    A process that is killed, or runs out of memory, takes no other run with it. Under SLURM the tasks of a job are the
    processes (see :func:`is_scheduled`): there the caller runs it itself.

    Returns:
        The metric that its record monitors, for sweepers.

    Raises:
        UserError: the run failed.
        SystemExit: it was told to stop, has saved itself, and so ends the sweep.
    """
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    name_run(cfg)
    place = f"{hydra.job.num + 1}/{len(runs)}  " if runs else ""
    if is_finished(out, OmegaConf.to_container(cfg, resolve=True)):
        log.info("%s%s: finished before", place, out.name)
        return _objective(out)
    log.info("%s%s", place, out.name)
    arguments = list(hydra.overrides.task)
    for source in hydra.runtime.config_sources:
        arguments += ["--config-dir", source.path] if source.provider == "command-line" else []
    alone = _one_at_a_time()
    with output(None if alone else out / LOG) as where:
        child = start(command, arguments, out, cfg.sweep, where)
        with forwarding([child]) as told_to_stop:
            code = child.wait()
    if told_to_stop and code != 0:
        sys.exit(128 + told_to_stop[0])
    if code != 0:
        told = "" if alone else f"; see {os.path.relpath(out / LOG)}"
        by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        raise UserError(f"{out.name} {by}{told}")
    return _objective(out)


def start(command: str, arguments: list[str], out: Path, sweep: str, where: IO | None) -> subprocess.Popen:
    """The process of a run: `nxtp COMMAND` with Hydra's ``arguments``, in the directory ``out`` of ``sweep``.

    Args:
        where: what it prints goes there; None: to the terminal.
    """
    own = [f"name={quoted(out.name)}", f"sweep={quoted(sweep)}"]
    own += ["hydra.mode=RUN", f"hydra.run.dir={quoted(os.path.relpath(out))}"]
    return subprocess.Popen([sys.executable, "-m", "nxtp", command, *arguments, *own], stdout=where, stderr=where)


def _objective(run_dir: Path) -> float | None:
    record = read_record(run_dir) or {}
    return record.get("metrics", {}).get(record.get("monitor"))


def is_scheduled() -> bool:
    """Whether a scheduler has started this run's processes, one a GPU."""
    if _one_at_a_time():
        return False
    from lightning.fabric.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.detect()


def _one_at_a_time() -> bool:
    return HydraConfig.get().launcher._target_.endswith("BasicLauncher")


def name_run(cfg: DictConfig) -> None:
    """Give a run of a sweep, computed by the sweep's own process, the names it has in one of its own."""
    with open_dict(cfg):
        cfg.sweep, cfg.name = cfg.name, Path(HydraConfig.get().runtime.output_dir).name


@contextmanager
def output(path: Path | None) -> Iterator[IO | None]:
    """A file to append to; None, the terminal, without a path."""
    if path is None:
        yield None
        return
    with path.open("ab") as file:
        yield file


@contextmanager
def forwarding(children: Collection[subprocess.Popen]) -> Iterator[list[int]]:
    """Signals that ask this process to leave are its children's: they save themselves. Ctrl-C reaches them by the
    terminal.

    Yields:
        The signals that came.
    """
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        came.append(number)
        for child in list(children):
            if number != signal.SIGINT and child.poll() is None:
                child.send_signal(number)

    try:
        before = {number: signal.signal(number, forward) for number in (*FORWARDED, signal.SIGINT)}
    except ValueError:  # not the main thread: its parent gets the signals
        before = {}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


OmegaConf.register_new_resolver("nxtp.file_name", file_name, replace=True)
