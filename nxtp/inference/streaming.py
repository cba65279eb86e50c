"""Many images, one batch at a time: directories, shards, names on a pipe or an iterable → predictions."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from io import BufferedIOBase
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nxtp.data.config import DataConfig
from nxtp.data.images import ImageError, find_images
from nxtp.data.mixture import open_set
from nxtp.data.shards.reader import SampleError
from nxtp.data.shards.urls import is_remote
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError

if TYPE_CHECKING:
    from nxtp.sampling.ranking import Labels

log = logging.getLogger("nxtp")

WORKERS = min(8, os.cpu_count() or 1)  # threads that decode: Pillow and torch release the GIL
_LONGEST_NAME = 1 << 16  # bytes of a name on a pipe


@dataclass(frozen=True)
class ImageItem:
    """An image not yet read: ``read()`` returns what ``Recognizer.transform`` takes, or raises ImageError."""

    image: str  # its path, its key in a shard, or the name it was given
    read: Callable[[], Any] = field(repr=False, compare=False)
    shard: str | None = None  # the URL of its shard, if it is in one

    @property
    def name(self) -> str:
        return self.image if self.shard is None else f"{self.shard}/{self.image}"


@dataclass(frozen=True)
class Prediction:
    """One image's labels, or why it has none."""

    item: ImageItem  # ``item.read()`` reads the image again
    labels: Labels | None = None  # [(label, probability), …], most probable first; None if it cannot be read
    error: str | None = None  # why it cannot be read

    @property
    def image(self) -> str:
        return self.item.image

    @property
    def shard(self) -> str | None:
        return self.item.shard


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order.

    ``count``  None if their number is not known in advance
    ``local``  what ranks that share them out must have in common besides: the local shards
    """

    items: Iterable[ImageItem]
    count: int | None = None
    local: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Any, cache_dir: str | None = None) -> ImageSource:
        """
        Args:
            source: a path: an image, a directory of images (also in its subdirectories, sorted), a directory of
                shards, a ``.tar`` file, a glob or brace expression of them, or a URL; or an iterable of images or of
                (name, image) pairs, read as they are needed.
            cache_dir: where remote shards are stored.

        Raises:
            UserError: missing or empty shards, or remote ones without ``cache_dir``.
        """
        if isinstance(source, str | Path):
            return cls.from_paths([str(source)], cache_dir)
        return cls(_named(source), len(source) if hasattr(source, "__len__") else None)

    @classmethod
    def from_paths(cls, paths: Iterable[str], cache_dir: str | None = None, ranks: Ranks | None = None) -> ImageSource:
        """Several paths: first the images of files and directories, each once, then those of shards.

        Of ``ranks``, the first one lists and counts the shards.
        """
        shards: list[str] = []
        files: list[str] = []
        for path in paths:
            (shards if _is_shards(path) else files).append(path)
        parts = [_files(files)] if files else []
        if shards:
            parts.append(_shards(shards, cache_dir, ranks))
        items, count = chain.from_iterable(part.items for part in parts), sum(part.count or 0 for part in parts)
        return cls(items, count, parts[-1].local if parts else {})

    @classmethod
    def from_pipe(cls, pipe: BufferedIOBase, separator: bytes = b"\n") -> ImageSource:
        """Names of images and directories on a pipe, each used as soon as it is read."""
        return cls(item for name in _names(pipe, separator) for item in _files([name]).items)


def shared_out(source: ImageSource, batch_size: int, share: tuple[int, int]) -> ImageSource:
    """The batches of a source that rank r of n has: r, r + n, … Each is what it is in one process.

    Raises:
        UserError: a source of unknown length, such as a pipe.
    """
    rank, ranks = share
    if ranks == 1:
        return source
    if source.count is None:
        raise UserError("Several ranks cannot share out a pipe: give files, directories or shards.")
    own = islice(batches(source.items, batch_size), rank, None, ranks)
    rounds, rest = divmod(source.count, batch_size * ranks)
    count = rounds * batch_size + min(max(rest - rank * batch_size, 0), batch_size)
    return replace(source, items=chain.from_iterable(own), count=count)


def stream(
    source: ImageSource,
    label: Callable[[Tensor], list[Labels]],
    transform: Callable[[Any], Tensor],
    batch_size: int,
    workers: int = WORKERS,
    ahead: int | None = None,
) -> Iterator[Prediction]:
    """Predictions in the order of ``source``. One for an image that cannot be read has an error instead of labels.

    Args:
        label: uint8 [B, 3, S, S] → the labels of each, a batch per call.
        transform: an image → uint8 [3, S, S]; raises ImageError. Runs in ``workers`` threads.
        ahead: images in memory, decoded or being decoded; by default two batches.
    """

    def pixels_of(item: ImageItem) -> Tensor | str:
        try:
            return transform(item.read())
        except ImageError as error:
            return error.reason

    def decoded() -> Iterator[tuple[ImageItem, Tensor | str]]:
        waiting: deque[tuple[ImageItem, Future[Tensor | str]]] = deque()
        for item in source.items:
            waiting.append((item, pool.submit(pixels_of, item)))
            if len(waiting) >= (ahead or 2 * batch_size):
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    pool = ThreadPoolExecutor(workers)
    try:
        for batch in batches(decoded(), batch_size):
            readable = [pixels for _, pixels in batch if isinstance(pixels, Tensor)]
            labels = iter(label(torch.stack(readable)) if readable else [])
            for item, pixels in batch:
                if isinstance(pixels, Tensor):
                    yield Prediction(item, labels=next(labels))
                else:
                    yield Prediction(item, error=pixels)
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of ``size`` items; the last may be shorter.

    Raises:
        ValueError: ``size`` below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be ≥ 1, got {size}")
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _is_shards(path: str) -> bool:
    """Whether a path means shards: by its name, or as a directory that contains shards and no images."""
    if is_remote(path) or path.endswith(".tar"):
        return True
    directory = Path(path)
    if not directory.is_dir() or not any(directory.glob("*.tar")):
        return False
    if not find_images([directory])[0]:
        return True
    log.warning("%s contains images and shards: only its images are read; name %s/*.tar for its shards.", path, path)
    return False


def _files(paths: Iterable[str | Path]) -> ImageSource:
    found, problems = find_images(paths)
    unreadable = [ImageItem(problem.name, partial(_raise, problem)) for problem in problems]
    images = (ImageItem(str(path), partial(Path, path)) for path in found)
    return ImageSource(chain(unreadable, images), len(found) + len(problems))


def _shards(specs: list[str], cache_dir: str | None, ranks: Ranks | None) -> ImageSource:
    """The images of shards in order; before them what is wrong with whole shards."""
    config = DataConfig(cache_dir=cache_dir, allow_missing_shards=True, max_skip_fraction=1)
    opened = open_set("images", specs, config, ranks)
    shards = opened.shards

    def read(position: int) -> bytes:
        try:
            return shards.read_image(position)
        except SampleError as error:
            raise ImageError(error.key, error.kind) from error

    damaged = [
        ImageItem(shard.url, partial(_raise, ImageError(shard.url, f"{kind} × {count}")))
        for shard in shards.shards
        for kind, count in sorted(shard.skipped.items())
    ]
    images = (ImageItem(shards.key_of(i), partial(read, i), shards.shard_of(i)) for i in range(len(shards)))
    return ImageSource(chain(damaged, images), len(shards) + len(damaged), opened.local)


def _named(images: Iterable[Any]) -> Iterator[ImageItem]:
    """Images as items, named by their path, by the name beside them, or by their number."""
    for number, image in enumerate(images):
        name: Any = number
        if isinstance(image, tuple):
            name, image = image
        elif isinstance(image, str | Path):
            name = image
        yield ImageItem(str(name), partial(lambda given: given, image))


def _names(pipe: BufferedIOBase, separator: bytes) -> Iterator[str]:
    """Names as they arrive, without empty ones."""
    rest = b""
    while chunk := pipe.read1(_LONGEST_NAME):
        *names, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(name) for name in names if name)
    if rest:
        yield os.fsdecode(rest)


def _raise(error: Exception) -> NoReturn:
    raise error
