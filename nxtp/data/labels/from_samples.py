"""The labels of a sample: its own, or the nouns of its caption."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from nxtp.data.config import DataConfig, named_sources
from nxtp.data.labels.cleaning import clean_labels
from nxtp.data.labels.nouns import NounBackend, noun_backend
from nxtp.data.shards.manifest import read_manifest
from nxtp.data.shards.reader import IndexedShards, RawSample, SampleError
from nxtp.data.shards.urls import directory_of, parts_of
from nxtp.errors import UserError, by_kind, counted

log = logging.getLogger("nxtp")


def warn_if_nouns_differ(name: str, spec: Any, nouns: str, trained: str | None) -> None:
    """Warn if the noun backend of set ``name`` is not ``trained``, that of the training labels; None is unknown.

    A set's backend is the one that the manifest of its shards, ``spec``, names, else ``nouns``.
    """
    parts = [part for source in named_sources(spec).values() for part in parts_of(source.shards)]
    manifests = [read_manifest(directory) if (directory := directory_of(part)) else None for part in parts]
    for here in dict.fromkeys((manifest or {}).get("nouns", {}).get("backend", nouns) for manifest in manifests):
        if trained is not None and here != trained:
            log.warning("Set '%s': noun backend '%s'; the model was trained with '%s'.", name, here, trained)


def label_counts(shards: IndexedShards, config: DataConfig, limit: int = 20_000) -> Counter[str]:
    """How often each label occurs in up to ``limit`` samples spread over the shards.

    Raises:
        UserError: none of them has a label.
    """
    nouns = noun_backend(config.nouns, config.stop_nouns)
    found: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for position in shards.spread(limit):
        try:
            found.update(labels_of(shards.read(position), nouns))
        except SampleError as error:
            skipped[error.kind] += 1
    shards.close()  # loader workers open their own
    if not found:
        raise UserError(
            f"None of {counted(skipped.total(), 'sample')} of the shards has a label ({by_kind(skipped)}): compare "
            "data.caption_key and data.where with the samples' JSON, and the shards with docs/data.md."
        )
    return found


def labels_of(raw: RawSample, nouns: NounBackend) -> list[str]:
    """A sample's own labels, else the nouns of its caption.

    Raises:
        SampleError: "no caption" (nor labels), or "no labels" (no noun in the caption).
    """
    if raw.labels is not None:
        labels = clean_labels(raw.labels)
    elif raw.caption is not None:
        labels = nouns(raw.caption)
    else:
        raise SampleError("no caption", raw.key, raw.shard)
    if not labels:
        raise SampleError("no labels", raw.key, raw.shard)
    return labels
