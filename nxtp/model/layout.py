"""The sequence layout: where an image's prefix and labels stand, and what is predicted where.

    prefix  = image tokens · <|image|> · BOS · prompt          segment 0
    label j = its tokens · delimiter                           segment j ≥ 1        padding: segment -1

Which token attends to which follows from the segments: :mod:`nxtp.model.attention_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nxtp.errors import one_of
from nxtp.model.attention_rule import attention_mask

PUBLISHED_LENGTH = 512  # image and text positions of every published training sequence


@dataclass(frozen=True)
class Objective:
    """What the labels of an image are trained as (conf/objective).

    ``positions``         parallel: those of every label start right after the prompt; continued: from label to label
    ``first_token``       where a label's is predicted: at the last prompt token, as in one-shot sampling, or at the
                          previous label's delimiter (the first label's at the last prompt token)
    ``supervise_prompt``  the prompt's tokens too, not only labels and their delimiters
    ``prompts``           training draws one per batch; none: the model's own
    ``name``              in records
    """

    positions: str = "parallel"
    first_token: str = "prompt"
    supervise_prompt: bool = False
    prompts: list[str] = field(default_factory=list)
    name: str = "matched"

    def __post_init__(self) -> None:
        one_of("objective.positions", self.positions, ("parallel", "continued"))
        one_of("objective.first_token", self.first_token, ("prompt", "delimiter"))


MATCHED = Objective()
PUBLISHED = Objective("continued", "delimiter", supervise_prompt=True, name="published")


@dataclass
class Layout:
    """A batch of sequences. All index tensors are int64.

    ``tokens_BU``     token ids after ``<|image|>``: BOS, prompt, labels and delimiters (padding: 0), U = T - N - 1
    ``segments_BT``   0 in the prefix, j ≥ 1 in label j, -1 in padding
    ``positions_BT``  rotary position of each token
    ``sources``       distinct supervised positions, as indices into the flattened B·T axis
    ``pairs_S``       for each supervised pair, its row in ``sources``
    ``targets_S``     for each supervised pair, the token to predict there
    ``num_image_tokens``  N
    ``num_prompt_tokens``  of BOS and prompt
    ``num_tokens``        real (not padding) tokens in the batch, image tokens included
    """

    tokens_BU: Tensor
    segments_BT: Tensor
    positions_BT: Tensor
    sources: Tensor
    pairs_S: Tensor
    targets_S: Tensor
    num_image_tokens: int
    num_prompt_tokens: int
    num_tokens: int

    def mask(self, attention: str = "independent") -> Tensor:
        """The attention rule, by its name, for the whole batch: bool [B, 1, T, T], True = may attend."""
        return attention_mask(self.segments_BT, self.num_image_tokens, attention)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Layout:
        return replace(self, **{name: function(v) for name, v in vars(self).items() if isinstance(v, Tensor)})

    def to(self, *args: Any, **kwargs: Any) -> Layout:
        return self._map(lambda t: t.to(*args, **kwargs))

    def pin_memory(self) -> Layout:
        return self._map(Tensor.pin_memory)


def lay_out(
    labels: Sequence[Sequence[Sequence[int]]],
    *,
    prompt: Sequence[int],
    delimiter: int,
    num_image_tokens: int,
    objective: Objective = MATCHED,
    multiple: int = 1,
) -> Layout:
    """Put all labels of each image behind its prefix.

    Args:
        labels: the labels of each image, each a non-empty sequence of token ids without the delimiter.
        prompt: BOS and prompt token ids, at least one.
        multiple: T is padded to one; a GPU's matrix products want 8.

    Returns:
        A :class:`Layout` as long as its longest sequence.

    Raises:
        ValueError: an empty prompt, or a label without tokens.
    """
    batch, queries = len(labels), len(prompt)
    prefix = num_image_tokens + 1 + queries
    if queries == 0:
        raise ValueError("the prompt needs at least one token (BOS)")

    # One entry per label, then one entry per token; everything below is arithmetic on these vectors.
    flat = [label for image in labels for label in image]
    lengths = np.fromiter(map(len, flat), dtype=np.int64, count=len(flat)) + 1  # the delimiter included
    if (lengths == 1).any():
        raise ValueError("a label without tokens cannot be laid out")
    labels_per_image = np.fromiter(map(len, labels), dtype=np.int64, count=batch)
    image_of_label = np.repeat(np.arange(batch), labels_per_image)
    segment_of_label = _ramps(labels_per_image) + 1

    tokens = np.fromiter(chain.from_iterable((*label, delimiter) for label in flat), dtype=np.int64)
    row = np.repeat(image_of_label, lengths)
    within_label = _ramps(lengths)
    tokens_per_image = np.bincount(row, minlength=batch)
    within_image = _ramps(tokens_per_image)
    column = prefix + within_image

    length = prefix + int(tokens_per_image.max(initial=0))
    length += -length % multiple
    ids = np.zeros((batch, length), dtype=np.int64)
    segments = np.full((batch, length), -1, dtype=np.int64)
    positions = np.tile(np.arange(length), (batch, 1))
    ids[:, num_image_tokens + 1 : prefix] = np.asarray(prompt, dtype=np.int64)
    segments[:, :prefix] = 0
    ids[row, column] = tokens
    segments[row, column] = np.repeat(segment_of_label, lengths)

    if objective.positions == "parallel":
        positions[row, column] = prefix + within_label
    at_prompt = (within_label == 0) & (objective.first_token == "prompt")
    source, target = row * length + np.where(at_prompt, prefix - 1, column - 1), tokens
    if objective.supervise_prompt:
        prompt_row = np.repeat(np.arange(batch), queries)
        prompt_source = prompt_row * length + num_image_tokens + np.tile(np.arange(queries), batch)
        source = np.concatenate([prompt_source, source])
        target = np.concatenate([np.tile(np.asarray(prompt, dtype=np.int64), batch), target])
    sources, pairs = np.unique(source, return_inverse=True)

    return Layout(
        tokens_BU=torch.from_numpy(np.ascontiguousarray(ids[:, num_image_tokens + 1 :])),
        segments_BT=torch.from_numpy(segments),
        positions_BT=torch.from_numpy(positions),
        sources=torch.from_numpy(sources),
        pairs_S=torch.from_numpy(pairs),
        targets_S=torch.from_numpy(target),
        num_image_tokens=num_image_tokens,
        num_prompt_tokens=queries,
        num_tokens=batch * prefix + len(tokens),
    )


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """[0, 1, …, n-1] for each n of ``lengths``, end to end."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
