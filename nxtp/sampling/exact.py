"""Exact search: the k most probable labels under the model, with a proof or a flag that says there is none.

One-shot sampling keeps one label per first token, so labels that share one compete ("coffee", "coffee table": a limit
that the paper's authors state). Here the tree of all token sequences is searched best first. A label's probability is
the product of its tokens', delimiter included, and can only fall as the label grows: once k finished labels are at
least as probable as every unfinished one, no better label exists.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nxtp.model.model import Model
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.one_shot import SamplerConfig


@dataclass(kw_only=True)
class ExactConfig(SamplerConfig):
    """Labels are the most probable ones at the ``temperature``.

    ``max_expansions``     nodes of the tree computed per image, at most
    ``branches_per_step``  nodes computed together: more are faster, and some of them are not needed
    """

    max_expansions: int = field(default=1024, metadata={"≥": 0})
    branches_per_step: int = field(default=32, metadata={"≥": 1})


@torch.inference_mode()
def exact(
    model: Model,
    images: Tensor,
    config: ExactConfig,
    *,
    prompt: Sequence[int],
    delimiter: int,
    top_k: int,
    never_first: Sequence[int] = (),
) -> Samples:
    """The ``top_k`` most probable labels of each image, most probable first. Arguments as in
    :func:`nxtp.sampling.one_shot.one_shot`.

    A label of ``max_tokens`` tokens is cut there and counts as finished, without a delimiter's probability, as in
    one-shot sampling. ``complete_B`` of the result is False where ``max_expansions`` ended the search: its labels are
    then the best found so far.
    """
    searches = [_Search(model, image, config, prompt, delimiter, top_k, never_first) for image in images.split(1)]
    samples = Samples.of([search.run() for search in searches], delimiter, images.device)
    samples.complete_B = torch.tensor([search.complete for search in searches])
    return samples


class _Label(NamedTuple):
    """A label, finished or not, found as a continuation of the expanded label ``parent``."""

    probability: float
    tokens: tuple[int, ...]
    probs: tuple[float, ...]
    parent: int


class _Search:
    """One image's search. The cache is one row: the prefix, then the last token of every expanded label."""

    def __init__(
        self,
        model: Model,
        image: Tensor,
        config: ExactConfig,
        prompt: Sequence[int],
        delimiter: int,
        top_k: int,
        never_first: Sequence[int],
    ):
        self.model, self.config, self.delimiter, self.top_k = model, config, delimiter, top_k
        self.prefix = model.num_image_tokens + 1 + len(prompt)
        logits_1V, self.cache = model.prefill(image, prompt)
        probs_V = (logits_1V[0] / config.temperature).softmax(dim=-1)
        probs_V[torch.tensor(never_first, dtype=torch.long, device=probs_V.device)] = 0.0
        self.remaining = config.max_expansions
        self.complete = True
        self.finished: list[tuple[float, int, _Label]] = []  # min-heap of the best k, with a tie breaker
        # Each expanded label, the empty one first, with its continuations: probabilities and ids, likeliest first.
        self.expanded: list[tuple[_Label, list[float], list[int]]] = []
        self.paths = torch.ones(1, 1, dtype=torch.bool)  # [row, column] of ``expanded``: column is row or its ancestor
        # Of each expanded label the best continuation not taken yet: (-probability, tie breaker, index, continuation).
        self.open: list[tuple[float, int, int, int]] = []
        self._ties = itertools.count()
        self._add([_Label(1.0, (), (), -1)], probs_V[None])

    def run(self) -> list[tuple[Sequence[int], Sequence[float]]]:
        while self._undecided():
            labels = self._take(min(self.config.branches_per_step, self.remaining))
            if labels:
                self._expand(labels)
            elif self._undecided():  # an open label must be expanded, and no expansions remain
                self.complete = False
                break
        best = sorted(self.finished, key=lambda entry: (-entry[0], entry[1]))
        return [(label.tokens, label.probs) for _, _, label in best] or [((), ())]

    def _undecided(self) -> bool:
        """Whether an open label could still enter the result."""
        lowest = self.finished[0][0] if len(self.finished) == self.top_k else 0.0
        return bool(self.open) and -self.open[0][0] > lowest

    def _finish(self, label: _Label) -> None:
        heapq.heappush(self.finished, (label.probability, -next(self._ties), label))
        if len(self.finished) > self.top_k:
            heapq.heappop(self.finished)

    def _add(self, labels: list[_Label], probs_NV: Tensor) -> None:
        """Expanded labels. Continuations beyond those that can still be expanded or returned are not needed."""
        best = probs_NV.topk(min(probs_NV.shape[1], self.remaining + self.top_k + 1))
        packed = torch.stack([best.values.view(torch.int32), best.indices.int()]).cpu()  # one read from the device
        for label, values, ids in zip(labels, packed[0].view(torch.float32).tolist(), packed[1].tolist(), strict=True):
            self.expanded.append((label, values, ids))
            self._offer(len(self.expanded) - 1, 0)

    def _offer(self, index: int, continuation: int) -> None:
        label, values, _ = self.expanded[index]
        if continuation < len(values) and values[continuation] > 0.0:
            probability = label.probability * values[continuation]
            heapq.heappush(self.open, (-probability, next(self._ties), index, continuation))

    def _take(self, count: int) -> list[_Label]:
        """Up to ``count`` of the best open labels that must be expanded; finishes those that end before them."""
        labels: list[_Label] = []
        while self._undecided():
            _, _, index, continuation = self.open[0]
            label, values, ids = self.expanded[index]
            token = ids[continuation]
            ends = token == self.delimiter or len(label.tokens) + 1 == self.config.max_tokens
            if not ends and len(labels) == count:
                break
            probability = -heapq.heappop(self.open)[0]
            self._offer(index, continuation + 1)
            tokens = label.tokens if token == self.delimiter else (*label.tokens, token)
            longer = _Label(probability, tokens, (*label.probs, values[continuation]), index)
            if ends:
                self._finish(longer)
            else:
                labels.append(longer)
        return labels

    def _expand(self, labels: list[_Label]) -> None:
        """Compute the continuations of some labels in one step."""
        new, device = len(labels), self.model.image_token.device
        own = torch.cat([self.paths[[label.parent for label in labels]], torch.eye(new, dtype=torch.bool)], dim=1)
        self.paths = torch.cat([torch.nn.functional.pad(self.paths, (0, new)), own])
        mask = torch.cat([torch.ones(new, self.prefix, dtype=torch.bool), own[:, 1:]], dim=1).to(device)[None, None]
        tokens = torch.tensor([[label.tokens[-1] for label in labels]], device=device)
        positions = torch.tensor([[self.prefix + len(label.tokens) - 1 for label in labels]], device=device)
        decoder = self.model.decoder
        hidden = decoder(decoder.embed(tokens), positions, mask, self.cache)
        probs_NV = (decoder.logits(hidden)[0] / self.config.temperature).softmax(dim=-1)
        self.remaining -= new
        self._add(labels, probs_NV)
