"""Prefetching remote shards: several at a time, as many ahead of the reader as fit into the cache."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.remote import RemoteError
from nxtp.data.shards.urls import is_remote
from nxtp.errors import UserError

_THREADS = 8
_AHEAD = 64  # shards, in a cache without a limit
_SHARE = 0.75  # of the cache for shards that are not read yet; the rest is for those being read


class Prefetcher:
    """Threads that fetch ``urls`` in this order, until :meth:`close`.

    Ranks of one machine share the work: each skips what another one fetches. A failure is reported when a sample is
    read.
    """

    def __init__(self, cache: RemoteCache, urls: Sequence[str]):
        self._cache, self._urls = cache, list(urls)
        self._next = self._reached = 0
        self._sizes: list[int] = []
        self._changed = threading.Condition()
        for _ in range(min(_THREADS, len(self._urls))):
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def reached(self, index: int) -> None:
        """The reader is at ``urls[index]``: earlier shards are no longer needed."""
        with self._changed:
            self._reached = index
            self._changed.notify_all()

    def close(self) -> None:
        """Start no more transfers; running ones finish."""
        with self._changed:
            self._urls = []
            self._changed.notify_all()

    def _run(self) -> None:
        while (url := self._take()) is not None:
            if is_remote(url):
                with suppress(RemoteError, UserError, FileNotFoundError):
                    self._cache.fetch(url)
                    self._sizes.append(self._cache.path_of(url).stat().st_size)

    def _take(self) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: not self._urls or self._next < self._reached + self._ahead())
            self._next = max(self._next, self._reached)
            if self._next >= len(self._urls):
                return None
            self._next += 1
            return self._urls[self._next - 1]

    def _ahead(self) -> int:
        """How many shards may be in the cache, from the reader's on."""
        if self._cache.limit is None:
            return _AHEAD
        if not self._sizes:
            return _THREADS
        return max(1, int(_SHARE * self._cache.limit * len(self._sizes) / sum(self._sizes)))
