"""Processes that belong together: who hears a signal, and what ends with its parent."""

import os
import signal
import time

import psutil
import pytest

from nxtp.runs.processes import PARENT, SIGNALS, deaf_children, end_with_parent, follow_parent


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def forked(function) -> int:
    """The process id of a fork that calls ``function`` and then waits; it has called it."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            function()
            os.write(write, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(read, 1)
    return pid


@pytest.fixture
def worker():
    with deaf_children():
        pid = forked(end_with_parent)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_worker_hears_its_parent_only(worker):
    if (stranger := os.fork()) == 0:
        for number in SIGNALS:
            os.kill(worker, number)
        os._exit(0)
    os.waitpid(stranger, 0)
    assert not gone(worker, 0.2)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(SIGNALS)  # of this process
    os.kill(worker, signal.SIGTERM)
    assert gone(worker, 10)


def grandchild(function) -> tuple[int, int]:
    """A fork, and the fork of that which calls ``function``."""
    read, write = os.pipe()
    parent = forked(lambda: os.write(write, str(forked(function)).encode()))
    return parent, int(os.read(read, 20))


def test_a_worker_ends_with_its_parent():
    parent, worker = grandchild(end_with_parent)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(worker, 2)  # PyTorch's own watch takes five seconds


@pytest.mark.parametrize(("variables", "number"), [({"LOCAL_RANK": "1"}, signal.SIGKILL), ({}, signal.SIGTERM)])
def test_a_rank_and_a_run_of_a_sweep_end_with_their_parent(monkeypatch, variables, number):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def child() -> None:
        os.environ[PARENT] = str(os.getppid())
        if number == signal.SIGKILL:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        follow_parent()
        assert os.environ[PARENT] == str(os.getpid())

    parent, rank = grandchild(child)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(rank, 2)


def test_a_rank_whose_parent_died_before_it_came_so_far_ends(monkeypatch):
    pid = forked(lambda: None)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    monkeypatch.setenv(PARENT, str(pid))
    rank = os.fork()
    if rank == 0:
        try:
            follow_parent()
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == 128 + signal.SIGKILL
