"""What ranks tell each other before their process group exists: the first one lists and decides, the others follow.

Imports no torch: commands of one process open data too.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from nxtp.errors import UserError, one_line

T = TypeVar("T")
R = TypeVar("R")
_PATIENCE = timedelta(days=2)  # for the first rank, which works; its death is noticed at once
_BEAT = timedelta(seconds=5)  # between the beats of a rank that works
_SILENCE = timedelta(seconds=60)  # of a rank that has died


class Ranks:
    """The ranks of a run before they have met; without arguments, one process. Values are what JSON has.

    Args:
        store: one of torch.distributed that all ranks reach.
        running: on the first rank, whether the others run. Else it starts them later, and works alone until then.
        timeout: how long the first one waits for the others to come.
    """

    def __init__(
        self, store: Any = None, rank: int = 0, world: int = 1, *, running: bool = True, timeout: timedelta = _PATIENCE
    ):
        self.store, self.rank = store, rank
        if store is not None:
            store.set(f"nxtp/here/{rank}", "")
        self.workers: int = self.from_first("ranks", lambda: world if running else 1)
        if rank == 0 and self.workers > 1:
            store.wait([f"nxtp/here/{other}" for other in range(world)], timeout)

    @classmethod
    def of(cls, strategy: Any, timeout: float) -> Ranks:
        """The ranks of a Lightning strategy; their store is later that of their process group.

        Raises:
            RuntimeError: they have not come within ``timeout`` seconds.
        """
        environment = getattr(strategy, "cluster_environment", None)
        if environment is None or environment.world_size() == 1:
            return cls()
        from torch.distributed import PrefixStore, TCPStore

        rank, limit = environment.global_rank(), timedelta(seconds=timeout)
        is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has one
        store = TCPStore(
            environment.main_address,
            environment.main_port,
            is_master=rank == 0 and not is_agents,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set_timeout(_PATIENCE)
        restarted = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        running = environment.creates_processes_externally
        return cls(restarted, rank, environment.world_size(), running=running, timeout=limit)

    def from_first(self, key: str, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, on all of them.

        Raises:
            UserError: on all ranks, if ``make`` fails on the first, or it has ended.
        """
        if self.store is None:
            return make()
        if self.rank == 0:
            self._tell(key, make)
        return self._hear(key)

    def share_out(self, key: str, items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
        """``work`` of all ``items`` on all ranks; each does an equal share of it.

        Raises:
            UserError: on all ranks, if ``work`` fails on one, or one ends.
        """

        def own() -> list[R]:
            return work(items[self.rank :: self.workers])

        def gathered() -> list[R]:
            every: list[Any] = [None] * len(items)
            every[0 :: self.workers] = own()
            for rank in range(1, self.workers):
                self._wait_for(rank, f"{key}/{rank}")
                every[rank :: self.workers] = self._hear(f"{key}/{rank}")
            return every

        if self.rank > 0 and self.workers > 1:
            with self._beating():
                self._tell(f"{key}/{self.rank}", own)
        return self.from_first(key, gathered)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """In this block the first rank can see that this one lives: a store tells only others that it has ended."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(_BEAT.total_seconds()):
                with suppress(RuntimeError):  # the first rank has ended: who asks it for something reports that
                    self.store.add(f"nxtp/beats/{self.rank}", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _wait_for(self, rank: int, key: str) -> None:
        """
        Raises:
            UserError: ``rank`` has ended, or stands still.
        """
        beats = -1
        while not self.store.check([f"nxtp/{key}"]):
            before, beats = beats, self.store.add(f"nxtp/beats/{rank}", 0)
            if beats == before:
                raise UserError(f"Rank {rank} has ended, or stands still: see its output.")
            with suppress(RuntimeError):  # not yet
                self.store.wait([f"nxtp/{key}"], _SILENCE)

    def _tell(self, key: str, make: Callable[[], Any]) -> None:
        try:
            value = {"value": make()}
        except Exception as error:
            text = str(error) if isinstance(error, UserError) else f"Rank {self.rank}: {type(error).__name__}: {error}"
            self.store.set(f"nxtp/{key}", json.dumps({"error": text}))
            raise
        self.store.set(f"nxtp/{key}", json.dumps(value))

    def _hear(self, key: str) -> Any:
        try:
            told = json.loads(self.store.get(f"nxtp/{key}"))
        except RuntimeError as error:
            raise UserError(f"Rank {self.rank} has lost the first rank: {one_line(error)[:200]}") from error
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]
