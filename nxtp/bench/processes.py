"""Two implementations in two fresh processes, measured in turn, and their results compared."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from nxtp.bench.models import Worker
from nxtp.errors import UserError
from nxtp.model.flops import peak_memory_bytes
from nxtp.model.hub import reason

TOLERANCE = 1e-4  # of the results, relative
WAYS = ("ours", "published")
START_METHOD = "spawn"
_worker: Worker  # in a child process


def _build(worker: type[Worker], threads: int, arguments: dict[str, Any]) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = worker(**arguments)


def _call(method: str, keywords: dict[str, Any]) -> tuple[Any, int]:
    """What the worker's method returns, and the peak memory in bytes of this call (GPU) or of the process (CPU)."""
    if _worker.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(_worker.device)
    return getattr(_worker, method)(**keywords), peak_memory_bytes(_worker.device)


class Child:
    """One implementation in a process of its own, which builds the worker once.

    ``baseline``  bytes in use (:func:`nxtp.model.flops.peak_memory_bytes`) before any step
    ``peak``      bytes of the last call on a GPU, of the whole process on a CPU
    """

    def __init__(self, worker: type[Worker], way: str, **arguments: Any):
        self.way = way
        threads = torch.get_num_threads()
        context = multiprocessing.get_context(START_METHOD)
        self.pool = ProcessPoolExecutor(1, context, _build, (worker, threads, {"way": way} | arguments))
        self._first = self._submit("num_parameters")
        self.parameters = self.baseline = self.peak = 0

    def _submit(self, method: str, **keywords: Any) -> Future:
        return self.pool.submit(_call, method, keywords)

    def _result(self, future: Future) -> Any:
        try:
            result, self.peak = future.result()
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
            what = f"The process that measures '{self.way}' ended, perhaps out of memory"
            raise UserError(f"{what}: {reason(error)}.") from None
        return result

    def wait_until_ready(self) -> None:
        self.parameters = self._result(self._first)
        self.baseline = self.peak

    def call(self, method: str, **keywords: Any) -> Any:
        """Call a method of the worker."""
        return self._result(self._submit(method, **keywords))


@contextmanager
def children(worker: type[Worker], **arguments: Any) -> Iterator[tuple[Child, Child]]:
    """Our and the published implementation, both ready."""
    with ExitStack() as stack:
        ours, published = (Child(worker, way, **arguments) for way in WAYS)
        for child in (ours, published):
            stack.callback(child.pool.shutdown, cancel_futures=True)
        for child in (ours, published):
            child.wait_until_ready()
        yield ours, published


def assert_equal(ours: dict[str, np.ndarray], published: dict[str, np.ndarray], case: str) -> float:
    """The largest relative difference.

    Raises:
        UserError: it is above ``TOLERANCE``, or ``tokens`` differ at all.
    """
    worst = 0.0
    for name, expected in published.items():
        same_shape = ours[name].shape == expected.shape
        scale = float(np.abs(expected).max()) or 1.0
        error = float(np.abs(ours[name] - expected).max()) / scale if same_shape else float("inf")
        if name == "tokens" and error:
            raise UserError(f"{case}: our implementation and the published one predict other tokens.")
        if not error <= TOLERANCE:
            raise UserError(f"{case}: {name} differs by {error:.1e} relative, more than {TOLERANCE:g}.")
        worst = max(worst, error)
    return worst
