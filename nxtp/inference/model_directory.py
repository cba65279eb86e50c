"""The format of a model directory: ``model.safetensors``, ``config.yaml`` and the tokenizer's files.

A directory may be untrusted. It is data (:mod:`nxtp.model.untrusted`), and names no source beside its own files.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import nxtp
from nxtp.data.shards.manifest import sha256_of
from nxtp.errors import UserError, some_of
from nxtp.model.hub import is_path, reason
from nxtp.model.untrusted import read_json, read_yaml, values
from nxtp.runs.atomic import atomic_directory

if TYPE_CHECKING:
    from nxtp.model.model import ModelConfig
    from nxtp.model.tokenizer import LabelTokenizer

FORMAT = 1
CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "tokenizer.json", "tokenizer_config.json")  # those with a fingerprint in CONFIG
_MAX_ADDED = 20_000  # tokens beside the vocabulary, built one by one; Gemma's tokenizer has 6,400
_MAX_INSERTED = 16  # characters that all replacements of a normalizer insert: they multiply
# A repeated group that repeats or chooses inside: time exponential in the text, as (a+)+ or (a|aa)*.
_EXPONENTIAL = re.compile(r"((?<!\()[|+*?]|\{\d*,\d*\})[^(]*\)([+*]|\{\d)")


def write_model_dir(
    directory: Path,
    write_weights: Callable[[Path], None],
    tokenizer: LabelTokenizer,
    config: ModelConfig,
    provenance: dict[str, Any],
) -> None:
    """Write a model directory, or replace one, in one rename.

    Args:
        write_weights: writes the safetensors file to a path.
        config: must build the model without other sources.

    Raises:
        UserError: ``directory`` contains other files, which would be lost.
    """
    directory = directory.resolve()  # a link stays, and what it leads to is replaced
    kept = {CONFIG, *FILES, "calibration.json", "calibration.png", "README.md", ".gitattributes"}
    if directory.exists() and (foreign := sorted(path.name for path in directory.iterdir() if path.name not in kept)):
        raise UserError(f"'{directory}' contains {some_of(foreign)}, no files of a model: choose another directory.")
    with atomic_directory(directory) as new:
        write_weights(new / WEIGHTS)
        tokenizer.save(new)
        content = {
            "format": FORMAT,
            "nxtp": nxtp.__version__,
            "model": asdict(config),
            "provenance": provenance,
            "files": {name: {"bytes": (new / name).stat().st_size, "sha256": sha256_of(new / name)} for name in FILES},
        }
        text = yaml.dump(content, Dumper=_WithoutAliases, sort_keys=False, allow_unicode=True)
        (new / CONFIG).write_text(text)


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def locate(source: str | Path) -> Path:
    """A local model directory as it is; a hub name ("owner/name") is downloaded.

    Raises:
        UserError: no such directory and no such model on the hub.
    """
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.exists() or "/" not in str(source) or is_path(source):
        raise UserError(f"No model directory '{source}'.")
    from huggingface_hub import snapshot_download

    from nxtp.inference.calibration import FILE as CALIBRATION

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, CALIBRATION, *FILES]))
    except Exception as error:
        raise UserError(f"No directory '{source}', and the hub has no such model: {reason(error)}.") from error


def of_a_run(directory: Path) -> str:
    """' Did you mean …/model?' for the directory of a run, else ''."""
    model = directory / "model"
    return f" Did you mean '{model}'?" if (model / CONFIG).is_file() else ""


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of ``config.yaml``: ``format``, ``model``, ``provenance``, ``files``.

    Raises:
        UserError: missing, damaged, of a later format, or not plain data: aliases, types, interpolation.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"'{directory}' is not a model directory: it has no {CONFIG}.{of_a_run(directory)}")
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int) or "model" not in content:
        lacks = "is not a model's configuration: it lacks 'format' or 'model'."
        raise UserError(f"'{path}' {lacks}{of_a_run(directory)}")
    if not 1 <= content["format"] <= FORMAT:
        raise UserError(f"'{directory}' has format {content['format']}; this nxtp reads up to {FORMAT}: upgrade nxtp.")
    for name in ("model", "provenance", "files"):
        if not isinstance(content.get(name) or {}, dict):
            raise UserError(f"'{path}': {name} must be a mapping.")
    return content


def weights_hash(source: str | Path) -> str:
    """What identifies the weights of a model directory or hub name, whatever its name."""
    directory = locate(source)
    return f"sha256:{(weights_sum(read_config(directory)) or sha256_of(directory / WEIGHTS))[:16]}"


def weights_sum(content: Mapping[str, Any]) -> str | None:
    """The SHA-256 of the weights, in the contents of ``config.yaml``."""
    return ((content.get("files") or {}).get(WEIGHTS) or {}).get("sha256")


def check_sizes(directory: Path, files: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: a file is missing, is no regular file, or has another size than in ``config.yaml``.
    """
    for name in FILES:
        path = directory / name
        if not path.is_file():
            raise UserError(f"'{directory}' lacks {name}: copy or export the model again.")
        known = files.get(name)
        if known is not None and (not isinstance(known, dict) or known.get("bytes") != path.stat().st_size):
            raise _altered(path)


def verify(directory: Path, files: Mapping[str, Any]) -> None:
    """Compare the directory's files with the sizes and SHA-256 sums of ``config.yaml``.

    Raises:
        UserError: a file is missing or differs.
    """
    check_sizes(directory, files)
    for name in files.keys() & set(FILES):
        if sha256_of(directory / name) != files[name].get("sha256"):
            raise _altered(directory / name)


def _altered(path: Path) -> UserError:
    differs = "is not the file that was saved (size or SHA-256 differ)"
    return UserError(f"'{path}' {differs}: copy or export the model again.")


def read_tokenizer(directory: Path, prompt: str) -> LabelTokenizer:
    """The tokenizer, from its two files alone.

    Raises:
        UserError: they are too large, name other files or code, or take exponential time or memory.
    """
    from nxtp.model.tokenizer import LabelTokenizer

    content, settings = (read_json(directory / name) for name in FILES[1:])
    if foreign := [key for key in settings if key.endswith("_file") or key == "auto_map"]:
        raise UserError(f"'{directory / FILES[2]}' names other files: {some_of(foreign)}.")
    added = content.get("added_tokens")
    if isinstance(added, list) and len(added) > _MAX_ADDED:
        raise UserError(f"'{directory / FILES[1]}' adds {len(added):,} tokens, at most {_MAX_ADDED:,} are read.")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = [value for value in values(content.get(part)) if isinstance(value, dict)]
        if any(_EXPONENTIAL.search(str(step["Regex"])) for step in steps if "Regex" in step):
            raise UserError(f"'{directory / FILES[1]}': a pattern of its {part} repeats what repeats.")
        inserted = (step.get(key) for step in steps for key in ("content", "prepend") if step.get("type") != "Split")
        if sum(len(text) for text in inserted if isinstance(text, str)) > _MAX_INSERTED:
            raise UserError(f"'{directory / FILES[1]}': its {part} inserts more than {_MAX_INSERTED} characters.")
    with tempfile.TemporaryDirectory() as alone:  # transformers would read further files beside them
        for name in FILES[1:]:
            Path(alone, name).symlink_to((directory / name).resolve())
        try:
            return LabelTokenizer.load(alone, prompt)
        except UserError as error:
            raise UserError(str(error).replace(alone, str(directory))) from error
