"""Writing one WebDataset shard: the same samples give the same bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from nxtp.data.shards.manifest import ShardInfo, sha256_of
from nxtp.data.shards.urls import _SKIPPED_NAME, IMAGE_EXTENSIONS
from nxtp.runs.atomic import atomic_file

log = logging.getLogger("nxtp")


_SAME_FOR_ALL = {"user": "", "group": "", "mode": 0o644, "mtime": 0}


def write_shard(path: Path | str, samples: Iterable[Mapping[str, Any]]) -> ShardInfo:
    """Write a shard; the same samples give the same bytes, and ``path`` appears only when it is complete.

    A sample is ``{"__key__": "000001", "jpg": bytes, "txt": str, "json": dict}``, with one image under one of
    :data:`IMAGE_EXTENSIONS`; texts are written as UTF-8, dicts as JSON with sorted keys.

    Raises:
        ValueError: a key that comes twice or that WebDataset would split elsewhere; no image; a wrong value.
    """
    path = Path(path)
    keys: set[str] = set()
    with atomic_file(path) as file, TarWriter(file, encoder=False, compress=False, **_SAME_FOR_ALL) as tar:
        for sample in samples:
            key = sample["__key__"]
            if key in keys:
                raise ValueError(f"{path.name}: key {key!r} comes twice")
            keys.add(key)
            tar.write({"__key__": key} | _encode_sample(key, sample))
    return ShardInfo(path.name, len(keys), path.stat().st_size, sha256_of(path))


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
