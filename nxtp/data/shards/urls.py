"""Finding shards: directories, globs, brace expressions and URLs."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

from nxtp.errors import UserError, some_of

log = logging.getLogger("nxtp")


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


_SKIPPED_NAME = re.compile(r"__[^/]*__($|/)")  # what WebDataset takes for metadata


_LOCAL_SCHEME = re.compile(r"^file:(//)?")


def expand_shards(spec: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Sorted, distinct paths and URLs of shards.

    ``spec`` is a directory (its ``*.tar``, not those of its subdirectories), a file, a glob, a URL or ``pipe:``
    command, each with WebDataset's brace expressions (``cc3m-{000..331}.tar``), or a list of these.

    Raises:
        UserError: nothing was found, or a file that was named does not exist.
    """
    parts = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    if not parts:
        raise UserError("No shards: the list of shards is empty.")
    found = {url for part in parts for url in _expand_one(os.fspath(part))}
    return sorted({identity(url): url for url in sorted(found)}.values())


def _expand_one(spec: str) -> list[str]:
    path = os.path.expanduser(_LOCAL_SCHEME.sub("", spec))
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if not found:
            raise UserError(f"No shards: the directory {spec} holds no *.tar file.{sets_below(path)}")
        return found
    if os.path.exists(path):
        return [path]
    try:
        expanded = expand_urls(spec)
    except Exception as error:  # braceexpand has a class of its own for this
        raise UserError(f"No shards: '{spec}' is not a brace expression ({error}).") from error
    if len(expanded) > 1:
        return [url for one in expanded for url in _expand_one(one)]
    if is_remote(spec):
        return expanded
    path = os.path.expanduser(_LOCAL_SCHEME.sub("", expanded[0]))
    found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.exists(path)
    if not found:
        raise UserError(
            f"No shards: nothing found at '{spec}'. Give a directory of *.tar files, a glob, a brace expression such "
            "as 'cc3m-{000..331}.tar', or a list of these; make shards with the scripts in data/."
        )
    return found


def sets_below(directory: Path | str) -> str:
    """' Shards are in …: name one of these.' where subdirectories hold some, else ''."""
    below = sorted({path.parent.name for path in Path(directory).glob("*/*.tar")})
    return f" Shards are in its {some_of(below)}: name one of these." if below else ""


def identity(url: str) -> str:
    """What tells one shard from another: of two spellings or links of one file the same."""
    return url if is_remote(url) else os.path.realpath(_LOCAL_SCHEME.sub("", url))


def is_remote(url: str) -> bool:
    """Whether ``url`` is fetched by one of WebDataset's openers instead of being read in place."""
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))
