"""Sampled labels and their probabilities: of each token, and of a label, which is the product of its tokens'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Label = tuple[Sequence[int], Sequence[float]]  # token ids without the delimiter, and probabilities with the delimiter's


@dataclass
class Samples:
    """K labels per image, in order of their first token's probability.

    ``tokens_BKL``   int64, the label's tokens and its delimiter, padded with the delimiter
    ``probs_BKL``    float32, the probability of each token given the prefix and the label so far; 1 in the padding
    ``lengths_BK``   int64, tokens of the label without its delimiter; 0 pads images that have fewer labels
    ``cut_BK``       bool, True: the label was cut, and its delimiter's probability does not count
    ``disjoint``     whether an image's labels exclude each other, so that the probabilities of equal texts add up;
                     not so in autoregressive text, which may repeat a label
    ``complete_B``   bool, exact search only: whether these labels are proven to be the most probable ones
    """

    tokens_BKL: Tensor
    probs_BKL: Tensor
    lengths_BK: Tensor
    cut_BK: Tensor
    disjoint: bool = True
    complete_B: Tensor | None = None

    @classmethod
    def of(cls, labels: Sequence[Sequence[Label]], delimiter: int, device: torch.device | None = None) -> Samples:
        """Samples of each image's labels."""
        count = max((len(image) for image in labels), default=0)
        longest = max((len(tokens) for image in labels for tokens, _ in image), default=0) + 1
        tokens_BKL = torch.full((len(labels), count, longest), delimiter, device=device)
        probs_BKL = torch.ones(len(labels), count, longest, device=device)
        lengths_BK = torch.zeros(len(labels), count, dtype=torch.long, device=device)
        cut_BK = torch.zeros(len(labels), count, dtype=torch.bool, device=device)
        for b, image in enumerate(labels):
            for k, (tokens, probs) in enumerate(image):
                tokens_BKL[b, k, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
                probs_BKL[b, k, : len(probs)] = torch.tensor(probs)
                lengths_BK[b, k] = len(tokens)
                cut_BK[b, k] = len(tokens) == len(probs) > 0
        return cls(tokens_BKL, probs_BKL, lengths_BK, cut_BK)

    @classmethod
    def grown(cls, tokens_BKL: Tensor, probs_BKL: Tensor, delimiter: int) -> Samples:
        """Of labels that grew column by column; the last column has delimiters only. Cut to the longest label."""
        lengths_BK = (tokens_BKL == delimiter).int().argmax(dim=-1)
        longest = int(lengths_BK.max()) + 1 if lengths_BK.numel() else 0
        cut_BK = lengths_BK == tokens_BKL.shape[-1] - 1
        return cls(tokens_BKL[..., :longest], probs_BKL[..., :longest], lengths_BK, cut_BK)

    @property
    def label_probs_BK(self) -> Tensor:
        """Probability of each label: the product of its tokens', delimiter included."""
        return self.probs_BKL.prod(dim=-1)
