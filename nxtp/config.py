"""Configuration: where conf/ and studies are, how Hydra composes a command, errors that name the nearest right key."""

from __future__ import annotations

import json
import logging
import os
import pkgutil
import re
import shlex
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
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

from nxtp.errors import UserError, at_least, nearest, one_line
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
    """The user's ./conf, or any project's: searched after the shipped configuration, it only adds options."""
    own = Path.cwd() / "conf"
    return own if own.is_dir() and own.resolve() != conf_dir() else None


def study_dirs() -> list[Path]:
    """Where studies are searched: ./experiments, then the checkout's."""
    return [d for d in dict.fromkeys([Path.cwd() / "experiments", EXPERIMENTS]) if d.is_dir()]


def _study_file(name: str) -> Path:
    return next(file for place in study_dirs() if (file := place / f"{name}.yaml").is_file())


def study_names() -> list[str]:
    """All sweeps, as `study=` takes them: decoder_depth/laptop, …"""
    files = (f for d in study_dirs() for f in d.glob("*/*.yaml") if f.stem not in NOT_A_SWEEP)
    return sorted({f"{f.parent.name}/{f.stem}" for f in files})


def _add_study(overrides: Sequence[str]) -> None:
    """Give Hydra the file experiments/<study>/<sweep>.yaml of an override ``study=<study>/<sweep>``.

    Raises:
        UserError: there is none; with the nearest one.
    """
    from hydra.core.config_store import ConfigStore

    for name in (o.removeprefix("study=").strip("'\"") for o in overrides if o.startswith("study=")):
        if name not in (known := study_names()):
            raise UserError(f"No study '{name}'.{nearest(name, known)} Known: {', '.join(known) or 'none'}.")
        study, sweep = name.split("/")
        content = OmegaConf.load(_study_file(name))
        ConfigStore.instance().store(sweep, content, f"study/{study}", package="_global_")


def _only_others(config_name: str, cfg: DictConfig) -> set[str]:
    """Keys and groups that this command lacks and the other one with studies has."""
    (other,) = {"train", "evaluate"} - {config_name}
    theirs = {*OmegaConf.load(conf_dir() / f"{other}.yaml"), *_groups(other)}
    return theirs - {*cfg, *_groups(config_name), "hydra"}


def _avoids(study: str, foreign: set[str]) -> bool:
    """Whether a study sets and sweeps none of these keys and groups, so that a command without them can run it."""
    try:
        content: Any = OmegaConf.load(_study_file(study))
    except yaml.YAMLError:
        return True  # running it reports what is wrong
    entries = [entry for entry in content.pop("defaults", []) if isinstance(entry, DictConfig)]
    overridden = {str(key).removeprefix("override ").lstrip("/") for entry in entries for key in entry}
    swept = {str(key).partition(".")[0] for key in OmegaConf.select(content, "hydra.sweeper.params") or ()}
    return foreign.isdisjoint({*content, *overridden, *swept})


def _refuse_hidden_options(overrides: Sequence[str]) -> None:
    """
    Raises:
        UserError: an override selects an option that ./conf has too, with other content.
    """
    for override in overrides:
        file = f"{override.replace('=', '/')}.yaml"
        ours, theirs = conf_dir() / file, (_own_conf() or conf_dir()) / file
        if ours.is_file() and theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
            raise UserError(f"{override} is an option of nxtp, and conf/{file} another of the same name: rename yours.")


def _groups(config_name: str) -> list[str]:
    """The groups of options of a command's configuration, with those inside them: model, model/encoder, …"""
    defaults = OmegaConf.load(conf_dir() / f"{config_name}.yaml").defaults
    listed = [str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry]
    groups = [group for group in listed if not group.startswith("override")] + ["hydra"]
    inside = (str(path.relative_to(conf_dir())) for g in groups for path in (conf_dir() / g).glob("*") if path.is_dir())
    return sorted({*groups, *inside} - {"hydra"})


@contextmanager
def explained(config_name: str) -> Iterator[None]:
    """Raise an error of Hydra, OmegaConf or YAML as a UserError of one line."""
    from hydra.errors import HydraException

    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(explain(error, config_name)) from error


def parse_arguments(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Hydra's arguments parsed, and those that are no override: Hydra itself wants all overrides next to each other."""
    from hydra._internal.utils import get_args_parser

    parsed = get_args_parser().parse_intermixed_args(list(argv))
    flags = list(argv)
    for override in parsed.overrides:
        flags.remove(override)
    return parsed, flags


def _check_overrides(overrides: Sequence[str]) -> None:
    """
    Raises:
        UserError: an override that Hydra accepts and a run fails on, or whose error Hydra words less clearly.
    """
    for override in overrides:
        group, _, option = override.partition("=")
        if re.match(r"\+?logger=.*tensorboard", override) and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
            raise UserError("logger=tensorboard needs tensorboard: pip install tensorboard")
        if option == "null" and (options := sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))):
            raise UserError(f"{override}: leave {group} out, or choose one of its options: {', '.join(options)}.")
        name = Path(option.strip("'\""))
        if group == "name" and (name.is_absolute() or ".." in name.parts):
            raise UserError(f"{override}: a run is written to runs/<name>, which must be inside runs/.")


def compose_and_run(
    function: Callable[[DictConfig], Any] | str, config_name: str, argv: Sequence[str], *, multirun: bool = False
) -> list[UserError]:
    """Run ``function`` on the configuration composed from conf/, the user's own ./conf and ``argv``.

    Args:
        function: a callable, or "module:name" of one, which is imported once the configuration is composed.
        argv: Hydra's: overrides, ``--cfg job``, …
        multirun: run all that ``argv`` sweeps over; otherwise one run, of a study with what its runs share.

    Returns:
        Of several runs the errors of those that failed in this process; they have been logged.

    Raises:
        UserError: an unknown key, group, option or value, with the nearest known one; or the error of the one run.
    """
    import hydra

    parsed, flags = parse_arguments(argv)
    overrides = replacing(parsed.overrides) + ([] if multirun else ["hydra.mode=RUN"])
    if parsed.config_dir is None and (own := _own_conf()):
        _refuse_hidden_options(overrides)
        flags += ["--config-dir", str(own)]
    _check_overrides(overrides)
    if os.getcwd() not in sys.path:  # for a `_target_` of one's own; last, so that it hides no library
        sys.path.append(os.getcwd())
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of ending the process
    failed: list[UserError] = []

    def job(cfg: DictConfig) -> Any:
        try:
            refuse_secrets(OmegaConf.to_container(cfg, resolve=True))
            at_least("seed", cfg.seed, 0)
            if cfg.seed >= 2**32:
                raise UserError(f"seed must be ≤ {2**32 - 1}, got {cfg.seed}.")
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
        with explained(config_name):
            _add_study(overrides)
            sys.argv = [sys.argv[0], *flags, *overrides]  # a launcher of further ranks appends overrides
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
    from hydra.core.config_store import ConfigStore

    parsed, _ = parse_arguments([a for a in argv if a not in ("--help", "-h")])
    cfg = composed(config_name, parsed.overrides, parsed.config_dir)
    with open_dict(cfg):
        del cfg["hydra"]
    lines, foreign = [], _only_others(config_name, cfg)
    for group in _groups(config_name):
        if group == "study" and command != config_name:
            continue  # studies are of the command that the configuration is named after
        names = [] if not group.startswith("hydra/") else ConfigStore.instance().list(group)  # of installed plugins
        names += sorted(f.name for place in (conf_dir(), _own_conf()) if place for f in (place / group).glob("*.yaml"))
        options = [name.removesuffix(".yaml") for name in dict.fromkeys(names)]
        if group == "study":
            options = [name for name in study_names() if _avoids(name, foreign)]
        lines += [f"  {group}={'|'.join(options)}"] if options else []
    return f"""nxtp {command} [GROUP=OPTION] [KEY=VALUE] …

GROUP=OPTION takes a file of conf/ (nxtp's, and yours in ./conf):
{chr(10).join(lines)}

KEY=VALUE sets one value (+KEY=VALUE adds one, ~KEY removes one) of:
{textwrap.indent(OmegaConf.to_yaml(cfg), "  ")}
-m, --multirun      run every combination of comma-separated values
--cfg job           print the configuration and stop
--hydra-help        all flags of Hydra
"""


def quoted(text: str) -> str:
    """A string as Hydra's grammar reads it back."""
    escaped = str(text).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def replacing(overrides: Sequence[str]) -> list[str]:
    """With ``key=null`` before an override ``key={_target_: …}``: Hydra would add another class's arguments to it."""
    listed: list[str] = []
    for override in overrides:
        whole = re.match(r"([\w.]+)=\{ *_target_", override)
        listed += [f"{whole[1]}=null", override] if whole else [override]
    return listed


def composed(config_name: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> DictConfig:
    """The configuration of one run, with its node ``hydra``; nothing is run.

    Args:
        config_dir: searched after the shipped configuration; by default the user's ./conf.

    Raises:
        UserError: an unknown key, group or option, with the nearest known one.
    """
    import hydra

    overrides = replacing(overrides)
    if own := config_dir or _own_conf():
        overrides.append(f"hydra.searchpath=[{quoted(f'file://{os.path.abspath(own)}')}]")
    with explained(config_name), hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        _add_study(overrides)
        return hydra.compose(config_name, overrides, return_hydra_config=True)


def explain(error: BaseException, config_name: str) -> str:
    """A configuration error in one line, with the nearest known name where there is one."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        found = re.search(r"[Mm]issing(?: mandatory)? value:? *'?([\w.]+)", str(error))
        return f"'{found[1] if found else error}' has no value: set it on the command line, as in name=mine."
    text = one_line(error)
    cause: BaseException | None = error
    while cause is not None:
        parent, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
        if isinstance(parent, DictConfig) and key is not None and key not in parent:
            known = sorted(str(k) for k in parent)
            if parent._get_parent() is None:  # at the top, groups that default to null are not keys
                known = sorted({*known, *(group for group in _groups(config_name) if "/" not in group)} - {"hydra"})
            where = str(getattr(cause, "full_key", "") or key)
            near = nearest(str(key), known, where.removesuffix(str(key)))
            hint = re.search(r"To append to your config use (\+.+)", text)
            add = f" To add a key: {hint[1]}" if hint else ""
            return f"No configuration key '{where}'.{near} Known keys: {', '.join(known) or 'none'}.{add}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        quoted = shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")
        return f"{text.split(' See https')[0]}: is this one text? Then it needs two pairs of quotes: {quoted}"
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if error.options:
            near = nearest(option, error.options, f"{group}=")
            return f"No option '{group}={option}'.{near} Known: {', '.join(error.options)}."
        return text.split("Config search path")[0].strip()
    overridden = re.search(r"Could not override '([^'@]+)", text)
    if overridden and "No match in the defaults list" in text:
        groups = _groups(config_name)
        return f"No configuration group '{overridden[1]}'.{nearest(overridden[1], groups)} Known: {', '.join(groups)}."
    return text


def to_dataclass(cls: type[T], node: Any, where: str) -> T:
    """A plain configuration node as the dataclass ``cls``, its types checked.

    Args:
        where: the section that ``node`` is, such as ``optim``; in a file: ``FILE: SECTION``, or ``FILE: `` of all.

    Raises:
        UserError: a key that ``cls`` lacks, or a value of another type; names ``where`` and the nearest key.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        merged: Any = OmegaConf.merge(_structured(cast(Any, cls)), plain or {})
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        file, _, section = where.rpartition(": ")
        place, leaf = f"{file}: " if file else "", str(error.key)
        key = f"{section}.{error.full_key or leaf}".lstrip(".")
        known = error.parent_node
        if known is not None and error.key not in known and not isinstance(error, ValidationError):
            raise UserError(f"{place}No key '{key}'.{nearest(leaf, known, key.removesuffix(leaf))}") from error
        raise UserError(f"{place}{key}: {str(error).splitlines()[0]}") from error


@cache
def _structured(cls: Any) -> Any:
    """Cached: building it takes longer than the rest of :func:`to_dataclass`."""
    return OmegaConf.structured(cls)


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
        raise UserError(f"{where} cannot be instantiated: {one_line(error.__cause__ or error)}") from error


def rank_count(trainer: Any) -> int:
    """Ranks of a node ``trainer``. Lightning's ``devices`` is a number, a list, "0,1", or auto: all of this machine."""
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if OmegaConf.is_list(devices) or isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", -1, "-1"):
        import torch

        devices = 1 if trainer["accelerator"] == "cpu" else max(torch.cuda.device_count(), 1)
    return int(devices) * int(trainer["num_nodes"])


def _accumulate(*, _parent_: Any, _root_: Any) -> int:
    """Batches per step of a node ``trainer``, so that a step has ``global_batch`` images."""
    if _root_.get("global_batch") is None:
        return 1
    return max(int(_root_.global_batch) // max(_root_.data.batch_size * rank_count(_parent_), 1), 1)


def _accelerator() -> str:
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _precision(accelerator: str, on_cpu: str) -> str:
    """bf16-mixed on a GPU, unless the one of this machine has no bfloat16."""
    import torch

    if accelerator != "gpu":
        return on_cpu
    lacks = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "32-true" if lacks else "bf16-mixed"


def _cpu_precision() -> str:
    """bf16-mixed on a CPU with bfloat16 instructions (half again as fast there), else 32-true."""
    import torch

    able = torch.cpu.get_capabilities()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"


# At import, since the processes of a launcher compose a run's configuration again.
# Without a W&B key a run is logged to disk, to be synchronised later.
OmegaConf.register_new_resolver("nxtp.wandb_offline", lambda: not has_key(), replace=True)
OmegaConf.register_new_resolver("nxtp.accumulate", _accumulate, replace=True)
OmegaConf.register_new_resolver("nxtp.accelerator", _accelerator, replace=True)
OmegaConf.register_new_resolver("nxtp.precision", _precision, replace=True)
OmegaConf.register_new_resolver("nxtp.cpu_precision", _cpu_precision, replace=True)
