"""What a user did that cannot work, said in one line, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """An error whose message is meant for the user: the command line prints it alone and exits with 1.

    The message says what was wrong, where, and what to do.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest of ``known``, or '' when nothing is near."""
    found = get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


def at_least(name: str, value: float, lowest: float) -> None:
    """
    Raises:
        UserError: ``value`` of the setting ``name`` is below ``lowest``.
    """
    if not value >= lowest:
        raise UserError(f"{name} is {value}: at least {lowest}, please.")


_NAMED = 3


def counted(number: int, noun: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def describe(counts: Mapping[str, int], template: str) -> str:
    """``template`` filled with "kind × n, …", or nothing where there is nothing to tell."""
    return template.format(", ".join(f"{kind} × {n:,}" for kind, n in sorted(counts.items()))) if counts else ""


def some_of(names: Sequence[str], count: int | None = None) -> str:
    """The first three of ``count`` names, of which ``names`` may be only the first, and how many more there are."""
    shown = names[:_NAMED]
    more = (len(names) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
