"""What a source holds that gives no sample: counted by kind, and the first of each named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from nxtp.errors import by_kind

NAMED = 3


class LeftOut:
    """Counts by kind (``counts``) and up to three names of each (``names``)."""

    def __init__(self, counts: Mapping[str, int] | None = None):
        self.counts: Counter[str] = Counter(counts or {})
        self.names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str = "") -> None:
        self.update({kind: 1}, {kind: [name]} if name else {})

    def update(self, counts: Mapping[str, int], names: Mapping[str, Sequence[str]]) -> None:
        self.counts.update(counts)
        for kind, some in names.items():
            known = self.names.setdefault(kind, [])
            known.extend(some[: NAMED - len(known)])

    def told(self, template: str) -> str:
        """``template`` filled with "kind × n (name, …), …", or nothing where nothing was skipped."""
        return template.format(by_kind(self.counts, self.names)) if self.counts else ""
