"""Exact search: the k most probable labels under the model, with a proof or an honest flag.

One-shot sampling keeps one label for each first token, so labels that share one compete ("coffee", "coffee table": the
limit that the paper's authors state). Here the tree of all token sequences is searched best first: a label's
probability is the product of its tokens', delimiter included, and can only fall as it grows. Once k finished labels
are at least as probable as every unfinished one, no better label exists.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nxtp.errors import UserError, at_least
from nxtp.model.model import Model
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS, Samples


@dataclass
class ExactConfig:
    """
    ``max_expansions``     nodes of the tree computed an image, at most
    ``branches_per_step``  nodes computed together; more are faster and compute some in vain
    ``max_tokens``         a label is cut there
    ``temperature``        logits are divided by it; labels are the most probable ones at that temperature
    """

    max_expansions: int = 1024
    branches_per_step: int = 32
    max_tokens: int = MAX_LABEL_TOKENS
    temperature: float = 1.0

    def __post_init__(self):
        at_least("sampler.max_expansions", self.max_expansions, 0)
        at_least("sampler.branches_per_step", self.branches_per_step, 1)
        at_least("sampler.max_tokens", self.max_tokens, 1)
        if self.temperature <= 0:
            raise UserError(f"sampler.temperature is {self.temperature}: above 0, please.")


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
    """The ``top_k`` most probable labels of each image, most probable first.

    A label of ``max_tokens`` tokens is cut there and counts as finished, without a delimiter's probability, as in
    one-shot sampling. ``complete_B`` of the result is False where ``max_expansions`` ended the search: its labels are
    then the best that were found.

    Args:
        images: uint8 [B, 3, S, S], or normalised floating point.
        prompt, delimiter, never_first: as in :func:`nxtp.sampling.one_shot.one_shot`.
    """
    searches = [_Search(model, image, config, prompt, delimiter, top_k, never_first) for image in images.split(1)]
    found = [search.run() for search in searches]
    samples = Samples.of(found, delimiter, images.device)
    samples.complete_B = torch.tensor([search.complete for search in searches])
    return samples


class _Node:
    """An unfinished label: its tokens, their probabilities, and the cache row of the node before the last token."""

    __slots__ = ("parent", "probs", "tokens")

    def __init__(self, tokens: tuple[int, ...], probs: tuple[float, ...], parent: int):
        self.tokens, self.probs, self.parent = tokens, probs, parent


class _Search:
    """One image's search. The cache is one row: the prefix, then every computed node's last token."""

    def __init__(self, model, image, config, prompt, delimiter, top_k, never_first):
        self.model, self.config, self.delimiter = model, config, delimiter
        self.top_k, self.max_tokens = top_k, config.max_tokens
        self.prefix = model.num_image_tokens + 1 + len(prompt)
        logits_1V, self.cache = model.prefill(image, prompt)
        self.device = logits_1V.device
        probs_V = (logits_1V[0] / config.temperature).softmax(dim=-1)
        if never_first:
            probs_V[torch.tensor(list(never_first), device=self.device)] = 0.0
        self.expansions = 0
        self.complete = True
        self.ancestors = torch.zeros(0, 0, dtype=torch.bool)  # [nodes, nodes]: each node's path, itself included
        self.finished: list[tuple[float, int, _Node]] = []  # min-heap of the best k
        # A heap entry is the best child of its family that is not taken yet; the others wait behind it.
        self.open: list[tuple[float, int, int, int]] = []  # (-probability, tie breaker, family, child)
        self.families: list[tuple[float, tuple[int, ...], tuple[float, ...], int, list[float], list[int]]] = []
        self._count = 0
        self._add_family(1.0, (), (), -1, probs_V)

    def run(self) -> list[tuple[list[int], list[float]]]:
        while self._undecided():
            nodes = self._take(min(self.config.branches_per_step, self.config.max_expansions - self.expansions))
            if nodes:
                self._expand(nodes)
            elif self._undecided():  # what is left must be computed, and may not be
                self.complete = False
                break
        best = sorted(self.finished, key=lambda entry: (-entry[0], entry[1]))
        return [(list(node.tokens), list(node.probs)) for _, _, node in best] or [([], [])]

    def _undecided(self) -> bool:
        """Whether an open label could still enter the result."""
        return bool(self.open) and -self.open[0][0] > self._threshold()

    def _threshold(self) -> float:
        """Below or at it no label can enter the result."""
        return self.finished[0][0] if len(self.finished) == self.top_k else 0.0

    def _finish(self, probability: float, node: _Node) -> None:
        self._count += 1
        entry = (probability, -self._count, node)
        if len(self.finished) < self.top_k:
            heapq.heappush(self.finished, entry)
        elif probability > self.finished[0][0]:
            heapq.heapreplace(self.finished, entry)

    def _add_family(self, probability: float, tokens, probs, parent: int, probs_V: Tensor) -> None:
        """All continuations of a label. More than can still be computed are never needed."""
        keep = min(len(probs_V), self.config.max_expansions - self.expansions + self.top_k + 1)
        values, ids = probs_V.topk(keep)
        self.families.append((probability, tokens, probs, parent, values.tolist(), ids.tolist()))
        self._offer(len(self.families) - 1, 0)

    def _offer(self, family: int, child: int) -> None:
        probability, _, _, _, values, _ = self.families[family]
        if child < len(values) and values[child] > 0.0:
            self._count += 1
            heapq.heappush(self.open, (-probability * values[child], self._count, family, child))

    def _take(self, count: int) -> list[tuple[float, _Node]]:
        """Up to ``count`` of the best open labels that must be computed; those that end on the way are finished."""
        nodes: list[tuple[float, _Node]] = []
        while self._undecided():
            family, child = self.open[0][2:]
            _, tokens, probs, parent, values, ids = self.families[family]
            ends = ids[child] == self.delimiter or len(tokens) + 1 == self.max_tokens
            if not ends and len(nodes) == count:
                break
            probability = -heapq.heappop(self.open)[0]
            self._offer(family, child + 1)
            longer = (*probs, values[child])
            if ids[child] == self.delimiter:
                self._finish(probability, _Node(tokens, longer, parent))
            elif ends:
                self._finish(probability, _Node((*tokens, ids[child]), longer, parent))
            else:
                nodes.append((probability, _Node((*tokens, ids[child]), longer, parent)))
        return nodes

    def _expand(self, nodes: list[tuple[float, _Node]]) -> None:
        """Compute the continuations of some labels in one step."""
        old, new = len(self.ancestors), len(nodes)
        grown = torch.zeros(old + new, old + new, dtype=torch.bool)
        grown[:old, :old] = self.ancestors
        for row, (_, node) in enumerate(nodes, start=old):
            if node.parent >= 0:
                grown[row] = grown[node.parent]
            grown[row, row] = True
        self.ancestors = grown
        own = grown[old:].to(self.device)
        mask = torch.cat([own.new_ones(new, self.prefix), own], dim=1)[None, None]
        tokens = torch.tensor([[node.tokens[-1] for _, node in nodes]], device=self.device)
        positions = torch.tensor([[self.prefix + len(node.tokens) - 1 for _, node in nodes]], device=self.device)
        decoder = self.model.decoder
        hidden = decoder(decoder.embed(tokens), positions, mask, self.cache)
        probs_NV = (decoder.logits(hidden)[0] / self.config.temperature).softmax(dim=-1)
        self.expansions += new
        for row, (probability, node) in enumerate(nodes):
            self._add_family(probability, node.tokens, node.probs, old + row, probs_NV[row])
