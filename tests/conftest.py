"""Tests keep indexes of shards to themselves; the long groups of tests start first."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="nxtp-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_collection_modifyitems(items):
    """A group runs in one process: started last, it would leave the other process without work."""
    size: dict[str, int] = {}
    for item in items:
        for mark in item.iter_markers("xdist_group"):
            size[mark.args[0]] = size.get(mark.args[0], 0) + 1
    items.sort(key=lambda item: -max((size[mark.args[0]] for mark in item.iter_markers("xdist_group")), default=0))
