"""Tests keep indexes of shards to themselves; files with costly fixtures start first; commands are forked."""

import os
import tempfile

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the default trainer would use a GPU
_cache = tempfile.TemporaryDirectory(prefix="nxtp-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_collection_finish(session):
    """Forked now, the fork server has all libraries imported, and no thread or state of a test."""
    if session.items and not session.config.option.collectonly:
        from helpers import start_fork_server

        start_fork_server()


def pytest_collection_modifyitems(items):
    """A file runs in one process (--dist loadfile): a long one, started last, would leave the other without work."""
    items.sort(key=lambda item: item.get_closest_marker("costly") is None)
