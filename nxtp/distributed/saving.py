"""Written whole or not at all, while training goes on: what checkpoints of every form are written with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from nxtp.errors import UserError


class Background:
    """One write at a time in a thread of its own; the next one waits for it, and an error of it is raised then."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self.wait()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Until what was submitted is on disk.

        Raises:
            UserError: it could not be written; the checkpoint before it stays.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None


def copied(content: Any) -> Any:
    """The same with tensors of its own on the CPU, which training does not change any more."""

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
        return tensor.to("cpu", copy=True)

    return tree_map_only(Tensor, copy, content)


def read_file(path: Path) -> dict[str, Any]:
    """A checkpoint file's contents on the CPU: tensors and plain values, never code.

    Raises:
        UserError: missing, damaged, or more in it than that.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"No checkpoint '{path}'.") from None
    except Exception as error:  # damaged archives raise many types
        raise UserError(f"'{path}' cannot be read as a checkpoint: {reason_of(error)}.") from error


# A directory cannot take another's place in one step: for a moment the old one stands beside it.


def not_written(path: Path, error: BaseException) -> UserError:
    kept = f" The one before it stays in '{path}'." if path.exists() else ""
    told = f"The checkpoint '{path}' could not be written: {reason_of(error)}."
    return UserError(f"{told}{kept} Make room and start the same command again.")


def reason_of(error: BaseException) -> str:
    """In one line; of what several ranks met, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300].rstrip(".")
