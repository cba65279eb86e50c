"""Names of shards and of their members: directories, globs, brace expressions, URLs; key and extension."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from nxtp.data.shards.remote import find_files
from nxtp.errors import UserError, some_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
METADATA_NAME = re.compile(r"__[^/]*__($|/)")  # members that WebDataset takes for metadata
_LOCAL_SCHEME = re.compile(r"^file:(//)?")
_MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name, split at the first dot of its last part as WebDataset does it."""
    match = _MEMBER_NAME.match(name)
    return (match[1], match[2]) if match else None


def expand_shards(spec: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Sorted, distinct paths and URLs of shards.

    ``spec`` is a directory (its ``*.tar``, not those of subdirectories), a file, a glob, a URL, a ``pipe:`` command, or
    a list of these, with brace expressions (``cc3m-{000..331}.tar``). Directories and globs may be remote
    (``s3://bucket/laion``), but web servers cannot be listed. A URL that ends in .tar is not looked up.

    Raises:
        UserError: nothing is found, a named file does not exist, or a store cannot be listed.
    """
    parts = parts_of(spec)
    if not parts:
        raise UserError("No shards: the list of shards is empty.")
    if wrong := [part for part in parts if not (isinstance(part, str | os.PathLike) and os.fspath(part))]:
        raise UserError(f"No shards: give a directory, a glob, a URL, or a list of these, not {wrong[0]!r}.")
    found = {url for part in parts for url in _expand_one(os.fspath(part))}
    return sorted({identity(url): url for url in sorted(found)}.values())


def parts_of(spec: Any) -> list[Any]:
    """The entries of a list of shards; anything else is one entry."""
    return list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]


def _expand_one(spec: str) -> list[str]:
    if directory := directory_of(spec):
        found = sorted(glob.glob(os.path.join(glob.escape(directory), "*.tar")))
        if not found:
            advice = sets_below(directory) or " nxtp prepare folder makes shards of a folder of pictures."
            raise UserError(f"No shards: the directory {spec} contains no *.tar file.{advice}")
        return found
    path = os.path.expanduser(local_path(spec))
    if os.path.exists(path):
        return [path]
    try:
        expanded = list(braceexpand(spec))
    except ValueError as error:
        raise UserError(f"No shards: '{spec}' is not a brace expression ({error}).") from error
    if len(expanded) > 1:
        return [url for one in expanded for url in _expand_one(one)]
    if is_remote(spec):
        return _expand_remote(expanded[0])
    path = os.path.expanduser(local_path(expanded[0]))
    found = [file for file in sorted(glob.glob(path)) if file.endswith(".tar")] or [path] * os.path.exists(path)
    if not found:
        what = "no *.tar file" if glob.has_magic(path) else "nothing"
        raise UserError(
            f"No shards: {what} found at '{spec}'. Give a directory of *.tar files, a glob, a brace expression such "
            "as 'cc3m-{000..331}.tar', or a list of these; nxtp prepare makes shards."
        )
    return found


def _expand_remote(url: str) -> list[str]:
    """The shards of a directory or glob in a remote store; a shard's own URL as it is."""
    if url.startswith(("http://", "https://")):
        path = url.split("?", 1)[0]
        if glob.has_magic(path) or not (".tar" in path or "?" in url):
            example = f"{path.split('*')[0].rstrip('/')}/{{00000..00331}}.tar"
            raise UserError(f"No shards: a web server lists nothing. Name the shards of {url}, such as '{example}'.")
        return [url]
    matching = glob.has_magic(url)
    if url.startswith("pipe:") or (url.endswith(".tar") and not matching):
        return [url]
    entries = find_files(url, matching=matching)
    files = [entry["url"] for entry in entries if entry["type"] == "file"]
    found = [file for file in files if file.endswith(".tar") or files == [url]]
    if not found:
        below = sorted(entry["url"].rsplit("/", 1)[1] for entry in entries if entry["type"] == "directory")
        advice = f" It has the directories {some_of(below)}: name one of these." if below else ""
        advice = advice or (" There is nothing at all: check the names of bucket and directory." if not entries else "")
        raise UserError(f"No shards: no *.tar file found at {url}.{advice}")
    return found


def directory_of(spec: Any) -> str | None:
    """The path of the local directory that ``spec`` names; None if it is anything else."""
    path = os.path.expanduser(local_path(os.fspath(spec))) if isinstance(spec, str | os.PathLike) else ""
    return path if os.path.isdir(path) else None


def sets_below(directory: Path | str) -> str:
    """' Shards are in …: name one of these.' if subdirectories contain some, else ''."""
    below = sorted({path.parent.name for path in Path(directory).glob("*/*.tar")})
    return f" Shards are in its {some_of(below)}: name one of these." if below else ""


def local_path(url: str) -> str:
    return _LOCAL_SCHEME.sub("", url)


def identity(url: str) -> str:
    """The same text for all spellings of one shard, and for links to it."""
    return url if is_remote(url) else os.path.realpath(local_path(url))


def is_remote(url: str) -> bool:
    """Whether ``url`` is fetched instead of being read in place."""
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file:"))
