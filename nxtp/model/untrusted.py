"""Untrusted text files, read as data: small, flat and plain; nothing in them is run, interpolated or looked up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nxtp.errors import UserError, printable
from nxtp.model.hub import reason

_MAX_BYTES = {"config.yaml": 1 << 16, "tokenizer.json": 1 << 26, "tokenizer_config.json": 1 << 20}
_MAX_BYTES |= {"calibration.json": 1 << 18}
_MAX_DEPTH = 20  # of YAML
_MAX_TEXT = 1 << 14  # characters of a value in YAML
_MAX_PARTS = 5_000_000  # strings, lists and objects of a JSON file; Gemma 3's tokenizer (33 MB) has about 3.3 million
_PLAIN_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")


@contextmanager
def in_one_line(directory: Path) -> Iterator[None]:
    """Turn every error that a library raises about the directory's contents into a UserError of one line."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        known = isinstance(error, UserError)
        text = printable(str(error) if known else f"'{directory}' cannot be loaded: {reason(error)}.")
        raise UserError(text if len(text) < 500 else f"{text[:500]} …") from error


def read_yaml(path: Path) -> Any:
    """YAML as JSON has it: no aliases, no other types, no key twice; numbers are finite, and no text has ``${``.

    Raises:
        UserError: it is something else, too large, or cannot be read.
    """
    with in_one_line(path.parent):
        try:
            text = _text(path)
            _refuse_tangled(text)
            content = yaml.load(text, _PlainYaml)
        except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise UserError(f"'{path}' is damaged: {reason(error)}.") from error
        for value in values(content):
            if isinstance(value, str) and ("${" in value or len(value) > _MAX_TEXT):
                raise UserError(f"'{path}': '{value[:40]}' is longer than {_MAX_TEXT:,} characters or contains '${{'.")
            if isinstance(value, int | float) and not abs(value) < 1 << 63:
                raise UserError(f"'{path}' contains a number that is not finite or above 2⁶³.")
        return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: it is something else, too large, or cannot be read.
    """
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


def values(node: Any) -> Iterator[Any]:
    """A nested structure's mappings, keys and values."""
    if isinstance(node, dict):
        yield node
        for key, value in node.items():
            yield key
            yield from values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    else:
        yield node


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"'{path}' is not a regular file.")
    size, most = path.stat().st_size, _MAX_BYTES[path.name]
    if size > most:
        raise UserError(f"'{path}' has {size:,} bytes, at most {most:,} are read.")
    with path.open("rb") as file:
        return file.read(size).decode()


def _refuse_tangled(text: str) -> None:
    """
    Raises:
        yaml.YAMLError: the YAML has aliases, or too many levels.
    """
    depth = 0
    for event in yaml.parse(text, _Yaml):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or getattr(event, "anchor", None) is not None:  # an alias has its anchor's name
            raise yaml.YAMLError(f"it has aliases, or more than {_MAX_DEPTH} levels")


_Yaml: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of libyaml: ten times as fast


class _PlainYaml(_Yaml):
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN_TYPES
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.YAMLError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
        return super().construct_mapping(node, deep)
