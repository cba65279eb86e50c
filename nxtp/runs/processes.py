"""Processes that belong together: the signals that stop a run, its loader workers, and what ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)  # they ask a run to save and stop
PARENT = "NXTP_PARENT"  # the process that has started this one, if it is one of nxtp
_PR_SET_PDEATHSIG = 1
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_rank() -> bool:
    """Whether this process is a run's first, or its only one, before the ranks have met."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def follow_parent() -> None:
    """If another process of nxtp has started this one: a rank dies with it, a run of a sweep saves and stops then."""
    parent, os.environ[PARENT] = os.environ.get(PARENT), str(os.getpid())
    if parent in (None, str(os.getpid())):
        return
    _signal_when_parent_dies(signal.SIGKILL if "LOCAL_RANK" in os.environ else signal.SIGTERM)
    if os.getppid() != int(parent):  # perhaps it died before; or there is a process in between
        try:
            os.kill(int(parent), 0)
        except ProcessLookupError:
            sys.exit(128 + signal.SIGKILL)
        except PermissionError:
            pass


def _signal_when_parent_dies(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are forked in this block ignore :data:`SIGNALS`, which a terminal or scheduler sends to all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a child of :func:`deaf_children`: end when the parent dies or sends SIGTERM, as PyTorch does to end it."""

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _signal_when_parent_dies(signal.SIGKILL)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=wait, daemon=True).start()
    else:  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
