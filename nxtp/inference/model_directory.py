"""The format of a model directory: ``model.safetensors``, ``config.yaml`` and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import nxtp
from nxtp.data.shards.manifest import sha256_of
from nxtp.errors import UserError, some_of
from nxtp.model.hub import is_path, reason
from nxtp.runs.atomic import atomic_directory

if TYPE_CHECKING:
    from nxtp.model.model import ModelConfig
    from nxtp.model.tokenizer import LabelTokenizer

FORMAT = 1
CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "tokenizer.json", "tokenizer_config.json")  # those with a fingerprint in CONFIG


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
    """
    with atomic_directory(directory) as new:
        write_weights(new / WEIGHTS)
        tokenizer.save(new)
        content = {
            "format": FORMAT,
            "nxtp": nxtp.__version__,
            "model": asdict(config),
            "provenance": provenance,
            "files": {name: _fingerprint(new / name) for name in FILES},
        }
        (new / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


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

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, *FILES]))
    except Exception as error:
        raise UserError(f"No directory '{source}', and the hub has no such model: {reason(error)}.") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of ``config.yaml``: ``format``, ``model``, ``provenance``, ``files``.

    Raises:
        UserError: missing, damaged, or of a later format.
    """
    path = directory / CONFIG
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"'{directory}' is not a model directory: it has no {CONFIG}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is damaged: {reason(error)}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int) or "model" not in content:
        raise UserError(f"'{path}' is not a model's configuration: it lacks 'format' or 'model'.")
    if content["format"] > FORMAT:
        raise UserError(f"'{directory}' has format {content['format']}; this nxtp reads up to {FORMAT}: upgrade nxtp.")
    return content


def verify(directory: Path, files: Mapping[str, Any]) -> None:
    """Compare the directory's files with the sizes and SHA-256 sums of ``config.yaml``.

    Raises:
        UserError: a file is missing or differs.
    """
    for name in FILES:
        path = directory / name
        if not path.is_file():
            raise UserError(f"'{directory}' lacks {name}: copy or export the model again.")
        if name in files and _fingerprint(path) != files[name]:
            differs = "is not the file that was saved (size or SHA-256 differ)"
            raise UserError(f"'{path}' {differs}: copy or export the model again.")


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def mismatch(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """How the tensors ``found`` (name → shape) differ from those ``expected``; '' if they do not."""
    shapes = [
        f"{name}: {_times(found[name])}, expected {_times(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    kinds = {"missing": missing, "surplus": surplus, "of another shape": shapes}
    return "; ".join(f"{len(names)} {kind} ({some_of(names)})" for kind, names in kinds.items() if names)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
