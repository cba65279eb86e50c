"""Tests keep indexes of shards to themselves; files with costly fixtures start first; commands are forked."""

import gc
import os
import tempfile
from unittest import mock

import composing  # noqa: F401
import pytest
import xdist

gc.disable()
gc.set_threshold(20_000, 20, 20)  # of forked commands, which enable it
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the default trainer would use a GPU
_cache = tempfile.TemporaryDirectory(prefix="nxtp-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_sessionstart(session):
    """One of several test processes forks its fork server at once: both then import the libraries once."""
    if xdist.is_xdist_worker(session):
        with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            import preloaded  # noqa: F401
            from helpers import become_fork_server, start_fork_server

            with mock.patch("multiprocessing.util.spawnv_passfds", become_fork_server):
                start_fork_server()


def pytest_collection_finish():
    """Libraries and tests stay until the end: collections of garbage pass them over."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Cycles are collected behind each file; as they come, they take a twentieth of all tests' time."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()


def pytest_collection_modifyitems(items):
    """A file runs in one process (--dist loadfile): a long one, started last, would leave the other without work."""
    items.sort(key=lambda item: item.get_closest_marker("costly") is None)
