"""The options that all preparation scripts share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from nxtp.data.labels.nouns import noun_backend
from nxtp.errors import UserError, at_least


@dataclass(frozen=True)
class WriterOptions:
    """How a set is written.

    ``shard_size``  samples per shard
    ``workers``     processes
    ``resize``      pixels of the short side, at most; the ratio is kept. None copies images byte for byte
    ``quality``     of the JPEGs that ``resize`` writes
    ``nouns``       the noun backend whose labels are stored, so that training need not find them
    ``check``       decode every image, and skip those that cannot be decoded
    ``overwrite``   replace a set that was made with other options
    """

    shard_size: int = 5_000
    workers: int = 1
    resize: int | None = None
    quality: int = 95
    nouns: str | None = None
    check: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        at_least("--shard-size", self.shard_size, 1)
        at_least("--workers", self.workers, 1)
        if self.resize is not None:
            at_least("--resize", self.resize, 16)
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality must be from 1 to 100, got {self.quality}.")
        if self.nouns is not None:
            noun_backend(self.nouns)

    def made_by(self) -> dict[str, Any]:
        """The options that change what is written."""
        images = {"resize": self.resize, "quality": self.quality} if self.resize else {"resize": None}
        return {"shard_size": self.shard_size, "check": self.check} | images


_OPTIONS = (
    click.option("--shard-size", default=5_000, show_default=True, help="Samples per shard."),
    click.option("--workers", default=os.cpu_count() or 1, show_default="all cores", help="Processes."),
    click.option("--resize", type=int, metavar="PIXELS", help="Short side, at most. By default images are copied."),
    click.option("--quality", default=95, show_default=True, help="JPEG quality after --resize."),
    click.option("--nouns", metavar="BACKEND", help="Store the captions' nouns as labels: textblob, nltk, …"),
    click.option("--check", is_flag=True, help="Decode every image; skip those that cannot be decoded."),
    click.option("--overwrite", is_flag=True, help="Replace a set that was made with other options."),
)


def writer_options(command: Callable) -> Callable:
    """Add the shared options to a command, which gets them as its argument ``options``; errors are one line."""

    @wraps(command)
    def run(shard_size, workers, resize, quality, nouns, check, overwrite, **arguments):
        try:
            options = WriterOptions(shard_size, workers, resize, quality, nouns, check, overwrite)
            return command(options=options, **arguments)
        except UserError as error:
            raise click.ClickException(str(error)) from error

    for option in reversed(_OPTIONS):
        run = option(run)
    return run
