"""A closed vocabulary: the probability of each given label, all in one pass over the prefix tree of their tokens.

    prefix · every node of the tree, one row       a node attends to the prefix, its ancestors and itself

That is the rule of :mod:`nxtp.model.layout`, each label being a segment: labels that begin alike share their first nodes. A
label's probability is the product of its tokens' and its delimiter's, over the whole vocabulary of the language model:
it does not depend on which other labels are given, and the given ones do not add up to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nxtp.data.labels.imagenet import NAMES, imagenet_classes
from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.model.tokenizer import LabelTokenizer

IMAGENET = "imagenet1k"
_ROW = 4096  # nodes computed together, about
_LOGITS = 1 << 26  # numbers of a block of logits: 256 MB

Classes = Sequence[str | Sequence[str]]


def read_classes(source: str | Path) -> list[list[str]]:
    """Classes of a file, one a line, a class's names separated by commas; or ``imagenet1k`` (all synonyms),
    ``imagenet1k:first``, ``imagenet1k:clip``.

    Raises:
        UserError: no such file, not text, or nothing in it.
    """
    name, _, which = str(source).partition(":")
    if name == IMAGENET and not Path(source).exists():
        return [c.labels(which or NAMES[0]) for c in imagenet_classes()]
    try:
        lines = Path(source).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f"Labels in '{source}' cannot be read: {reason}. A class a line, please, or {IMAGENET}."
        ) from error
    classes = classes_of_lines(lines)
    if not classes:
        raise UserError(f"'{source}' holds no label: a class a line, its names separated by commas, please.")
    return classes


def classes_of_lines(lines: Iterable[str]) -> list[list[str]]:
    """Classes as people write them: one a line, its names separated by commas; empty lines are passed over."""
    classes = ([name.strip() for name in line.split(",") if name.strip()] for line in lines)
    return [names for names in classes if names]


@dataclass
class Tree:
    """Distinct beginnings of token sequences; a node stands behind its parent.

    ``tokens_M``   int64, a node's token
    ``parents_M``  int64, its parent's index; -1: it begins a label
    ``depths_M``   int64, 0 where it begins a label
    ``ends_S``     int64, the last node of each sequence
    """

    tokens_M: Tensor
    parents_M: Tensor
    depths_M: Tensor
    ends_S: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Tree:
        """Nodes in order of first tokens, so that whatever begins alike lies together."""
        known: dict[tuple[int, ...], int] = {}
        tokens, parents, depths = [], [], []
        for sequence in sorted(map(tuple, sequences)):
            for length in range(1, len(sequence) + 1):
                path = sequence[:length]
                if path not in known:
                    known[path] = len(tokens)
                    tokens.append(path[-1])
                    parents.append(known[path[:-1]] if length > 1 else -1)
                    depths.append(length - 1)
        ends = [known[tuple(sequence)] for sequence in sequences]
        return cls(*(torch.tensor(values, dtype=torch.long) for values in (tokens, parents, depths, ends)))

    def __len__(self) -> int:
        return len(self.tokens_M)

    def rows(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of nodes of about ``size``, none of which parts labels that begin alike."""
        starts = [*torch.nonzero(self.depths_M == 0)[:, 0].tolist(), len(self)]
        begin = 0
        for here, following in pairwise(starts):
            if following - begin > size and here > begin:
                yield begin, here
                begin = here
        if begin < len(self):
            yield begin, len(self)

    def ancestors(self, begin: int, end: int) -> Tensor:
        """bool [m, m] of a range that :meth:`rows` gives: each node's path, itself included."""
        paths = torch.eye(end - begin, dtype=torch.bool)
        parents, depths = self.parents_M[begin:end] - begin, self.depths_M[begin:end]
        for depth in range(1, int(depths.max()) + 1):
            nodes = torch.nonzero(depths == depth)[:, 0]
            paths[nodes] |= paths[parents[nodes]]
        return paths


class Vocabulary:
    """Classes by their names, as token sequences of one tokenizer.

    A name that several classes share counts for each of them.

    Args:
        classes: each a label, or several names of one thing, the first of which it is called by.

    Raises:
        UserError: no class, or a name without tokens.
    """

    def __init__(self, classes: Classes, tokenizer: LabelTokenizer):
        named = [[names] if isinstance(names, str) else list(names) for names in classes]
        if not named or not all(named):
            raise UserError("A closed vocabulary needs at least one label, and each class a name.")
        place: dict[tuple[int, ...], int] = {}
        pairs: dict[tuple[int, int], None] = {}
        for owner, names in enumerate(named):
            for text, ids in zip(names, tokenizer.encode_labels(names), strict=True):
                if not ids:
                    raise UserError(f"The label '{text}' has no tokens.")
                pairs[place.setdefault(ids, len(place)), owner] = None
        self.classes = named
        self.sequences = list(place)
        self.names_P, self.owners_P = torch.tensor(list(pairs)).T
        self.delimiter = tokenizer.delimiter_id

    @cached_property
    def tree(self) -> Tree:
        return Tree.of(self.sequences)

    @cached_property
    def allowed(self) -> Allowed:
        return Allowed(self.tree, self.delimiter)


class Allowed:
    """What may follow in a label that must be one of those given: the children of a tree's node, and its delimiter.

    ``longest``  tokens of the longest label, without its delimiter
    """

    def __init__(self, tree: Tree, delimiter: int):
        self.delimiter, self.longest = delimiter, int(tree.depths_M.max()) + 1
        roots = torch.nonzero(tree.depths_M == 0)[:, 0]
        self.first = tree.tokens_M[roots]
        self.node_of_first = dict(zip(self.first.tolist(), roots.tolist(), strict=True))
        following: list[list[tuple[int, int]]] = [[] for _ in range(len(tree))]
        for node, (token, parent) in enumerate(zip(tree.tokens_M.tolist(), tree.parents_M.tolist(), strict=True)):
            if parent >= 0:
                following[parent].append((token, node))
        for node in set(tree.ends_S.tolist()):
            following[node].append((delimiter, node))
        widest = max(map(len, following))
        padded = [[*pairs, *[(-1, -1)] * (widest - len(pairs))] for pairs in following]
        self._tokens_MC, self._nodes_MC = torch.tensor(padded).unbind(dim=-1)

    def start(self, tokens: Tensor) -> Tensor:
        """The nodes of first tokens."""
        return torch.tensor([self.node_of_first[token] for token in tokens.flatten().tolist()]).view_as(tokens.cpu())

    def likeliest(self, logits: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits [..., V] behind ``nodes`` [...]: probability among all tokens, token and node, each [...]."""
        tokens, following = (table[nodes.cpu()].to(logits.device) for table in (self._tokens_MC, self._nodes_MC))
        best = logits.gather(-1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf).max(dim=-1, keepdim=True)
        token, node = (table.gather(-1, best.indices)[..., 0] for table in (tokens, following))
        return (best.values[..., 0] - logits.logsumexp(dim=-1)).exp(), token, node.cpu()


@torch.inference_mode()
def class_log_probs(model: Model, images: Tensor, vocabulary: Vocabulary, *, prompt: Sequence[int]) -> Tensor:
    """float32 [B, C], the natural logarithm of each class's probability: the sum of its names'.

    Names exclude each other, as each ends with its delimiter, so their probabilities add up.

    Args:
        model: in evaluation mode.
        images: uint8 [B, 3, S, S], or normalised floating point.
        prompt: BOS and prompt token ids.
    """
    log_probs_BS = name_log_probs(model, images, vocabulary, prompt=prompt)
    log_probs_BP = log_probs_BS[:, vocabulary.names_P.to(log_probs_BS.device)]
    owners_BP = vocabulary.owners_P.to(log_probs_BS.device).expand(len(images), -1)
    sums_BC = log_probs_BS.new_zeros(len(images), len(vocabulary.classes))
    best_BC = torch.full_like(sums_BC, -torch.inf).scatter_reduce_(1, owners_BP, log_probs_BP, "amax")
    shifted_BP = (log_probs_BP - best_BC.gather(1, owners_BP)).exp()
    return sums_BC.scatter_add_(1, owners_BP, shifted_BP).log() + best_BC


@torch.inference_mode()
def name_log_probs(model: Model, images: Tensor, vocabulary: Vocabulary, *, prompt: Sequence[int]) -> Tensor:
    """The same of each name: float32 [B, S], in the order of ``vocabulary.sequences``."""
    tree, delimiter = vocabulary.tree, vocabulary.delimiter
    first_BV, cache = model.prefill(images, prompt)
    first_BV = first_BV.log_softmax(dim=-1)
    device, batch = first_BV.device, len(images)
    prefix = model.num_image_tokens + 1 + len(prompt)
    tokens, parents, depths, last = (t.to(device) for t in (tree.tokens_M, tree.parents_M, tree.depths_M, tree.ends_S))
    path_BM = first_BV.new_empty(batch, len(tree))  # first each node's own, given what stands before it
    ends_BM = first_BV.new_empty(batch, len(tree))  # its delimiter's behind it
    path_BM[:, depths == 0] = first_BV[:, tokens[depths == 0]]

    decoder = model.decoder
    block = max(1, _LOGITS // (batch * decoder.vocab_size))
    for begin, end in tree.rows(_ROW):
        paths = tree.ancestors(begin, end).to(device)
        mask = torch.cat([paths.new_ones(end - begin, prefix), paths], dim=1)[None, None]
        embedded = decoder.embed(tokens[begin:end].expand(batch, -1))
        hidden_BmD = decoder(embedded, prefix + depths[begin:end][None], mask, cache)
        cache.crop(begin - end)
        for low in range(begin, end, block):
            high = min(low + block, end)
            logits = decoder.logits(hidden_BmD[:, low - begin : high - begin])
            log_z = logits.logsumexp(dim=-1)
            ends_BM[:, low:high] = logits[..., delimiter] - log_z
            children = torch.nonzero((parents >= low) & (parents < high))[:, 0]
            behind = parents[children] - low
            path_BM[:, children] = logits[:, behind, tokens[children]] - log_z[:, behind]

    for depth in range(1, int(tree.depths_M.max()) + 1):
        nodes = torch.nonzero(depths == depth)[:, 0]
        path_BM[:, nodes] += path_BM[:, parents[nodes]]
    return (path_BM + ends_BM)[:, last]
