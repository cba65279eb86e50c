"""Indexes of shards, kept on disk: a set is read header by header once, not at every start of every process."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nxtp.data.shards.tar_index import ShardIndex
from nxtp.runs.atomic import atomic_file

FORMAT = "3"


def default_directory() -> Path:
    """``$XDG_CACHE_HOME/nxtp/index``, usually ~/.cache/nxtp/index."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nxtp" / "index"


class IndexStore:
    """One small file a shard, named by where the shard lies and valid while the shard's size and time are the same."""

    def __init__(self, directory: Path | str | None = None):
        self.directory = Path(directory) if directory is not None else default_directory()

    def head(self, name: str, stamp: tuple[int, int] | None) -> tuple[int, Counter, int] | None:
        """(samples, skipped, bytes of the shard) without reading the index itself; None if it is not kept or is old."""
        with suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(self._file(name), "np") as file:
            about = file.metadata()
            size, time = json.loads(about["stamp"])
            if about["format"] == FORMAT and about["name"] == name and stamp in (None, (size, time)):
                return int(about["samples"]), Counter(json.loads(about["skipped"])), size
        return None

    def load(self, name: str, path: str, stamp: tuple[int, int] | None) -> ShardIndex | None:
        """The kept index, for the shard's file at ``path``."""
        head = self.head(name, stamp)
        if head is None:
            return None
        with suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(self._file(name), "np") as file:
            ends, text = file.get_tensor("key_ends"), file.get_tensor("keys").tobytes()
            begins = [0, *ends[:-1].tolist()]
            keys = [text[a:b].decode("utf-8", "surrogatepass") for a, b in zip(begins, ends.tolist(), strict=True)]
            kept = tuple(json.loads(file.metadata()["stamp"]))
            return ShardIndex.of_rows(path, keys, file.get_tensor("rows"), kept, head[1])
        return None

    def save(self, name: str, index: ShardIndex) -> bool:
        """Keep an index; False where nothing can be written, which is no error."""
        if index.stamp is None:
            return False
        keys = [key.encode("utf-8", "surrogatepass") for key in index.keys.tolist()]
        tensors = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
            "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
            "rows": index.rows(),
        }
        about = {"format": FORMAT, "name": name, "samples": str(len(index)), "stamp": json.dumps(index.stamp)}
        try:
            with atomic_file(self._file(name)) as file:
                file.write(save(tensors, metadata=about | {"skipped": json.dumps(index.skipped)}))
        except OSError:
            return False
        return True

    def forget(self, name: str) -> None:
        """Do not keep this index any longer."""
        with suppress(OSError):
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.directory / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
