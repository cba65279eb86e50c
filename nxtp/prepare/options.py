"""How a set is written: the options that all preparation scripts share."""

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
class Writing:
    """How a set is written; the options that all scripts share.

    ``shard_size``  samples a shard
    ``workers``     processes
    ``resize``      make the short side at most this many pixels, keeping the ratio; None copies images byte for byte
    ``quality``     of the JPEGs that a resize writes
    ``nouns``       a noun backend: store the labels of captions, so that training need not find them
    ``check``       decode every image and leave out those that cannot be decoded
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
            raise UserError(f"--quality is {self.quality}: between 1 and 100, please.")
        if self.nouns is not None:
            noun_backend(self.nouns)

    def made_by(self) -> dict[str, Any]:
        """The options that change what is written."""
        images = {"resize": self.resize, "quality": self.quality} if self.resize else {"resize": None}
        return {"shard_size": self.shard_size, "check": self.check} | images


def writing_options(command: Callable) -> Callable:
    """The shared options of a script's command, gathered into its argument ``writing``; user errors in one line."""

    @wraps(command)
    def run(shard_size, workers, resize, quality, nouns, check, overwrite, **options):
        try:
            writing = Writing(shard_size, workers, resize, quality, nouns, check, overwrite)
            return command(writing=writing, **options)
        except UserError as error:
            raise click.ClickException(str(error)) from error

    help_resize = "Short side at most this many pixels, ratio kept. By default images are copied byte for byte."
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace a set that was made with other options."),
        click.option("--check", is_flag=True, help="Decode every image; leave out those that cannot be decoded."),
        click.option("--nouns", metavar="BACKEND", help="Store the captions' nouns as labels: textblob, nltk, …"),
        click.option("--quality", default=95, show_default=True, help="JPEG quality after --resize."),
        click.option("--resize", type=int, metavar="PIXELS", help=help_resize),
        click.option("--workers", default=os.cpu_count() or 1, show_default="all cores", help="Processes."),
        click.option("--shard-size", default=5_000, show_default=True, help="Samples a shard."),
    ):
        run = option(run)
    return run
