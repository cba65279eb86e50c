"""The options that all preparation scripts share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import click

from nxtp.data.labels.nouns import noun_backend
from nxtp.errors import UserError


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
        if self.nouns is not None:
            noun_backend(self.nouns)  # an unknown name is an error before anything is read

    def made_by(self) -> dict[str, Any]:
        """The options that change what is written."""
        images = {"resize": self.resize, "quality": self.quality} if self.resize else {"resize": None}
        return {"shard_size": self.shard_size, "check": self.check} | images


def writer_options(command: Callable) -> Callable:
    """Add the shared options to a command, which gets them as its argument ``options``; errors are one line."""

    @wraps(command)
    def run(**arguments):
        options = WriterOptions(**{field.name: arguments.pop(field.name) for field in fields(WriterOptions)})
        try:
            return command(options=options, **arguments)
        except UserError as error:
            raise click.ClickException(str(error)) from error

    cores = os.cpu_count() or 1
    help_resize = "Pixels of the short side, at most. By default images are copied byte for byte."
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace a set that was made with other options."),
        click.option("--check", is_flag=True, help="Decode every image; skip those that cannot be decoded."),
        click.option("--nouns", metavar="BACKEND", help="Store the captions' nouns as labels: textblob, nltk, …"),
        click.option(
            "--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of JPEGs after --resize."
        ),
        click.option("--resize", type=click.IntRange(16), metavar="PIXELS", help=help_resize),
        click.option("--workers", type=click.IntRange(1), default=cores, show_default="all cores", help="Processes."),
        click.option(
            "--shard-size", type=click.IntRange(1), default=5_000, show_default=True, help="Samples per shard."
        ),
    ):
        run = option(run)
    return run
