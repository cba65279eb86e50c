"""How ranks start: they wait for each other for a limited time, and go on only if all of them opened the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist

from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError, one_line
from nxtp.runs.resume import differing


class StartTogether(L.Callback):
    """Ends all ranks before the first step if one does not come, or has opened something else.

    Args:
        strategy: of the trainer. Its own time limit holds once the ranks have met.
        timeout: seconds that a rank waits for the others.
        opened: what this rank works on and with: nested dictionaries of plain values.
        setting: the configuration key of ``timeout``, if it has one.
    """

    def __init__(self, strategy: Any, timeout: float, opened: dict[str, Any] | None = None, setting: str | None = None):
        self.strategy, self.timeout, self.opened = strategy, timeout, opened or {}
        self.setting = f" ({setting})" if setting else ""
        self.have_met = False
        if hasattr(strategy, "_timeout"):  # of several ranks
            self._later, strategy._timeout = strategy._timeout, timedelta(seconds=timeout)

    def ranks(self) -> Ranks:
        """The ranks before their process group exists.

        Raises:
            UserError: they do not come.
        """
        with self.waiting():
            return Ranks.of(self.strategy, self.timeout)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """
        Raises:
            UserError: in this block, the ranks have not met in time.
        """
        try:
            yield
        except RuntimeError as error:
            environment = getattr(self.strategy, "cluster_environment", None)
            if self.have_met or environment is None:
                raise
            place = f"{environment.main_address}:{environment.main_port}"
            raise UserError(
                f"Rank {environment.global_rank()} waited {self.timeout:g} s{self.setting} for "
                f"{environment.world_size()} ranks to meet at {place}: {one_line(error)[:200]}"
            ) from error

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.meet(trainer.world_size)

    def meet(self, world_size: int) -> None:
        """Once the ranks have met: their own time limit, and the comparison of what they have opened."""
        if not self.have_met and world_size > 1:
            self.strategy._timeout = self._later
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # older PyTorch
            set_timeout(self._later)
            require_same(self.opened)
        self.have_met = True


def require_same(opened: dict[str, Any]) -> None:
    """
    Raises:
        UserError: on all ranks, if ``opened`` of one differs from the first rank's; with what differs first.
    """
    first = [opened]
    dist.broadcast_object_list(first)
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, difference(first[0], opened))
    for rank, found in enumerate(every):
        if found is not None:
            raise UserError(f"Rank {rank} has opened something else than rank 0: {found}.")


def difference(first: Any, other: Any) -> str | None:
    """The first value in which nested dictionaries differ."""
    for key, one, two in differing(first, other):
        return f"{key}: {'nothing' if two is None else two} instead of {'nothing' if one is None else one}"
    return None
