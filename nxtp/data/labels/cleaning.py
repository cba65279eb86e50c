"""The spelling of labels: one form for comparison, and lists without duplicates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from nxtp.errors import UserError
from nxtp.model.tokenizer import DELIMITER

_SPACE = re.compile(r"\s+")


def normalise(label: str) -> str:
    """The form in which labels are compared: Unicode NFKC, lower case, trimmed, inner whitespace one space."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).lower())).strip()


def clean_labels(labels: Iterable[str]) -> list[str]:
    """Labels as a model can write them, in order: trimmed, without the delimiter, none empty.

    Of labels with the same normalised form the first is used.
    """
    cleaned = (_SPACE.sub(" ", label.replace(DELIMITER, " ")).strip() for label in labels)
    distinct: dict[str, str] = {}
    for label in cleaned:
        distinct.setdefault(normalise(label), label)
    return [label for form, label in distinct.items() if form]


def distinct(labels: Iterable[str]) -> list[str]:
    """Normalised, without duplicates and empty ones, in order."""
    return [label for label in dict.fromkeys(map(normalise, labels)) if label]


def read_lines(path: str | Path, what: str, advice: str) -> list[str]:
    """The lines of a file of labels.

    Raises:
        UserError: it cannot be read: ``what``, why, and ``advice``.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{what} cannot be read: {reason}. {advice}") from error
