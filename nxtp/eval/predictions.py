"""predictions.jsonl: true and predicted labels of each image, of an evaluation or a run's final validation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from nxtp.sampling.ranking import Labels


def prediction_lines(
    name: str, keys: Sequence[str], labels: Sequence[Sequence[str]], predictions: Sequence[Labels]
) -> Iterator[str]:
    """A line of JSON for each of B images of the set ``name``, with its newline."""
    for key, truth, ranked in zip(keys, labels, predictions, strict=True):
        rounded = [[label, round(probability, 6)] for label, probability in ranked]
        row = {"set": name, "key": key, "labels": truth, "predictions": rounded}
        yield json.dumps(row, ensure_ascii=False) + "\n"
