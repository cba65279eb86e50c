"""Which samples make each batch of an epoch: arithmetic on positions, a function of (seed, epoch) alone."""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from nxtp.errors import UserError, at_least

_SUBSET, _ROTATION = 0xDA7A, 0x2077  # distinct streams of random numbers
_UNSHUFFLED = 65_536  # positions at a time where nothing is shuffled


@dataclass(frozen=True)
class Part:
    """One source of a mixture: which shards (numbers in the ShardSet, ascending) are its, and how often they come.

    ``repeat`` w shows each sample w times an epoch: ⌊w⌋ times, and for the rest of w a share of the samples that
    moves on with every epoch.
    """

    name: str
    shards: Sequence[int]
    repeat: float = 1.0


class ElasticBatchSampler(Sampler):
    """The batches of each epoch on one rank.

    The global order is the same whatever the number of ranks and loader workers: shards in a shuffled order, end to
    end, shuffled again within windows. Step i of all ranks together takes the i-th run of ``batch_size · world``
    samples of it. In training an epoch has whole steps only (the few samples left over change with the epoch); in
    evaluation (``shuffle=False``) every sample comes once, the last step is shared out evenly and may leave a rank
    with a smaller or empty batch. Only the window at hand is held in memory, and any step is found at once.

    Args:
        shard_sizes: samples of each shard.
        parts: the sources; by default all shards are one. In evaluation repeats do not count.
        max_samples: only so many of all samples, in the sources' natural proportion: a fixed choice of ``subset_seed``
            alone, and a larger one contains every smaller one.
        fraction: the same as a share of all samples.

    Yields:
        (epoch, int64 array of positions in the ShardSet)

    Raises:
        UserError: a repeat, ``max_samples`` or ``fraction`` that is not above 0, a negative seed,
            or fewer samples than one step needs.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        parts: Sequence[Part] | None = None,
        seed: int = 0,
        shuffle_window: int = 20_000,
        rank: int = 0,
        world: int = 1,
        max_samples: int | None = None,
        fraction: float | None = None,
        subset_seed: int = 0,
    ):
        at_least("seed", seed, 0)
        at_least("data.subset_seed", subset_seed, 0)
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.shuffle, self.window = shuffle, shuffle_window
        self.parts = list(parts) if parts is not None else [Part("", range(len(self.sizes)))]
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._part_sizes = [int(self.sizes[list(part.shards)].sum()) for part in self.parts]
        for part in self.parts:
            if not (math.isfinite(part.repeat) and part.repeat > 0):
                raise UserError(f"The repeat of source '{part.name}' is {part.repeat}: it must be above 0.")
        chosen = subset_counts(self._part_sizes, subset_size(sum(self._part_sizes), max_samples, fraction))
        self._chosen = [self._choose(i, count, subset_seed) for i, count in enumerate(chosen)]
        repeats = [part.repeat if shuffle else 1.0 for part in self.parts]
        self._repeats = [int(repeat) for repeat in repeats]
        self._extra = [round((w - r) * n) for w, r, n in zip(repeats, self._repeats, chosen, strict=True)]
        self.total = sum(r * n + e for r, n, e in zip(self._repeats, chosen, self._extra, strict=True))
        self.epoch = 0
        self.start = 0  # samples of this epoch that all ranks together have had already
        self.prefetch: Callable[[Sequence[int]], None] | None = None
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
        """Steps of an epoch that are left when ``samples`` of it are done."""
        left = self.total - samples
        return max(0, left // self.per_step if self.shuffle else -(-left // self.per_step))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        line = self._line(self.epoch)
        begin = self.start
        for _ in range(self.steps_after(begin)):
            run = line.take(begin, min(begin + self.per_step, self.total))
            yield self.epoch, np.array_split(run, self.world)[self.rank]
            begin += self.per_step

    def _choose(self, index: int, count: int, seed: int) -> np.ndarray | None:
        """Sorted positions within a source's own line; None for all of them."""
        size = self._part_sizes[index]
        if count == size:
            return None
        rng = np.random.default_rng([seed, _SUBSET, _hash(self.parts[index].name)])
        return np.sort(rng.permutation(size)[:count]).astype(np.int64)

    def _line(self, epoch: int) -> _Line:
        pieces: list[np.ndarray | range] = []
        for index, part in enumerate(self.parts):
            shards = np.asarray(part.shards, dtype=np.int64)
            chosen = self._chosen[index]
            if chosen is None:
                once = [range(self._starts[s], self._starts[s] + self.sizes[s]) for s in shards]
            else:
                once = self._by_shard(chosen, shards)
            pieces += once * self._repeats[index]
            if extra := self._extra[index]:
                count = len(chosen) if chosen is not None else self._part_sizes[index]
                rng = np.random.default_rng([self.seed, _ROTATION, _hash(part.name)])
                turn = (epoch * extra + np.arange(extra)) % count
                local = np.sort(rng.permutation(count)[turn])
                pieces += self._by_shard(local if chosen is None else chosen[local], shards)
        pieces = [piece for piece in pieces if len(piece)]
        if self.shuffle:
            pieces = [pieces[i] for i in np.random.default_rng([self.seed, epoch]).permutation(len(pieces))]
        seed = [self.seed, epoch] if self.shuffle and self.window > 1 else None
        return _Line(pieces, self.window if seed else _UNSHUFFLED, seed, self._starts, self.prefetch)

    def _by_shard(self, local: np.ndarray, shards: np.ndarray) -> list[np.ndarray]:
        """Sorted positions on a source's own line → positions in the ShardSet, a piece a shard."""
        ends = np.cumsum(self.sizes[shards])
        bounds = np.searchsorted(local, ends)
        offsets = self._starts[shards] - (ends - self.sizes[shards])
        return [local[a:b] + o for a, b, o in zip([0, *bounds[:-1]], bounds, offsets, strict=True)]


class _Line:
    """All positions of an epoch in order, computed window by window."""

    def __init__(
        self,
        pieces: list[np.ndarray | range],
        window: int,
        seed: list[int] | None,
        starts: np.ndarray,
        prefetch: Callable[[Sequence[int]], None] | None,
    ):
        self.pieces, self.window, self.seed, self.starts = pieces, window, seed, starts
        self.ends = np.cumsum([len(piece) for piece in pieces])
        self._prefetch = prefetch
        self._ahead: Future | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch else None
        self._held: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def take(self, begin: int, end: int) -> np.ndarray:
        """Positions begin … end-1 of the line."""
        runs = []
        for number in range(begin // self.window, -(-end // self.window)):
            first = number * self.window
            runs.append(self._window(number)[max(begin - first, 0) : end - first])
        return np.concatenate(runs)

    def _window(self, number: int) -> np.ndarray:
        if self._held[0] != number:
            positions = np.concatenate(self._pieces_of(number))
            if self.seed is not None:
                np.random.default_rng([*self.seed, number]).shuffle(positions)
            self._held = (number, positions)
            if self._pool is not None and (self._ahead is None or self._ahead.done()):
                ahead = [int(p[0]) for p in self._pieces_of(number + 1)]
                shards = np.unique(np.searchsorted(self.starts, ahead, side="right") - 1) if ahead else []
                self._ahead = self._pool.submit(self._prefetch, [int(s) for s in shards])
        return self._held[1]

    def _pieces_of(self, number: int) -> list[np.ndarray]:
        """The parts of the pieces that lie in a window."""
        total = int(self.ends[-1])
        begin, end = min(number * self.window, total), min((number + 1) * self.window, total)
        found = []
        for index in range(int(np.searchsorted(self.ends, begin, side="right")), len(self.pieces)):
            first = int(self.ends[index]) - len(self.pieces[index])
            if first >= end:
                break
            found.append(np.asarray(self.pieces[index][max(begin - first, 0) : end - first], dtype=np.int64))
        return found


def subset_size(total: int, max_samples: int | None, fraction: float | None) -> int:
    """How many of ``total`` samples are used.

    Raises:
        UserError: both are given, or one is out of range.
    """
    if max_samples is not None and fraction is not None:
        raise UserError(f"data.max_samples={max_samples} and data.fraction={fraction}: give one of them.")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise UserError(f"data.fraction is {fraction}: above 0 and at most 1, please.")
        return max(1, round(fraction * total)) if total else 0
    if max_samples is None:
        return total
    at_least("data.max_samples", max_samples, 1)
    return min(max_samples, total)


def subset_counts(sizes: Sequence[int], wanted: int) -> list[int]:
    """How many of ``wanted`` samples each source gives: its share, and never fewer when more are wanted.

    Sample r of a source of n has priority (r + ½) / n; the ``wanted`` smallest are taken.
    """
    total, sources = sum(sizes), len(sizes)
    if wanted >= total:
        return list(sizes)
    counts = [max(0, wanted * n // total - sources - 1) for n in sizes]
    heap = [((c + 0.5) / n, i) for i, (c, n) in enumerate(zip(counts, sizes, strict=True)) if n]
    heapq.heapify(heap)
    for _ in range(wanted - sum(counts)):
        _, i = heapq.heappop(heap)
        counts[i] += 1
        if counts[i] < sizes[i]:
            heapq.heappush(heap, ((counts[i] + 0.5) / sizes[i], i))
    return counts


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())
