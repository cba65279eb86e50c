"""Many images, a batch at a time: folders, shards, names on a pipe or any iterator → answers, in bounded memory."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from nxtp.data.images import ImageError, find_images
from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.shards.urls import expand_shards, is_remote
from nxtp.errors import UserError, by_kind

if TYPE_CHECKING:
    from nxtp.sampling.ranking import Labels

log = logging.getLogger("nxtp")

WORKERS = min(8, os.cpu_count() or 1)  # threads that decode: Pillow and torch let the others run meanwhile
_LONGEST_NAME = 1 << 16  # bytes of a name on a pipe


@dataclass(frozen=True)
class Item:
    """An image that is yet to be read.

    ``image``  its path, its key in a shard, or what its owner calls it
    ``shard``  the shard that holds it, if one does
    ``read``   gives the image, as :meth:`nxtp.inference.recognizer.Recognizer.transform` takes it, or raises ImageError
    """

    image: str
    read: Callable[[], Any] = field(repr=False, compare=False)
    shard: str | None = None

    @property
    def name(self) -> str:
        return self.image if self.shard is None else f"{self.shard}/{self.image}"


@dataclass(frozen=True)
class Prediction:
    """One image's labels, or why it has none.

    ``item``              where it came from, to read it again
    ``labels``            [(label, probability), …], most probable first; None if the image cannot be used
    ``error``             why it cannot be used; None if it can
    ``image``, ``shard``  the item's
    """

    item: Item
    labels: Labels | None
    error: str | None

    @property
    def image(self) -> str:
        return self.item.image

    @property
    def shard(self) -> str | None:
        return self.item.shard


@dataclass(frozen=True)
class Source:
    """Images in a fixed order; ``count`` of them, None where only the end will tell."""

    items: Iterable[Item]
    count: int | None = None

    @classmethod
    def of(cls, what: Any, cache_dir: str | None = None) -> Source:
        """Whatever images come in.

        Args:
            what: a path: an image, a directory of images (anywhere below it, sorted), a directory of shards, a
                ``.tar`` file, a glob or brace expression of them, or a URL; or an iterable of images or of
                (name, image) pairs, read as it is needed.
            cache_dir: where remote shards are kept.

        Raises:
            UserError: shards that are not there, or hold nothing; remote ones without ``cache_dir``.
        """
        if isinstance(what, str | Path):
            return cls.all_of([str(what)], cache_dir)
        return cls(_items_of(what), len(what) if hasattr(what, "__len__") else None)

    @classmethod
    def all_of(cls, whats: Iterable[str], cache_dir: str | None = None) -> Source:
        """Several paths as one source: first the images of files and directories, each once, then the shards."""
        whats = list(whats)
        shards = [what for what in whats if _holds_shards(what)]
        files = [what for what in whats if what not in shards]
        parts = [_files(files)] if files else []
        if shards:
            parts.append(_shards(shards, cache_dir))
        return cls(chain.from_iterable(part.items for part in parts), sum(part.count for part in parts))

    @classmethod
    def named_on(cls, pipe: BinaryIO, separator: bytes = b"\n") -> Source:
        """Images and directories whose names come on a pipe, each used as soon as it is read."""
        return cls(item for name in _names(pipe, separator) for item in _files([name]).items)


def answers(
    source: Source,
    label: Callable[[Tensor], list[Labels]],
    transform: Callable[[Any], Tensor],
    batch_size: int,
    workers: int = WORKERS,
    ahead: int | None = None,
) -> Iterator[Prediction]:
    """Answers in the source's order; an image that cannot be used is told in its place, the others are done.

    Args:
        label: uint8 [B, 3, S, S] → labels of each.
        transform: an image → uint8 [3, S, S]; raises ImageError.
        batch_size: images labelled together.
        workers: threads that read and decode.
        ahead: images in memory at once, decoded or being decoded; by default two batches.
    """

    def pixels_of(item: Item) -> Tensor | str:
        try:
            return transform(item.read())
        except ImageError as error:
            return error.reason

    def decoded() -> Iterator[tuple[Item, Tensor | str]]:
        waiting: deque[tuple[Item, Future[Tensor | str]]] = deque()
        for item in source.items:
            waiting.append((item, pool.submit(pixels_of, item)))
            if len(waiting) >= limit:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    limit = ahead or 2 * batch_size
    pool = ThreadPoolExecutor(workers)
    try:
        for some in batches(decoded(), batch_size):
            good = [pixels for _, pixels in some if isinstance(pixels, Tensor)]
            labelled = iter(label(torch.stack(good)) if good else [])
            for item, pixels in some:
                yield (
                    Prediction(item, next(labelled), None)
                    if isinstance(pixels, Tensor)
                    else Prediction(item, None, pixels)
                )
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive runs of at most ``size``."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _holds_shards(what: str) -> bool:
    """Whether a path means shards: by its name, or as a directory that holds them and no image beside them."""
    if is_remote(what) or what.endswith(".tar"):
        return True
    directory = Path(what)
    if not directory.is_dir() or not any(directory.glob("*.tar")):
        return False
    if not find_images([directory])[0]:
        return True
    log.warning("%s holds images and shards: its images are taken; name %s/*.tar for the shards.", what, what)
    return False


def _files(paths: Iterable[str | Path]) -> Source:
    found, problems = find_images(paths)
    failing = (Item(problem.name, _raising(problem)) for problem in problems)
    there = (Item(str(path), lambda path=path: path) for path in found)
    return Source(chain(failing, there), len(found) + len(problems))


def _shards(specs: list[str], cache_dir: str | None) -> Source:
    """The images of shards in order, and before them what is wrong with the shards as a whole."""
    shards = IndexedShards(expand_shards(specs), None if cache_dir is None else RemoteCache(cache_dir))
    if not len(shards):
        raise UserError(
            f"No image in the shards of {', '.join(specs)}{f' ({by_kind(shards.skipped)})' if shards.skipped else ''}."
        )

    def read(position: int) -> bytes:
        try:
            return shards.read(position).image
        except SampleError as fault:
            raise ImageError(fault.key, fault.kind) from fault

    def items() -> Iterator[Item]:
        for shard in shards.shards:
            for kind, count in sorted(shard.skipped.items()):
                yield Item(shard.url, _raising(ImageError(shard.url, f"{kind} × {count}")))
        for position in range(len(shards)):
            yield Item(shards.key_of(position), lambda position=position: read(position), shards.shard_of(position))

    return Source(items(), len(shards) + sum(len(shard.skipped) for shard in shards.shards))


def _items_of(images: Iterable[Any]) -> Iterator[Item]:
    for number, image in enumerate(images):
        name = str(image) if isinstance(image, str | Path) else str(number)
        if isinstance(image, tuple):
            name, image = str(image[0]), image[1]
        yield Item(name, lambda image=image: image)


def _names(pipe: BinaryIO, separator: bytes) -> Iterator[str]:
    """Names as they arrive, without empty ones."""
    rest = b""
    while chunk := pipe.read1(_LONGEST_NAME):
        *names, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(name) for name in names if name)
    if rest:
        yield os.fsdecode(rest)


def _raising(error: ImageError) -> Callable[[], Any]:
    def read() -> Any:
        raise error

    return read
