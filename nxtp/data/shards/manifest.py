"""manifest.json beside the shards of a set: samples, bytes and SHA-256 of each, and how they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nxtp.errors import UserError
from nxtp.runs.atomic import atomic_file

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class ShardInfo:
    """One line of a manifest; ``sha256`` is '' of a remote shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def sha256_of(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path | str, shards: Iterable[ShardInfo], **about: Any) -> Path:
    """Write ``manifest.json``, atomically; raises OSError. Arguments as of :func:`manifest_text`."""
    path = Path(directory) / MANIFEST
    with atomic_file(path) as file:
        file.write(manifest_text(shards, **about))
    return path


def manifest_text(
    shards: Iterable[ShardInfo],
    *,
    made_by: Mapping[str, Any],
    nouns: Mapping[str, Any] | None = None,
    skipped: Mapping[str, int] | None = None,
) -> bytes:
    """The content of ``manifest.json``: the same arguments, shards in any order, give the same bytes.

    Args:
        made_by: how the shards were made: script, options, versions.
        nouns: name and version of the noun backend.
        skipped: how many source samples were skipped, by kind.
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
    return f"{json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)}\n".encode()


def read_manifest(directory: Path | str) -> dict[str, Any] | None:
    """The manifest of a directory of shards; None if it has none.

    Raises:
        UserError: it cannot be read, is not a manifest, has a later format, or its totals do not add up.
    """
    path = Path(directory) / MANIFEST
    advice = "Prepare the shards again, or delete the file."
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
            and all(isinstance(text, str) for shard in shards for text in (shard.name, shard.sha256))
            and all(manifest[what] == sum(getattr(shard, what) for shard in shards) for what in ("samples", "bytes"))
            and all(isinstance(manifest[name], dict) for name in ("made_by", "nouns", "skipped"))
        )
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not a manifest of shards, or its totals do not add up. {advice}")
    return manifest


def manifest_hash(directory: Path | str) -> str | None:
    """SHA-256 of the manifest file, for run records; None if there is none."""
    path = Path(directory) / MANIFEST
    return sha256_of(path) if path.is_file() else None
