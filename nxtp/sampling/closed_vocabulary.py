"""A closed vocabulary: the probability of every class, all in one pass over the prefix tree of their names' tokens.

    prefix · every node of the tree, one row       a node attends to the prefix, its ancestors and itself

This is :mod:`nxtp.model.attention_rule`, each name a segment; names that begin alike share their first nodes. The
probability of a name is the product of its tokens' and its delimiter's, over the whole vocabulary of the language
model: it does not depend on the other classes, and the classes do not add up to 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nxtp.data.labels.cleaning import normalise, read_lines
from nxtp.data.labels.imagenet import NAMES, imagenet_classes, subset
from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.model.tokenizer import LabelTokenizer

IMAGENET = "imagenet1k"
_ROW = 4096  # nodes computed together, about
_LOGITS = 1 << 26  # numbers of a block of logits: 256 MB

Classes = Sequence[str | Sequence[str]]


def read_classes(source: str | Path) -> list[list[str]]:
    """Classes of a file, one per line, names of a class separated by commas; or ``imagenet1k`` (all synonyms),
    ``imagenet1k:first``, ``imagenet1k:clip``; or ``imagenet1k:a`` and ``:r``, the 200 of ImageNet-A and -R.

    Raises:
        UserError: no such file, not text, no class in it, or two of one label.
    """
    name, _, which = str(source).partition(":")
    if name == IMAGENET and not Path(source).exists():
        if which in ("a", "r"):
            return [c.labels() for c in imagenet_classes() if c.index in subset(f"imagenet_{which}")]
        return [c.labels(which or NAMES[0]) for c in imagenet_classes()]
    advice = f"Give a file with one class per line, or {IMAGENET}."
    classes = classes_of_lines(read_lines(source, f"Classes in '{source}'", advice), f"'{source}'")
    if not classes:
        raise UserError(f"'{source}' contains no class: write one per line, its names separated by commas.")
    return classes


def classes_of_lines(lines: Iterable[str], source: str) -> list[list[str]]:
    """Classes, one per line, names of a class separated by commas; empty lines are skipped.

    Other names may be shared (:class:`Vocabulary`); the first is a class's label, which must tell it apart.

    Raises:
        UserError: two classes have the same label, once normalised; ``source`` says where.
    """
    classes = ([name.strip() for name in line.split(",") if name.strip()] for line in lines)
    found: dict[str, tuple[int, list[str]]] = {}
    for number, names in enumerate(classes, start=1):
        if names:
            place, same = found.setdefault(normalise(names[0]), (number, names))
            if place != number:
                raise UserError(f"{source}: '{same[0]}' (line {place}) and '{names[0]}' (line {number}) are one label. "
                                "Write them in one line, or begin one with another name.")  # fmt: skip
    return [names for _, names in found.values()]


@dataclass
class Tree:
    """Distinct beginnings of token sequences; a node comes after its parent.

    ``tokens_M``   int64, a node's token
    ``parents_M``  int64, its parent's index, or -1 for a sequence's first token
    ``depths_M``   int64, 0 for a sequence's first token
    ``ends_S``     int64, the last node of each sequence
    """

    tokens_M: Tensor
    parents_M: Tensor
    depths_M: Tensor
    ends_S: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Tree:
        """Nodes in order of first tokens, so that sequences that begin alike are adjacent."""
        nodes: dict[tuple[int, ...], int] = {}
        for sequence in sorted(map(tuple, sequences)):
            for length in range(1, len(sequence) + 1):
                nodes.setdefault(sequence[:length], len(nodes))
        tokens = [path[-1] for path in nodes]
        parents = [nodes.get(path[:-1], -1) for path in nodes]
        depths = [len(path) - 1 for path in nodes]
        ends = [nodes[tuple(sequence)] for sequence in sequences]
        return cls(*(torch.tensor(values, dtype=torch.long) for values in (tokens, parents, depths, ends)))

    def __len__(self) -> int:
        return len(self.tokens_M)

    @property
    def roots(self) -> Tensor:
        return torch.nonzero(self.depths_M == 0)[:, 0]

    def rows(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of about ``size`` nodes; sequences that begin alike stay in one range."""
        begin = 0
        for here, following in pairwise([*self.roots.tolist(), len(self)]):
            if following - begin > size and here > begin:
                yield begin, here
                begin = here
        if begin < len(self):
            yield begin, len(self)

    def ancestors(self, begin: int, end: int) -> Tensor:
        """bool [m, m] for a range of :meth:`rows`: the path to each node, the node included."""
        paths = torch.eye(end - begin, dtype=torch.bool)
        parents, depths = self.parents_M[begin:end] - begin, self.depths_M[begin:end]
        for depth in range(1, int(depths.max()) + 1):
            nodes = torch.nonzero(depths == depth)[:, 0]
            paths[nodes] |= paths[parents[nodes]]
        return paths


class Vocabulary:
    """Classes as token sequences of one tokenizer.

    A name that several classes share counts for each of them.

    Args:
        classes: each a label, or several names of one thing; the first name is the class's label.

    Raises:
        UserError: no class, a class without names, or a name without tokens.
    """

    def __init__(self, classes: Classes, tokenizer: LabelTokenizer):
        self.classes = [[names] if isinstance(names, str) else list(names) for names in classes]
        if not self.classes or not all(self.classes):
            raise UserError("A closed vocabulary needs at least one class, and each class a name.")
        known: dict[tuple[int, ...], int] = {}
        members: list[Tensor] = []  # of each class the distinct sequences of its names
        for names in self.classes:
            sequences = dict(zip(tokenizer.encode_labels(names), names, strict=True))
            if () in sequences:
                raise UserError(f"The class name '{sequences[()]}' has no tokens.")
            members.append(torch.tensor([known.setdefault(ids, len(known)) for ids in sequences]))
        self.sequences = list(known)
        self.names_CN = pad_sequence(members, batch_first=True, padding_value=-1)
        self.delimiter = tokenizer.delimiter_id

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same names in the same order."""
        return f"sha256:{hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()[:16]}"

    @cached_property
    def tree(self) -> Tree:
        return Tree.of(self.sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest name, without its delimiter."""
        return int(self.tree.depths_M.max()) + 1

    @cached_property
    def node_of_first(self) -> dict[int, int]:
        """First tokens of names, and their nodes in the tree."""
        return dict(zip(self.tree.tokens_M[self.tree.roots].tolist(), self.tree.roots.tolist(), strict=True))

    @cached_property
    def _continuations_MC(self) -> tuple[Tensor, Tensor]:
        """Of each node the tokens that may follow, and the nodes that they lead to; padded with -1."""
        pairs: list[list[tuple[int, int]]] = [[] for _ in range(len(self.tree))]
        parents = self.tree.parents_M.tolist()
        for node, (token, parent) in enumerate(zip(self.tree.tokens_M.tolist(), parents, strict=True)):
            if parent >= 0:
                pairs[parent].append((token, node))
        for node in set(self.tree.ends_S.tolist()):
            pairs[node].append((self.delimiter, node))
        tokens_MC, nodes_MC = pad_sequence(list(map(torch.tensor, pairs)), True, padding_value=-1).unbind(dim=-1)
        return tokens_MC, nodes_MC

    def start(self, tokens: Tensor) -> Tensor:
        """The nodes of first tokens, on the CPU."""
        return torch.tensor([self.node_of_first[token] for token in tokens.flatten().tolist()]).view(tokens.shape)

    def likeliest(self, logits: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Likeliest continuation of ``nodes`` [...] by logits [..., V]: probability among all tokens, token, node."""
        tokens, following = (table[nodes.cpu()].to(logits.device) for table in self._continuations_MC)
        best = logits.gather(-1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf).max(dim=-1, keepdim=True)
        token, node = (table.gather(-1, best.indices)[..., 0] for table in (tokens, following))
        return (best.values[..., 0] - logits.logsumexp(dim=-1)).exp(), token, node.cpu()


@torch.inference_mode()
def class_log_probs(model: Model, images: Tensor, vocabulary: Vocabulary, *, prompt: Sequence[int]) -> Tensor:
    """float32 [B, C], the natural logarithm of each class's probability: the sum over its names.

    Each name ends with its delimiter, so names exclude each other and their probabilities add up.

    Args:
        model: in evaluation mode.
        images: uint8 [B, 3, S, S], or normalised floating point.
        prompt: BOS and prompt token ids.
    """
    log_probs_BS = name_log_probs(model, images, vocabulary, prompt=prompt)
    names_CN = vocabulary.names_CN.to(log_probs_BS.device)
    return log_probs_BS[:, names_CN].masked_fill(names_CN < 0, -torch.inf).logsumexp(dim=-1)


@torch.inference_mode()
def name_log_probs(model: Model, images: Tensor, vocabulary: Vocabulary, *, prompt: Sequence[int]) -> Tensor:
    """float32 [B, S], the natural logarithm of the probability of each of ``vocabulary.sequences``."""
    tree, delimiter = vocabulary.tree, vocabulary.delimiter
    first_BV, cache = model.prefill(images, prompt)
    first_BV = first_BV.log_softmax(dim=-1)
    device, batch = first_BV.device, len(images)
    prefix = model.num_image_tokens + 1 + len(prompt)
    tokens, parents, depths, last = (t.to(device) for t in (tree.tokens_M, tree.parents_M, tree.depths_M, tree.ends_S))
    path_BM = first_BV.new_empty(batch, len(tree))  # first each node's own, then with its ancestors'
    ends_BM = first_BV.new_empty(batch, len(tree))  # of the delimiter behind each node
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

    for depth in range(1, vocabulary.longest):
        nodes = torch.nonzero(depths == depth)[:, 0]
        path_BM[:, nodes] += path_BM[:, parents[nodes]]
    return (path_BM + ends_BM)[:, last]
