"""Counts in words, as the commands print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
