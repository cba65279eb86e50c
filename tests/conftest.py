"""Tests keep indexes of shards to themselves; files with costly fixtures start first."""

import os
import tempfile

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the default trainer would use a GPU
_cache = tempfile.TemporaryDirectory(prefix="nxtp-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_collection_modifyitems(items):
    """A file runs in one process (--dist loadfile): a long one, started last, would leave the other without work."""
    items.sort(key=lambda item: item.get_closest_marker("costly") is None)
