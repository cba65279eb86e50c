"""Configuration: where conf/ and studies are, how Hydra composes a command, errors that name the nearest right key."""

from __future__ import annotations

import logging
import os
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from nxtp.errors import UserError, at_least, nearest
from nxtp.runs.secrets import has_key, refuse_secrets

log = logging.getLogger("nxtp")
T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parent
EXPERIMENTS = PACKAGE.parent / "experiments"
NOT_A_SWEEP = ("report",)  # of a study's files: what its table and plot show


def conf_dir() -> Path:
    """The shipped configuration: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


def _own_conf() -> Path | None:
    """The user's ./conf, which is searched before the shipped configuration."""
    own = Path.cwd() / "conf"
    return own if own.is_dir() and own.resolve() != conf_dir() else None


def study_dirs() -> list[Path]:
    """Where studies are searched: ./experiments, then the checkout's."""
    return [d for d in dict.fromkeys([Path.cwd() / "experiments", EXPERIMENTS]) if d.is_dir()]


def study_names() -> list[str]:
    """All sweeps, as `study=` takes them: decoder_depth/laptop, …"""
    files = (f for d in study_dirs() for f in d.glob("*/*.yaml") if f.stem not in NOT_A_SWEEP)
    return sorted({f"{f.parent.name}/{f.stem}" for f in files})


def _add_study(overrides: Sequence[str]) -> None:
    """Give Hydra the file experiments/<study>/<sweep>.yaml of an override ``study=<study>/<sweep>``."""
    from hydra.core.config_store import ConfigStore

    for name in (o.removeprefix("study=").strip("'\"") for o in overrides if o.startswith("study=")):
        if name in study_names():  # else Hydra reports it
            file = next(file for d in study_dirs() if (file := d / f"{name}.yaml").is_file())
            study, sweep = name.split("/")
            ConfigStore.instance().store(sweep, OmegaConf.load(file), f"study/{study}", package="_global_")


@contextmanager
def explained() -> Iterator[None]:
    """Raise an error of Hydra, OmegaConf or YAML as a UserError of one line."""
    from hydra.errors import HydraException

    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(explain(error)) from error


def compose_and_run(
    function: Callable[[DictConfig], Any] | str, config_name: str, argv: Sequence[str], *, multirun: bool = False
) -> list[UserError]:
    """Run ``function`` on the configuration composed from conf/, the user's own ./conf and ``argv``.

    Args:
        function: a callable, or "module:name" of one, which is imported once the configuration is composed.
        argv: Hydra's: overrides, ``--cfg job``, …
        multirun: run all that ``argv`` sweeps over; else of a study one run, what its runs share.

    Returns:
        Of several runs the errors of those that failed in this process; they have been logged.

    Raises:
        UserError: an unknown key, group, option or value, with the nearest known one; or the error of the one run.
    """
    import hydra

    argv = list(argv)
    if (own := _own_conf()) and not any(a in ("--config-dir", "-cd") for a in argv):
        argv += ["--config-dir", str(own)]
    for argument in argv:
        name = Path(argument.removeprefix("name=").strip("'\""))
        if argument.startswith("name=") and (name.is_absolute() or ".." in name.parts):
            raise UserError(f"{argument}: a run is written to runs/<name>, which must be inside runs/.")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of ending the process
    failed: list[UserError] = []

    def job(cfg: DictConfig) -> Any:
        try:
            refuse_secrets(OmegaConf.to_container(cfg, resolve=True))
            at_least("seed", cfg.seed, 0)
            return (pkgutil.resolve_name(function) if isinstance(function, str) else function)(cfg)
        except UserError as error:  # raised at the end: Hydra would add lines of its own, and end a sweep here
            failed.append(error)
            if multirun:
                log.error("%s", error)
            return None

    run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)
    os.environ["NXTP_COMMAND"] = config_name  # a distributed launcher starts `nxtp` again with these arguments
    saved = sys.argv
    try:
        with explained():
            _add_study(argv)
            sys.argv = [sys.argv[0], *(argv if multirun else with_override("hydra.mode=RUN", argv))]
            run()
    except RuntimeError as error:
        if '"srun"' not in str(error):
            raise
        raise UserError("hydra/launcher=slurm: no srun on this machine: start it on a login node.") from error
    finally:
        sys.argv = saved
    if failed and not multirun:
        raise failed[0]
    return failed


def help_text(command: str, config_name: str, argv: Sequence[str]) -> str:
    """What `nxtp COMMAND --help` prints: groups with their options, the configuration, Hydra's most used flags.

    Hydra's own help takes seconds (it opens every group again for each group), and lists groups that a command lacks.
    """
    from hydra._internal.utils import get_args_parser

    cfg = composed(config_name, get_args_parser().parse_args(list(argv)).overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    defaults = OmegaConf.load(conf_dir() / f"{config_name}.yaml").defaults
    listed = [str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry]
    options: dict[str, list[str]] = {}
    for group in [group for group in listed if not group.startswith("override")] + ["hydra"]:
        for place in filter(None, (conf_dir(), _own_conf())):
            for file in sorted((place / group).rglob("*.yaml"), key=lambda file: (len(file.parts), file)):
                options.setdefault(str(file.parent.relative_to(place)), []).append(file.stem)
        if group == "study":
            options[group] = study_names()
    lines = [f"  {name}={'|'.join(dict.fromkeys(found))}" for name, found in options.items()]
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


def composed(config_name: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> DictConfig:
    """The configuration of one run, with its node ``hydra``; nothing is run.

    Args:
        config_dir: searched before the shipped configuration; by default the user's ./conf.

    Raises:
        UserError: an unknown key, group or option, with the nearest known one.
    """
    import hydra

    overrides = list(overrides)
    if own := config_dir or _own_conf():
        overrides.append(f"hydra.searchpath=[{quoted(f'file://{os.path.abspath(own)}')}]")
    with explained(), hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        _add_study(overrides)
        return hydra.compose(config_name, overrides, return_hydra_config=True)


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
        if group == "study":
            return f"No study '{name}'.{nearest(name, study_names())} Known: {', '.join(study_names()) or 'none'}."
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


def instantiated(node: Any, where: str, **arguments: Any) -> Any:
    """The object of a node with ``_target_``.

    Raises:
        UserError: the class is not found, or refuses its arguments; names ``where``.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(f"{where} cannot be instantiated: {error.__cause__ or error}") from error


def _cpu_precision() -> str:
    """bf16-mixed on a CPU with bfloat16 instructions (half again as fast there), else 32-true."""
    import torch

    able = torch.cpu.get_capabilities()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"


# At import, since the processes of a launcher compose a run's configuration again.
# Without a W&B key a run is logged to disk, to be synchronised later.
OmegaConf.register_new_resolver("nxtp.wandb_offline", lambda: not has_key(), replace=True)
OmegaConf.register_new_resolver("nxtp.cpu_precision", _cpu_precision, replace=True)
