"""The batches of an epoch: positions of samples, computed from (seed, epoch) alone."""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from torch.utils.data import Sampler

from nxtp.data.mixture import MixtureSource
from nxtp.data.shards.prefetch import Prefetcher
from nxtp.errors import UserError, at_least

_SUBSET, _ROTATION = 0xDA7A, 0x2077  # streams of random numbers
_MOST_REPEATS = 10_000  # each is a piece of the epoch per shard
_UNSHUFFLED = 65_536  # window size without shuffling
Prefetch = Callable[[Sequence[int]], Prefetcher | None]  # numbers of shards, in the order of use


class ElasticBatchSampler(Sampler[tuple[int, np.ndarray]]):
    """The batches of each epoch on one rank.

    Shards are shuffled and concatenated, then samples are shuffled within windows. This order does not depend on the
    number of ranks and workers: step i of all ranks together takes the i-th run of ``batch_size · world`` samples.
    Training epochs have whole steps only; the few samples left over change with the epoch. In evaluation
    (``shuffle=False``) every sample comes once, in the same batches for any number of ranks; in the last step one batch
    may be smaller, and others empty. One window is in memory, and iteration can start at any step at once.

    Args:
        shard_sizes: samples of each shard.
        sources: the sources of a mixture; by default all shards are one. In evaluation repeats are ignored.
        max_samples: use only so many samples, of each source in proportion to its size: whole shards, in an order that
            depends on ``subset_seed`` alone, and the first samples of one more. A larger subset contains a smaller one.
        fraction: the same as a share of all samples.
        nodes: groups of consecutive ranks. Each step's samples are sorted by shard and split over the groups, so that
            a group reads only a part of a window's shards.

    Yields:
        (epoch, int64 array of positions in the :class:`~nxtp.data.shards.reader.IndexedShards`)

    Raises:
        UserError: a repeat, ``max_samples`` or ``fraction`` out of range, a negative seed, or fewer samples than one
            step needs.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        sources: Sequence[MixtureSource] | None = None,
        seed: int = 0,
        shuffle_window: int = 20_000,
        rank: int = 0,
        world: int = 1,
        max_samples: int | None = None,
        fraction: float | None = None,
        subset_seed: int = 0,
        nodes: int = 1,
    ):
        at_least("seed", seed, 0)
        at_least("data.subset_seed", subset_seed, 0)
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.shuffle, self.window, self.nodes = shuffle, shuffle_window, nodes
        self.sources = list(sources) if sources is not None else [MixtureSource("", range(len(self.sizes)))]
        for source in self.sources:
            if not 0 < source.repeat <= _MOST_REPEATS:
                most = f"> 0 and ≤ {_MOST_REPEATS:,}"
                raise UserError(f"The repeat of source '{source.name}' must be {most}, got {source.repeat}.")
        self._starts = np.cumsum(self.sizes) - self.sizes
        counts = [int(self.sizes[list(source.shards)].sum()) for source in self.sources]
        used = subset_counts(counts, subset_size(sum(counts), max_samples, fraction))
        self._chosen = []  # used positions of each source, one range per shard
        for source, n in zip(self.sources, used, strict=True):
            shards = [self._range(shard) for shard in source.shards]
            order = _random(subset_seed, _SUBSET, source.name).permutation(len(shards))
            self._chosen.append(sorted(_cut([shards[i] for i in order], 0, n), key=lambda chosen: chosen.start))
        self._used = used
        repeats = [source.repeat if shuffle else 1.0 for source in self.sources]
        self._repeats = [int(repeat) for repeat in repeats]
        self._extra = [round((repeat % 1) * n) for repeat, n in zip(repeats, used, strict=True)]
        self.total = sum(r * n + e for r, n, e in zip(self._repeats, used, self._extra, strict=True))
        self.epoch = 0
        self.start = 0  # samples of this epoch that are done, over all ranks
        self.prefetch: Prefetch | None = None
        if self.steps == 0:
            raise UserError(
                f"{self.total} samples do not fill one step of {batch_size} images on {world} rank(s): "
                "set a smaller data.batch_size or give more data."
            )

    @property
    def per_step(self) -> int:
        """Samples of one step on all ranks together."""
        return self.batch_size * self.world

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.steps_after(0)

    def steps_after(self, samples: int) -> int:
        """Steps of an epoch that remain after ``samples`` over all ranks."""
        left = self.total - samples
        return max(0, left // self.per_step if self.shuffle else -(-left // self.per_step))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        windows, ready = self._windows(self.start), np.empty(0, np.int64)
        for step in range(self.steps_after(self.start)):
            size = min(self.per_step, self.total - self.start - step * self.per_step)
            while len(ready) < size:
                ready = np.concatenate([ready, next(windows)])
            own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            # Sorted by shard, the ranks of a node read the same shards; the step has the same samples.
            together = np.sort(ready[:size]) if self.nodes > 1 else ready[:size]
            yield self.epoch, together[own]
            ready = ready[size:]

    def _windows(self, begin: int) -> Iterator[np.ndarray]:
        """The epoch's positions in order, from number ``begin`` on, window by window."""
        shuffled = self.shuffle and self.window > 1
        size, seed = self.window if shuffled else _UNSHUFFLED, [self.seed, self.epoch]
        pieces = self._pieces()
        ends = np.cumsum([len(piece) for piece in pieces])
        numbers = range(begin // size, -(-self.total // size))
        ahead: Prefetcher | None = None
        if self.prefetch:
            read = [self._of_node(_cut(pieces, number * size, (number + 1) * size, ends)) for number in numbers]
            starts = np.array([piece.start for window in read for piece in window], dtype=np.int64)
            ahead = self.prefetch((np.searchsorted(self._starts, starts, side="right") - 1).tolist())
            before = [0, *accumulate(map(len, read))]  # of each window: number of shards to fetch for earlier ones
        try:
            for number in numbers:
                cut = _cut(pieces, number * size, (number + 1) * size, ends)
                window = np.concatenate([np.arange(piece.start, piece.stop) for piece in cut])
                if shuffled:
                    np.random.default_rng([*seed, number]).shuffle(window)
                if ahead:
                    ahead.reached(before[number - numbers.start])
                yield window[max(begin - number * size, 0) :]
        finally:
            if ahead:
                ahead.close()

    def _of_node(self, window: list[range]) -> list[range]:
        """What this node reads of a window: its share, and a margin (three standard deviations) as steps differ."""
        if self.nodes == 1:
            return window
        node, total = self.rank * self.nodes // self.world, sum(map(len, window))
        more = int(1.5 * total / math.sqrt(self.per_step))
        begin, end = node * total // self.nodes - more, (node + 1) * total // self.nodes + more
        return _cut(sorted(window, key=lambda piece: piece.start), max(begin, 0), min(end, total))

    def _pieces(self) -> list[range]:
        """Ranges of positions, one per shard and repeat, in the shuffled order of shards."""
        pieces: list[range] = []
        for index, source in enumerate(self.sources):
            chosen = self._chosen[index]
            pieces += chosen * self._repeats[index]
            if extra := self._extra[index]:  # of a fractional repeat: the next samples, in a ring over the used ones
                ring = [chosen[i] for i in _random(self.seed, _ROTATION, source.name).permutation(len(chosen))]
                begin = self.epoch * extra % self._used[index]
                pieces += _cut(2 * ring, begin, begin + extra)
        if self.shuffle:
            pieces = [pieces[i] for i in np.random.default_rng([self.seed, self.epoch]).permutation(len(pieces))]
        return pieces

    def _range(self, shard: int) -> range:
        start = int(self._starts[shard])
        return range(start, start + int(self.sizes[shard]))


def _cut(pieces: Sequence[range], begin: int, end: int, ends: np.ndarray | None = None) -> list[range]:
    """Positions number ``begin`` … ``end`` - 1 of ``pieces``, whose cumulative lengths are ``ends``."""
    ends = np.cumsum([len(piece) for piece in pieces]) if ends is None else ends
    found = slice(int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end)) + 1)
    cut = []
    for piece, last in zip(pieces[found], ends[found].tolist(), strict=True):
        first = last - len(piece)
        cut.append(piece[max(begin - first, 0) : end - first])
    return [piece for piece in cut if piece]


def subset_size(total: int, max_samples: int | None, fraction: float | None) -> int:
    """How many of ``total`` samples are used.

    Raises:
        UserError: both settings are given, or one is out of range.
    """
    if max_samples is not None and fraction is not None:
        raise UserError(f"data.max_samples={max_samples} and data.fraction={fraction}: give one of them.")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise UserError(f"data.fraction must be > 0 and ≤ 1, got {fraction}.")
        return max(1, round(fraction * total)) if total else 0
    if max_samples is None:
        return total
    at_least("data.max_samples", max_samples, 1)
    return min(max_samples, total)


def subset_counts(sizes: Sequence[int], wanted: int) -> list[int]:
    """How many of ``wanted`` samples each source gives: in proportion, and never fewer if more are wanted.

    Sample r of a source of n has priority (r + ½) / n; the ``wanted`` smallest are used.
    """
    total = sum(sizes)
    if wanted >= total:
        return list(sizes)
    counts = [max(0, wanted * n // total - len(sizes) - 1) for n in sizes]
    heap = [((c + 0.5) / n, i) for i, (c, n) in enumerate(zip(counts, sizes, strict=True)) if n]
    heapq.heapify(heap)
    for _ in range(wanted - sum(counts)):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        if counts[i] < sizes[i]:
            heapq.heappush(heap, ((counts[i] + 0.5) / sizes[i], i))
    return counts


def _random(seed: int, stream: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, stream, zlib.crc32(name.encode())])
