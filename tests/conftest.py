"""Tests keep indexes of shards to themselves; files with costly fixtures start first; processes are forked."""

import gc
import os
import signal
import sys
import tempfile
import traceback
from unittest import mock

import composing  # noqa: F401
import pytest
import xdist
from execnet import gateway_io

gc.disable()  # until all is imported and collected
gc.set_threshold(20_000, 20, 20)  # by default collecting takes a twelfth of all tests' time; forks inherit it
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the default trainer would use a GPU
cache = tempfile.TemporaryDirectory(prefix="nxtp-tests-")
os.environ["XDG_CACHE_HOME"] = cache.name


class TestProcess:
    """One of several test processes: what execnet needs of a Popen, but a fork, which has the libraries imported."""

    waiting: list = []  # noqa: RUF012

    def __init__(self):
        own_stdin, stdin = os.pipe()
        stdout, own_stdout = os.pipe()
        self.ends, self.pid = (stdin, stdout), os.fork()
        if not self.pid:
            for process in [*TestProcess.waiting, self]:
                for end in process.ends:  # a process ends when nobody holds the other end of its pipe
                    os.close(end)
            os.dup2(own_stdin, 0)
            os.dup2(own_stdout, 1)
            self.run()
        os.close(own_stdin)
        os.close(own_stdout)
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")

    def run(self) -> None:
        code = 1
        try:
            with tempfile.TemporaryDirectory(prefix="nxtp-tests-") as os.environ["XDG_CACHE_HOME"]:
                sys.stdin = os.fdopen(0, closefd=False)
                exec(gateway_io.popen_bootstrapline, {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Forked(gateway_io.Popen2IOMaster):
    """Takes one of the processes that wait, where execnet would start a Python."""

    def __init__(self, args, execmodel):
        self.popen = process = TestProcess.waiting.pop(0)
        gateway_io.Popen2IO.__init__(self, process.stdin, process.stdout, execmodel=execmodel)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """All are forked before execnet has threads."""
    if count := len(config.option.tx or ()) if not hasattr(config, "workerinput") else 0:
        import preloaded  # noqa: F401

        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            while len(TestProcess.waiting) < count:
                TestProcess.waiting.append(TestProcess())
        gateway_io.Popen2IOMaster = Forked


def pytest_sessionstart(session):
    """A test process forks the server of the commands that tests start."""
    if xdist.is_xdist_worker(session):
        with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            from helpers import become_fork_server, start_fork_server

            with mock.patch("multiprocessing.util.spawnv_passfds", become_fork_server):
                start_fork_server()


def pytest_collection_finish():
    """Libraries and tests stay until the end: collections of garbage pass them over."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """A file runs in one process (--dist loadfile): a long one, started last, would leave the other without work."""
    items.sort(key=lambda item: item.get_closest_marker("costly") is None)


def pytest_unconfigure():
    """Python's own last collection is of everything, or a library says at exit that its objects leak."""
    gc.unfreeze()
