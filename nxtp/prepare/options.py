"""The options that all preparation scripts share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

import click

from nxtp.data.labels.nouns import NounBackend, noun_backend
from nxtp.errors import UserError


def _option(value: Any, help: str, **settings: Any) -> Any:
    """A field, with the arguments that :func:`writer_options` gives to ``click.option``."""
    return field(default=value, metadata={"default": value, "help": help, **settings})


@dataclass(frozen=True)
class WriterOptions:
    """How a set is written."""

    shard_size: int = _option(5_000, "Samples per shard.", type=click.IntRange(1), show_default=True)
    workers: int = _option(1, "Processes.", type=click.IntRange(1), default=os.cpu_count(), show_default="all cores")
    resize: int | None = _option(
        None,
        "Pixels of the short side, at most; the ratio is kept. By default images are copied byte for byte.",
        type=click.IntRange(16),
        metavar="PIXELS",
    )
    quality: int = _option(95, "JPEG quality after --resize.", type=click.IntRange(1, 100), show_default=True)
    nouns: str | None = _option(None, "Store the captions' nouns as labels: hanta, nltk, …", metavar="BACKEND")
    stop_nouns: str = _option("", "With --nouns: those that are no labels, as person,people.", metavar="NOUN,…")
    check: bool = _option(False, "Decode every image; skip those that cannot be decoded.", is_flag=True)
    overwrite: bool = _option(False, "Replace a set that was made with other options.", is_flag=True)

    def __post_init__(self) -> None:
        # An unknown backend is an error before anything is read.
        if self.noun_backend() is None and self.stop_nouns:
            raise UserError(
                "--stop-nouns needs --nouns. Without it training finds the nouns: set nouns.stop=[…] there."
            )

    def noun_backend(self) -> NounBackend | None:
        """The backend of --nouns; None if no nouns are stored."""
        return None if self.nouns is None else noun_backend(self.nouns, self.stop_nouns.split(","))

    def made_by(self) -> dict[str, Any]:
        """The options that change what is written."""
        images = {"resize": self.resize, "quality": self.quality} if self.resize else {"resize": None}
        return {"shard_size": self.shard_size, "check": self.check} | images


class Script(click.Command):
    """A script of data/: run by itself, it reports a :class:`UserError` as `nxtp` does."""

    def main(self, *args: Any, **settings: Any) -> Any:
        try:
            return super().main(*args, **settings)
        except UserError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            sys.exit(1)


def writer_options(command: Callable) -> Callable:
    """Add the shared options to a command, which gets them as its argument ``options``."""

    @wraps(command)
    def run(**arguments):
        options = WriterOptions(**{option.name: arguments.pop(option.name) for option in fields(WriterOptions)})
        return command(options=options, **arguments)

    for option in reversed(fields(WriterOptions)):
        run = click.option(f"--{option.name.replace('_', '-')}", **option.metadata)(run)
    return run
