"""Configuration: where conf/ is, how a command is composed by Hydra, and errors that name the nearest right key."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from nxtp.errors import UserError, nearest
from nxtp.runs.secrets import has_key, refuse_secrets

log = logging.getLogger("nxtp")
T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parent
OTHER_GROUPS: dict[str, Callable[[], list[str]]] = {}  # groups found outside conf/, and what each contains


def conf_dir() -> Path:
    """The shipped configuration: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


class SweepRunner(Protocol):
    """What :func:`compose_and_run` needs to sweep a command; nxtp.sweep, which is above this module, provides it."""

    sweep: Any  # None where one run is asked for

    def prepare(self, argv: list[str]) -> list[str]:
        """Find the sweep that ``argv`` asks for; what Hydra is to be given."""

    def run(self, function: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
        """One run of the sweep."""

    def finish(self) -> None:
        """Raise a UserError if runs of the sweep have failed."""


def compose_and_run(
    function: Callable[[DictConfig], Any] | str,
    config_name: str,
    argv: Sequence[str],
    sweeper: SweepRunner | None = None,
) -> Any:
    """Run ``function`` on the configuration composed from conf/, the user's own ./conf and ``argv``.

    Args:
        function: a callable, or "module:name" of one, which is imported once the configuration is composed.
        argv: Hydra's: overrides, ``-m`` or ``study=`` for a sweep, ``--help``, ``--cfg job``, …
        sweeper: runs the sweep that ``argv`` asks for; without one, what a study's runs share is one run.

    Raises:
        UserError: an unknown key, group, option or value, with the nearest known one; or runs of a sweep that failed.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode

    argv = list(argv)
    shipped, own = conf_dir(), Path.cwd() / "conf"
    if own.is_dir() and own.resolve() != shipped and not any(a in ("--config-dir", "-cd") for a in argv):
        argv += ["--config-dir", str(own)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of ending the process
    failed: list[UserError] = []

    def call(cfg: DictConfig) -> Any:
        if isinstance(function, str):
            module, name = function.split(":")
            return getattr(importlib.import_module(module), name)(cfg)
        return function(cfg)

    def job(cfg: DictConfig) -> Any:
        is_multirun = HydraConfig.get().mode is RunMode.MULTIRUN
        try:
            refuse_secrets(OmegaConf.to_container(cfg, resolve=True))
            return sweeper.run(call, cfg) if sweeper is not None and is_multirun else call(cfg)
        except UserError as error:  # raised at the end: Hydra would add lines of its own, and end a sweep here
            failed.append(error)
            if is_multirun:
                log.error("%s", error)
            return None

    run = hydra.main(version_base="1.3", config_path=str(shipped), config_name=config_name)(job)
    os.environ["NXTP_COMMAND"] = config_name  # a distributed launcher starts `nxtp` again with these arguments
    saved = sys.argv
    try:
        argv = sweeper.prepare(argv) if sweeper is not None else with_override("hydra.mode=RUN", argv)
        sys.argv = [sys.argv[0], *argv]
        result = run()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    except RuntimeError as error:
        if '"srun"' not in str(error):
            raise
        raise UserError("hydra/launcher=slurm: no srun on this machine: start it on a login node.") from error
    finally:
        sys.argv = saved
    if sweeper is not None and sweeper.sweep is not None:
        sweeper.finish()
    elif failed:
        raise failed[0]
    return result


def help_text(command: str, config_name: str, argv: Sequence[str]) -> str:
    """What `nxtp COMMAND --help` prints: groups with their options, the configuration, Hydra's most used flags.

    Hydra's own help takes seconds (it opens every group again for each group), and lists groups that a command lacks.
    """
    from hydra._internal.utils import get_args_parser

    cfg = composed(config_name, get_args_parser().parse_args(list(argv)).overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    places = [conf_dir(), Path.cwd() / "conf"]
    defaults = OmegaConf.load(conf_dir() / f"{config_name}.yaml").defaults
    listed = [group for entry in defaults if isinstance(entry, DictConfig) for group in entry]
    lines = []
    for group in [str(group) for group in listed if not str(group).startswith("override")] + ["hydra"]:
        options = {place / group: None for place in places if (place / group).is_dir()}
        for folder in [*options, *(f for place in options for f in sorted(place.iterdir()) if f.is_dir())]:
            found = sorted(f.stem for f in folder.glob("*.yaml"))
            name = folder.relative_to(next(place for place in places if folder.is_relative_to(place)))
            lines += [f"  {name}={'|'.join(found)}"] if found else []
        lines += [f"  {group}={'|'.join(OTHER_GROUPS[group]())}"] if group in OTHER_GROUPS else []
    return f"""nxtp {command} [GROUP=OPTION] [KEY=VALUE] …

GROUP=OPTION takes a file of conf/ (yours in ./conf, then nxtp's):
{chr(10).join(lines)}

KEY=VALUE sets one value (+KEY=VALUE adds one, ~KEY removes one) of:
{textwrap.indent(OmegaConf.to_yaml(cfg), "  ")}
-m, --multirun      run every combination of comma-separated values
--cfg job           print the configuration and stop
--hydra-help        all flags of Hydra
"""


def with_override(override: str, argv: list[str]) -> list[str]:
    """``argv`` with one more override, next to the others: Hydra wants them together."""
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args(argv).overrides
    place = argv.index(given[-1]) + 1 if given else len(argv)
    return [*argv[:place], override, *argv[place:]]


def quoted(text: str) -> str:
    """A string as Hydra's grammar reads it back."""
    escaped = str(text).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of one run, with its node ``hydra``; nothing is run.

    Raises:
        UserError: an unknown key, group or option, with the nearest known one.
    """
    import hydra
    from hydra.errors import HydraException

    own = Path.cwd() / "conf"
    paths = ["study://"]
    if own.is_dir() and own.resolve() != conf_dir():
        paths.append(quoted(f"file://{own}"))
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            searchpath = f"hydra.searchpath=[{','.join(paths)}]"
            return hydra.compose(config_name, [*overrides, searchpath], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def explain(error: BaseException) -> str:
    """A configuration error in one line, with the nearest known name where there is one."""
    from hydra.errors import MissingConfigException

    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        found = re.search(r"[Mm]issing(?: mandatory)? value:? *'?([\w.]+)", str(error))
        return f"'{found[1] if found else error}' has no value: set it on the command line, as in name=mine."
    cause: BaseException | None = error
    while cause is not None:
        parent, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
        if isinstance(parent, DictConfig) and key is not None and key not in parent:
            known = [str(k) for k in parent]
            if parent._get_parent() is None:  # at the top, groups that default to null are not keys
                known = sorted({*known, *(p.name for p in conf_dir().iterdir() if p.is_dir())} - {"hydra"})
            where = str(getattr(cause, "full_key", "") or key)
            return f"No configuration key '{where}'.{nearest(str(key), known)} Known keys: {', '.join(sorted(known))}."
        cause = cause.__cause__ or cause.__context__
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").partition("/")
        if group in OTHER_GROUPS:
            known = OTHER_GROUPS[group]()
            return f"No {group} '{name}'.{nearest(name, known)} Known: {', '.join(known) or 'none'}."
        missing = (error.missing_cfg_file or "").rsplit("/", 1)[-1]
        return text.split("Config search path")[0].strip() + nearest(missing, error.options or [])
    overridden = re.search(r"Could not override '([^'@]+)", text)
    if overridden and "No match in the defaults list" in text:
        groups = sorted(str(p.relative_to(conf_dir())) for p in conf_dir().rglob("*") if p.is_dir())
        return f"No configuration group '{overridden[1]}'.{nearest(overridden[1], groups)} Known: {', '.join(groups)}."
    return text


def to_dataclass(cls: type[T], node: Any, where: str) -> T:
    """A plain configuration node as the dataclass ``cls``, its types checked.

    Raises:
        UserError: a key that ``cls`` lacks, or a value of another type; names ``where`` and the nearest key.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(cls), plain or {})
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        known = error.parent_node
        if known is not None and error.key not in known and not isinstance(error, ValidationError):
            raise UserError(f"No key '{where}.{key}'.{nearest(str(error.key), known)}") from error
        raise UserError(f"{where}.{key}: {str(error).splitlines()[0]}") from error


def _wandb_offline() -> bool:
    """True without a W&B key: the run is then logged to disk, to be synchronised later."""
    return not has_key()


def _cpu_precision() -> str:
    """bf16-mixed on a CPU with bfloat16 instructions (half again as fast there), else 32-true."""
    import torch

    able = torch.cpu.get_capabilities()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"


# At import, since the processes of a launcher compose a run's configuration again.
OmegaConf.register_new_resolver("nxtp.wandb_offline", _wandb_offline, replace=True)
OmegaConf.register_new_resolver("nxtp.cpu_precision", _cpu_precision, replace=True)
