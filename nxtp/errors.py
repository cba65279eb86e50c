"""The one error class for mistakes that the user can mend, and the text helpers that messages share."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # numbers of an OSError that the user can mend
_NAMED = 3  # names in a message, at most


class UserError(Exception):
    """An error whose message is meant for the user: the command line prints it alone and exits with 1.

    The message says what was wrong, where, and what to do.
    """


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """' Did you mean X?' for the nearest of ``known``, written behind ``prefix``, or '' when nothing is near."""
    found = get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{prefix}{found[0]}'?" if found else ""


def at_least(name: str, value: Any, lowest: float) -> None:
    """Check a setting.

    Raises:
        UserError: ``value`` of the setting ``name`` is below ``lowest``, infinite, or no number.
    """
    if not (isinstance(value, Real) and lowest <= float(value) < math.inf):
        raise UserError(f"{name} must be ≥ {lowest}, got {value}.")


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Check a setting.

    Raises:
        UserError: ``value`` of the setting ``name`` is not ``known``.
    """
    if value not in known:
        *first, last = known
        raise UserError(f"{name} must be {', '.join(first)} or {last}, got '{value}'.{nearest(value, known)}")


def root_cause(error: BaseException) -> BaseException:
    """The operating system's error from which ``error`` results, if there is one: libraries wrap it in other words."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def printable(name: str | Path) -> str:
    """A file name on one line, safe to print: invalid bytes and control characters are escaped."""
    text = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: object) -> str:
    """A text, such as a library's error, without line breaks."""
    return " ".join(str(text).split())


def counted(number: int, noun: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def some_of(names: Sequence[str], count: int | None = None) -> str:
    """The first three of ``count`` names, of which ``names`` may be only the first, and how many more there are."""
    shown = names[:_NAMED]
    more = (len(names) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def by_kind(counts: Mapping[str, int], names: Mapping[str, Sequence[str]] | None = None) -> str:
    """ "kind × n, …" or, where ``names`` has the first names of a kind, "kind × n (name, …), …"; '' without counts."""

    def one(kind: str) -> str:
        known = [printable(name) for name in (names or {}).get(kind, ())]
        return f"{kind} × {counts[kind]:,}" + (f" ({some_of(known, counts[kind])})" if known else "")

    return ", ".join(one(kind) for kind in sorted(counts))
