"""Ranks that share out the images of one command. Each has the whole model; they send each other results only."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from nxtp.config import instantiated
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError, one_line

if TYPE_CHECKING:
    from lightning import Fabric

T = TypeVar("T")
START_S = 300.0  # seconds that ranks wait for each other at the start


def torchrun_ranks(device: str) -> dict[str, Any] | None:
    """The ranks that torchrun has started, as :func:`fabric_of` takes them; None if this process is alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return {"accelerator": device, "devices": on_node, "num_nodes": world // on_node} if world > 1 else None


def fabric_of(ranks: Mapping[str, Any], where: str, patience: timedelta) -> Fabric:
    """
    Args:
        ranks: ``accelerator``, ``devices`` and ``num_nodes``, as of a trainer.
        where: the setting that they come from, for messages.
        patience: how long one rank waits for another.

    Raises:
        UserError: this machine has no such devices.
    """
    from lightning.fabric.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", timeout=patience)  # it notices at once that a rank has gone
    return instantiated({"_target_": "lightning.Fabric", **ranks}, where, strategy=strategy)


@contextmanager
def together(
    fabric: Fabric | None, open_data: Callable[[Ranks], tuple[T, dict[str, Any]]]
) -> Iterator[tuple[T, tuple[int, int]]]:
    """The opened data and (rank, number of ranks) in the block, (0, 1) without fabric.

    Ranks that no launcher has started are started here, after the first one has opened the data.

    Args:
        open_data: opens what the ranks share out, which the first one lists; returns it and what all ranks must have in
            common: nested dictionaries of plain values.

    Raises:
        UserError: a rank does not come, has opened something else, or there are more or fewer than specified.
    """
    if fabric is None:
        yield open_data(Ranks())[0], (0, 1)
        return
    from nxtp.distributed.start import StartTogether

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # what it would report of each rank
    strategy: Any = fabric.strategy
    start = StartTogether(strategy, START_S)
    ranks = start.ranks()  # their store is needed until all have opened the data
    data, start.opened = open_data(ranks)
    try:
        with start.waiting():
            fabric.launch()
            start.meet(fabric.world_size)
    except ValueError as error:  # Lightning's, of a launcher that has started another number
        raise UserError(f"trainer: {one_line(error)}") from error
    started = strategy.launcher.procs[:]
    strategy.launcher.procs.clear()  # of a rank in this list that dies, Lightning would kill this process
    try:
        yield data, (fabric.global_rank, fabric.world_size)
    finally:
        dist.destroy_process_group()
        for process in started:  # they die with this process: each may report its own error
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)


def shared(parts: Iterable[T]) -> Iterator[T]:
    """Yield on every rank the parts of all ranks: the first of each, then the second of each, …; None is no part.

    Raises:
        UserError: on the first rank, if another one has failed or died; the others end with code 1.
    """
    if not dist.is_initialized():
        yield from parts
        return
    own = iter(parts)
    while True:
        part, failure = None, None
        try:
            part = next(own, None)
        except Exception as error:
            failure = error
        text = failure and (str(failure) if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}")
        every = gathered((part, text))
        reasons = [f"Rank {rank}: {reason}" for rank, (_, reason) in enumerate(every) if reason]
        if failure is not None and (dist.get_rank() == 0 or not isinstance(failure, UserError)):
            raise failure
        if reasons:
            leave(reasons[0])
        found = [each for each, _ in every if each is not None]
        if not found:
            return
        yield from found


def gathered(value: Any) -> list[Any]:
    """``value`` of every rank, in their order. Raises as :func:`shared`."""
    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(every, value)
    except RuntimeError as error:
        leave(f"Another rank has ended, or does not answer ({one_line(error)[:100]}).")
    return every


def leave(reason: str) -> None:
    """End this rank: the first reports why."""
    if dist.get_rank():
        sys.exit(1)
    raise UserError(reason)
