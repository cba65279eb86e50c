"""Sweeps: which runs there are, what each is called, and how one is run: as a process of its own."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf, open_dict

from nxtp.errors import UserError
from nxtp.record import read_record

log = logging.getLogger("nxtp")

LOG = "log.txt"  # of a run whose output would mix with that of others
LONGEST_NAME = 180  # characters; a file name has at most 255 bytes, and others are made from it
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Sweep:
    """``study`` its name, ``directory`` that of its runs, ``runs`` their names in order, ``axes`` the keys that differ."""

    study: str
    directory: Path
    runs: list[str]
    axes: list[str]

    @classmethod
    def of(cls, cfg: DictConfig) -> Sweep:
        """The sweep of a composed configuration, its node ``hydra`` included."""
        params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.get("params") or {}).items()]
        overrides = parse([*params, *cfg.hydra.overrides.task])
        axes = [o.get_key_element() for o in overrides if o.is_sweep_override() or o.input_line in params]
        axes = list(dict.fromkeys(axes))
        basic = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"]
        points = [p for batch in basic.split_arguments(overrides, None) for p in batch]
        runs = [run_name(o for o in point if o.split("=", 1)[0] in axes) for point in points]
        return cls(str(cfg.name), Path(cfg.hydra.sweep.dir), runs, axes)

    def unfinished(self) -> dict[str, str]:
        """Run → why it has not finished, of those that have not."""
        found = {}
        for run in self.runs:
            record = read_record(self.directory / run)
            if record is None:
                found[run] = "it left no record"
            elif record["status"] != "finished":
                found[run] = record.get("error") or record["status"]
        return found


def parse(overrides: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def run_name(overrides: Iterable[str]) -> str:
    """What differs, as the name of a directory: key=value, key=value, … sorted. A very long one ends in its hash.

    >>> run_name(["seed=0", "model/encoder=vit_tiny"])
    'model.encoder=vit_tiny,seed=0'
    """
    name = ",".join(sorted(o.replace("/", ".").replace(" ", "") for o in overrides)) or "run"
    if len(name.encode()) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}…{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name
