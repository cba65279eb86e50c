"""WebDataset tar shards: writing them with a manifest, and finding them by directory, glob or brace expression.

A sample is `KEY.jpg|jpeg|png|webp` with `KEY.txt` (caption) and/or `KEY.json` (`labels`, `caption`), adjacent in
an uncompressed tar. Names are split into key and extension as WebDataset does. `tar_index.py` and `shard_set.py`
read them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from nxtp.errors import UserError
from nxtp.wording import some_of

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

_SAME_FOR_ALL = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
_SKIPPED_NAME = re.compile(r"__[^/]*__($|/)")  # what WebDataset takes for metadata
_LOCAL_SCHEME = re.compile(r"^file:(//)?")


@dataclass(frozen=True)
class ShardInfo:
    """One line of a manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_shard(path: Path | str, samples: Iterable[Mapping[str, Any]]) -> ShardInfo:
    """Write a shard; the same samples give the same bytes, and ``path`` appears only when it is complete.

    A sample is ``{"__key__": "000001", "jpg": bytes, "txt": str, "json": dict}``, with one image under one of
    :data:`IMAGE_EXTENSIONS`; texts are written as UTF-8, dicts as JSON with sorted keys.

    Raises:
        ValueError: a key that comes twice or that WebDataset would split elsewhere; no image; a wrong value.
    """
    path = Path(path)
    keys: set[str] = set()
    with replacing(path) as file, TarWriter(file, encoder=False, compress=False, **_SAME_FOR_ALL) as tar:
        for sample in samples:
            key = sample["__key__"]
            if key in keys:
                raise ValueError(f"{path.name}: key {key!r} comes twice")
            keys.add(key)
            tar.write({"__key__": key} | _encode_sample(key, sample))
    return ShardInfo(path.name, len(keys), path.stat().st_size, sha256_of(path))


def sha256_of(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode_sample(key: str, sample: Mapping[str, Any]) -> dict[str, bytes]:
    """Extension → bytes, without the key."""
    members = {}
    for extension, value in sample.items():
        if extension == "__key__":
            continue
        name = f"{key}.{extension}"
        if base_plus_ext(name) != (key, extension) or extension != extension.lower() or _SKIPPED_NAME.match(name):
            raise ValueError(f"{name!r} would not be read back as sample {key!r}, member {extension!r}")
        if extension == "json":
            value = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        members[extension] = value.encode() if isinstance(value, str) else value
        if not isinstance(members[extension], bytes):
            raise ValueError(f"{name!r} must be bytes, not {type(value).__name__}")
    if sum(extension in members for extension in IMAGE_EXTENSIONS) != 1:
        raise ValueError(f"sample {key!r} must have one image ({', '.join(IMAGE_EXTENSIONS)}): {sorted(members)}")
    return members


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A hidden file beside ``path`` that takes its place, synced, when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_manifest(
    directory: Path | str,
    shards: Iterable[ShardInfo],
    *,
    made_by: Mapping[str, Any],
    nouns: Mapping[str, Any] | None = None,
    skipped: Mapping[str, int] | None = None,
) -> Path:
    """Write ``manifest.json``: the same arguments, shards in any order, give the same bytes.

    ``made_by`` says how the shards were made (script, options, versions), ``nouns`` the noun backend's name and
    version, ``skipped`` how many source samples were left out, by kind.
    """
    rows = sorted((asdict(shard) for shard in shards), key=lambda row: row["name"])
    manifest = {
        "format": MANIFEST_FORMAT,
        "shards": rows,
        "samples": sum(row["samples"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "made_by": dict(made_by),
        "nouns": dict(nouns or {}),
        "skipped": dict(skipped or {}),
    }
    path = Path(directory) / MANIFEST
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())
    return path


def read_manifest(directory: Path | str) -> dict[str, Any] | None:
    """The manifest of a directory of shards, None where there is none.

    Raises:
        UserError: it cannot be read, is not a manifest, is of a later format, or its totals do not add up.
    """
    path = Path(directory) / MANIFEST
    advice = "Make the shards again, or delete the file."
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). {advice}") from error
    if isinstance(manifest, dict) and isinstance(manifest.get("format"), int) and manifest["format"] > MANIFEST_FORMAT:
        raise UserError(f"{path} has format {manifest['format']}; this version reads up to {MANIFEST_FORMAT}.")
    try:
        shards = [ShardInfo(**row) for row in manifest["shards"]]
        sound = (
            manifest["format"] == MANIFEST_FORMAT
            and all(isinstance(shard.name, str) and isinstance(shard.sha256, str) for shard in shards)
            and manifest["samples"] == sum(shard.samples for shard in shards)
            and manifest["bytes"] == sum(shard.bytes for shard in shards)
            and all(isinstance(manifest[name], dict) for name in ("made_by", "nouns", "skipped"))
        )
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not a manifest of shards, or its totals do not add up. {advice}")
    return manifest


def manifest_hash(directory: Path | str) -> str | None:
    """SHA-256 of the manifest file, for run records; None where there is none."""
    path = Path(directory) / MANIFEST
    return sha256_of(path) if path.is_file() else None


def expand_shards(spec: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Sorted, distinct paths and URLs of shards.

    ``spec`` is a directory (its ``*.tar``, not those of its subdirectories), a file, a glob, a URL or ``pipe:``
    command, each with WebDataset's brace expressions (``cc3m-{000..331}.tar``), or a list of these.

    Raises:
        UserError: nothing was found, or a file that was named does not exist.
    """
    parts = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    if not parts:
        raise UserError("No shards: the list of shards is empty.")
    found = {url for part in parts for url in _expand_one(os.fspath(part))}
    return sorted({identity(url): url for url in sorted(found)}.values())


def _expand_one(spec: str) -> list[str]:
    path = os.path.expanduser(_LOCAL_SCHEME.sub("", spec))
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if not found:
            raise UserError(f"No shards: the directory {spec} holds no *.tar file.{sets_below(path)}")
        return found
    if os.path.exists(path):
        return [path]
    try:
        expanded = expand_urls(spec)
    except Exception as error:  # braceexpand has a class of its own for this
        raise UserError(f"No shards: '{spec}' is not a brace expression ({error}).") from error
    if len(expanded) > 1:
        return [url for one in expanded for url in _expand_one(one)]
    if is_remote(spec):
        return expanded
    path = os.path.expanduser(_LOCAL_SCHEME.sub("", expanded[0]))
    found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.exists(path)
    if not found:
        raise UserError(
            f"No shards: nothing found at '{spec}'. Give a directory of *.tar files, a glob, a brace expression such "
            "as 'cc3m-{000..331}.tar', or a list of these; make shards with the scripts in data/."
        )
    return found


def sets_below(directory: Path | str) -> str:
    """' Shards are in …: name one of these.' where subdirectories hold some, else ''."""
    below = sorted({path.parent.name for path in Path(directory).glob("*/*.tar")})
    return f" Shards are in its {some_of(below)}: name one of these." if below else ""


def identity(url: str) -> str:
    """What tells one shard from another: of two spellings or links of one file the same."""
    return url if is_remote(url) else os.path.realpath(_LOCAL_SCHEME.sub("", url))


def is_remote(url: str) -> bool:
    """Whether ``url`` is fetched by one of WebDataset's openers instead of being read in place."""
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))
