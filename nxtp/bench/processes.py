"""Two ways in two fresh processes, asked for one measurement each in turn, and their results compared."""

from __future__ import annotations

import multiprocessing
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from nxtp.errors import UserError
from nxtp.model.flops import peak_memory_bytes
from nxtp.runs.record import cpu_name

TOLERANCE = 1e-4  # of the results, relative
WAYS = ("ours", "published")


def _forget_peak(device: torch.device) -> None:
    """Only a GPU can: a process's largest resident set stays what it was."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _serve(connection: Connection, worker: type, arguments: dict[str, Any], threads: int) -> None:
    """A child's life: build the worker, then answer (method, arguments) until the parent hangs up."""
    torch.set_num_threads(threads)
    instance = worker(**arguments)
    device = instance.device
    _forget_peak(device)
    baseline = peak_memory_bytes(device)
    parameters = sum(parameter.numel() for parameter in instance.model.parameters())
    connection.send((parameters, baseline))
    with suppress(EOFError):
        while True:
            method, keywords = connection.recv()
            _forget_peak(device)
            connection.send((getattr(instance, method)(**keywords), peak_memory_bytes(device)))


class Child:
    """One way in its own process.

    ``peak`` and ``baseline`` are bytes (:func:`nxtp.model.flops.peak_memory_bytes`), the latter before any step; on a GPU
    ``peak`` is that of the last request.
    """

    def __init__(self, context, worker: type, threads: int, **arguments: Any):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, worker, arguments, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.way = arguments["way"]
        self.parameters = self.baseline = self.peak = 0

    def wait_until_ready(self) -> None:
        self.parameters, self.baseline = self._receive()
        self.peak = self.baseline

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise UserError(f"The process measuring '{self.way}' ended with code {code}; is memory short?") from None

    def ask(self, method: str, **keywords: Any) -> Any:
        self.connection.send((method, keywords))
        answer, self.peak = self._receive()
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=1)
        self.process.kill()


@contextmanager
def children(worker: type, **arguments: Any) -> Iterator[tuple[Child, Child]]:
    context = multiprocessing.get_context("spawn")
    opened: list[Child] = []
    try:
        for way in WAYS:
            opened.append(Child(context, worker, torch.get_num_threads(), way=way, **arguments))
        for child in opened:
            child.wait_until_ready()
        yield opened[0], opened[1]
    finally:
        for child in opened:
            child.close()


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], case: str) -> float:
    """The largest relative difference.

    Raises:
        UserError: more than ``TOLERANCE``.
    """
    worst = 0.0
    for name, expected in theirs.items():
        same_shape = ours[name].shape == expected.shape
        scale = float(np.abs(expected).max()) or 1.0
        error = float(np.abs(ours[name] - expected).max()) / scale if same_shape else float("inf")
        if name == "tokens" and error:
            raise UserError(f"{case}: ours and the published way give other tokens.")
        if not error <= TOLERANCE:
            raise UserError(f"{case}: {name} differs by {error:.1e} relative, more than {TOLERANCE:g}.")
        worst = max(worst, error)
    return worst


def choose_device(name: str) -> str:
    """``auto`` → cuda where there is one, else cpu.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here. Say cpu, or auto.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def machine_description(device: str = "cpu") -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return gpu | {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """For a table's caption."""
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{device}, torch {machine['torch']}, {machine['date']}"
