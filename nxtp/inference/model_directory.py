"""The format of a model directory: ``model.safetensors``, ``config.yaml`` and the tokenizer's files.

A directory may be a stranger's. It is data: its text files are small, flat and plain, name no other source and are not
interpolated; whatever else is wrong with it is one line (:func:`explained`).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import nxtp
from nxtp.data.shards.manifest import sha256_of
from nxtp.errors import UserError, printable, some_of
from nxtp.model.hub import is_path, reason
from nxtp.runs.atomic import atomic_directory

if TYPE_CHECKING:
    from nxtp.model.model import ModelConfig
    from nxtp.model.tokenizer import LabelTokenizer

FORMAT = 1
CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "tokenizer.json", "tokenizer_config.json")  # those with a fingerprint in CONFIG
_MAX_BYTES = {CONFIG: 1 << 16, "tokenizer.json": 1 << 25, "tokenizer_config.json": 1 << 20}  # Llama 3's: 17 MB, 55 kB
_MAX_DEPTH = 20
_MAX_TEXT = 4096  # characters of a value in CONFIG
_MAX_PARTS = 3_000_000  # strings, lists and objects of a tokenizer; Llama 3's has a million
_MAX_INSERTED = 16  # characters that all replacements of a normalizer insert: they multiply
# A repeated group that repeats or chooses inside: time exponential in the text, as (a+)+ or (a|aa)*.
_EXPONENTIAL = re.compile(r"((?<!\()[|+*?]|\{\d*,\d*\})[^(]*\)([+*]|\{\d)")
_PLAIN_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")


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


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Raise whatever a library says of the directory's contents as a UserError of one line."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        known = isinstance(error, UserError)
        text = printable(str(error) if known else f"'{directory}' cannot be loaded: {reason(error)}.")
        raise UserError(text if len(text) < 500 else f"{text[:500]} …") from error


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of ``config.yaml``: ``format``, ``model``, ``provenance``, ``files``.

    Raises:
        UserError: missing, damaged, of a later format, or not plain data: aliases, types, interpolation.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"'{directory}' is not a model directory: it has no {CONFIG}.")
    with explained(directory):
        try:
            content = yaml.load(_text(path), _PlainYaml)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"'{path}' is damaged: {reason(error)}.") from error
        if not isinstance(content, dict) or not isinstance(content.get("format"), int) or "model" not in content:
            raise UserError(f"'{path}' is not a model's configuration: it lacks 'format' or 'model'.")
        if not 1 <= content["format"] <= FORMAT:
            format = content["format"]
            raise UserError(f"'{directory}' has format {format}; this nxtp reads up to {FORMAT}: upgrade nxtp.")
        for name in ("model", "provenance", "files"):
            if not isinstance(content.get(name) or {}, dict):
                raise UserError(f"'{path}': {name} must be a mapping.")
        for value in _values(content):
            if isinstance(value, str) and ("${" in value or len(value) > _MAX_TEXT):
                raise UserError(f"'{path}': '{value[:40]}' is longer than {_MAX_TEXT:,} characters or contains '${{'.")
            if isinstance(value, int | float) and not abs(value) < 1 << 63:
                raise UserError(f"'{path}' contains a number that is not finite or above 2⁶³.")
    return content


class _PlainYaml(yaml.SafeLoader):
    """YAML as JSON has it: no aliases, no other types, no key twice, not deep."""

    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN_TYPES
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or self.depth >= _MAX_DEPTH:
            raise yaml.YAMLError(f"it has aliases, or more than {_MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
        return super().construct_mapping(node, deep)


def _values(node: Any) -> Iterator[Any]:
    """A nested structure's keys and values."""
    if isinstance(node, dict):
        yield node
        for key, value in node.items():
            yield key
            yield from _values(value)
    elif isinstance(node, list):
        for value in node:
            yield from _values(value)
    else:
        yield node


def _text(path: Path) -> str:
    """A text file's content.

    Raises:
        UserError: it is larger than a file of its name can be.
    """
    size, most = path.stat().st_size, _MAX_BYTES[path.name]
    if size > most:
        raise UserError(f"'{path}' has {size:,} bytes, at most {most:,} are read.")
    with path.open("rb") as file:
        return file.read(size).decode()


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


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def read_tokenizer(directory: Path, prompt: str) -> LabelTokenizer:
    """The tokenizer, from its two files alone.

    Raises:
        UserError: they are too large, name other files or code, or take exponential time or memory.
    """
    from nxtp.model.tokenizer import LabelTokenizer

    content, settings = (_json(directory / name) for name in FILES[1:])
    if foreign := [key for key in settings if key.endswith("_file") or key == "auto_map"]:
        raise UserError(f"'{directory / FILES[2]}' names other files: {some_of(foreign)}.")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = [value for value in _values(content.get(part)) if isinstance(value, dict)]
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


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        if sum(map(text.count, '"[{')) > _MAX_PARTS:
            raise ValueError("it has too many parts")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged: {reason(error)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' must contain an object.")
    return content


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
