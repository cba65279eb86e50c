"""Hits of each image, from an evaluation's predictions.jsonl: packed into its record, for intervals over images."""

from __future__ import annotations

import json
import zlib
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from nxtp.data.labels.cleaning import distinct
from nxtp.errors import UserError
from nxtp.eval.hits import Hits


def chance(name: str, truths_N: np.ndarray, vocabulary: int) -> float:
    """What a metric is expected to be for k different labels drawn at random from those that the set has.

    Args:
        name: recall@k, precision@k, f1@k or hit@k.
        truths_N: labels of each image.
        vocabulary: different labels of the set.
    """
    kind, _, digits = name.partition("@")
    k = min(int(digits), vocabulary)
    if kind == "hit":
        return 1 - float(np.mean([comb(vocabulary - n, k) / comb(vocabulary, k) for n in truths_N.tolist()]))
    found_N = k * truths_N / vocabulary  # the mean of a hypergeometric distribution
    below = {"recall": truths_N, "precision": np.full_like(truths_N, k), "f1": (truths_N + k) / 2}
    return float(np.mean(found_N / below[kind]))


def read_hits(path: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a record keeps of its predictions.jsonl: set → hits and reference values.

    ``images``       a fingerprint of the images and their labels: only equal ones can be paired
    ``packed``       :meth:`Hits.packed`
    ``chance``       metric → :func:`chance`; of a closed vocabulary with several names a class, for one class an image
    ``label prior``  metric → its value for the most frequent training labels, where the record has these

    Raises:
        UserError: the file is not what `nxtp evaluate` writes.
    """
    rows: dict[str, list[tuple[str, list[str], list[str]]]] = {}
    try:
        for row in map(json.loads, path.read_text().splitlines()):
            if truth := distinct(row["labels"]):
                ranked = distinct(label for label, _ in row["predictions"])
                rows.setdefault(row["set"], []).append((row["key"], truth, ranked))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not the predictions.jsonl of an evaluation: {error}.") from error
    frequent = distinct(record.get("data", {}).get("train", {}).get("frequent_labels", []))
    classes = record.get("data", {}).get("classes")
    found = {}
    for name, images in rows.items():
        keys, truths, said = zip(*images, strict=True)
        hits, prior = Hits.of(said, truths), Hits.of([frequent] * len(truths), truths)
        own = [m.partition("/")[2] for m in record["metrics"] if m.partition("/")[0] == name]
        exact = [metric for metric in own if hits.metric(metric) is not None]
        vocabulary, truths_N = len({label for labels in truths for label in labels}), hits.truths_N
        if classes and vocabulary > classes:  # the labels are several names of an image's one class
            vocabulary, truths_N = classes, np.ones_like(truths_N)
        found[name] = {
            "images": zlib.crc32(json.dumps([keys, truths]).encode()),
            "packed": hits.packed(),
            "chance": {metric: round(chance(metric, truths_N, vocabulary), 6) for metric in exact},
        }
        if frequent:
            means = {m: prior.metric(m) for m in exact if int(m.partition("@")[2]) <= len(frequent)}
            found[name]["label prior"] = {m: round(float(v.mean()), 6) for m, v in means.items() if v is not None}
    return found
