"""The hub: names that stand for a directory here or a repository there, and the card of a model that is pushed."""

from __future__ import annotations

from pathlib import Path

from nxtp.errors import UserError


def is_path(source: str | Path) -> bool:
    """Whether a name can only be a path: it is written as one, or its first half is a directory here.

    >>> is_path("./lm"), is_path("a/b/c"), is_path("meta-llama/Llama-2-7b-hf"), is_path("gpt2")
    (True, True, False, False)
    """
    text = str(source)
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or ("/" in text and Path(text).parent.is_dir())


def require_source(source: str | Path, setting: str) -> None:
    """
    Raises:
        UserError: ``source`` can only be a path, and nothing is there; ``setting`` is what it was given for.
    """
    if is_path(source) and not Path(source).exists():
        raise UserError(f"{setting}: no '{source}' here.")
