"""The model: encoder + projection + decoder → loss, first-token logits, cached steps. Mathematics only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nxtp.errors import UserError, one_of
from nxtp.model.attention_rule import ATTENTION, attention_mask
from nxtp.model.decoder import Decoder, DecoderConfig
from nxtp.model.encoder import Encoder, EncoderConfig
from nxtp.model.layout import Layout
from nxtp.model.tokenizer import PROMPT

if TYPE_CHECKING:
    from transformers import DynamicCache


LOGITS = 2**28  # float32, 1 GiB: a loss of more logits is computed in parts, which the backward pass recomputes


@dataclass
class ModelConfig:
    """Everything needed to rebuild a model. Plain data, so an untrusted configuration runs no code.

    ``prompt``      the text between ``<|image|>`` and the labels, in evaluation and inference
    ``tokenizer``   directory or Hub name; null takes the decoder source's, or trains one if there is no source
    ``vocab_size``  of a tokenizer that is trained: at most this many rows
    ``pool``        add the mean image token to the last prompt token, where labels begin: a decoder at random learns
                    faster what the image shows (experiments/baselines)
    ``attention``   which tokens see which: :mod:`nxtp.model.attention_rule`
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    prompt: str = PROMPT
    tokenizer: str | None = None
    vocab_size: int = 2048
    pool: bool = False
    attention: str = "independent"

    def __post_init__(self) -> None:
        one_of("model.attention", self.attention, ATTENTION)


@dataclass
class Loss:
    """Of a batch's supervised tokens, so that ranks and accumulated batches can be averaged over all their tokens.

    ``nll_S``   float32 [S], the negative log-likelihood of each supervised pair, natural logarithm
    """

    nll_S: Tensor

    @property
    def total(self) -> Tensor:
        return self.nll_S.sum()

    @property
    def count(self) -> int:
        return self.nll_S.numel()

    @property
    def mean(self) -> Tensor:
        return self.nll_S.mean()


class Model(nn.Module):
    """Image tokens as the prefix of a truncated language model (paper, section 3).

    The embedding of ``<|image|>`` is a parameter of its own: it trains whether or not the vocabulary's embedding does,
    and the tokenizer needs no such token. ``load_pretrained`` and ``deferred`` are those of :class:`Decoder`.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int | None = None,
        load_pretrained: bool = True,
        deferred: bool = False,
    ):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, load_pretrained)
        self.decoder = Decoder(config.decoder, vocab_size, load_pretrained, deferred)
        if (window := self.decoder.window) is not None and window <= self.num_image_tokens:
            raise UserError(
                f"model.decoder looks back {window} tokens at most and model.encoder gives {self.num_image_tokens}: "
                "use smaller images, or another encoder or decoder."
            )
        self.projection = nn.Linear(self.encoder.width, self.decoder.width, bias=False)
        nn.init.normal_(self.projection.weight, std=self.encoder.width**-0.5)
        self.image_token = nn.Parameter(torch.empty(self.decoder.width).normal_(std=0.02))

    @property
    def num_image_tokens(self) -> int:
        return self.encoder.num_tokens

    def forward(self, images: Tensor, layout: Layout) -> Loss:
        """Training and validation loss.

        Args:
            images: uint8 [B, 3, S, S], or normalised floating point.
            layout: the batch's sequences. Only its supervised positions go through the output layer.
        """
        return self._loss(self.hidden(images, layout), layout)

    def _loss(self, hidden_BTD: Tensor, layout: Layout) -> Loss:
        hidden_RD = hidden_BTD.flatten(0, 1)[layout.sources]
        rows = max(LOGITS // self.decoder.vocab_size, 1)
        if len(hidden_RD) <= rows:
            return Loss(self._nll(hidden_RD, layout.pairs_S, layout.targets_S))
        nll_S = torch.zeros(len(layout.pairs_S), device=hidden_RD.device)
        for start in range(0, len(hidden_RD), rows):
            arguments = hidden_RD[start : start + rows], layout.pairs_S - start, layout.targets_S
            nll_S = nll_S + checkpoint(self._nll, *arguments, use_reentrant=False, preserve_rng_state=False)
        return Loss(nll_S)

    def _nll(self, hidden_RD: Tensor, pairs_S: Tensor, targets_S: Tensor) -> Tensor:
        """Negative log-likelihood of the pairs whose row is one of ``hidden_RD``'s, 0 of the others; float32 [S]."""
        logits = self.decoder.logits(hidden_RD)
        rows_S = pairs_S.clamp(0, len(hidden_RD) - 1)
        return (logits.logsumexp(dim=-1)[rows_S] - logits[rows_S, targets_S]).where(rows_S == pairs_S, 0.0)

    def evaluate(
        self, images: Tensor, layout: Layout, prompt: Sequence[int]
    ) -> tuple[Loss, tuple[Tensor, DynamicCache]]:
        """Loss and prefix of a batch, its prefix computed once.

        Args:
            images: as in :meth:`forward`.
            layout: the batch's sequences, each with this prompt.
            prompt: BOS and prompt token ids.

        Returns:
            what :meth:`forward` returns, and what :meth:`prefill` returns.
        """
        hidden_BPD, cache = self._run_prefix(images, prompt)
        labels_BL, after = layout.tokens_BU[:, len(prompt) :], slice(hidden_BPD.shape[1], None)
        arguments = layout.positions_BT[:, after], layout.mask(self.config.attention)[:, :, after], cache
        hidden_BLD = self.decoder(self.decoder.embed(labels_BL), *arguments)
        cache.crop(-labels_BL.shape[1])
        loss = self._loss(torch.cat([hidden_BPD, hidden_BLD], dim=1), layout)
        return loss, (self.decoder.logits(hidden_BPD[:, -1]), cache)

    def hidden(self, images: Tensor, layout: Layout) -> Tensor:
        """Hidden states of whole sequences, [B, T, D]."""
        embeddings = self.embed(self.encode(images), layout.tokens_BU, layout.num_prompt_tokens)
        return self.decoder(embeddings, layout.positions_BT, layout.mask(self.config.attention))

    def encode(self, images: Tensor) -> Tensor:
        """Images → image tokens in the decoder's space, [B, N, D]."""
        return self.projection(self.encoder(images))

    def embed(self, image_tokens_BND: Tensor, tokens_BU: Tensor, num_prompt_tokens: int) -> Tensor:
        """image tokens · ``<|image|>`` · text, which begins with BOS and prompt, [B, N + 1 + U, D]."""
        embeddings = torch.cat([self.marked(image_tokens_BND), self.decoder.embed(tokens_BU)], dim=1)
        if self.config.pool:
            embeddings[:, image_tokens_BND.shape[1] + num_prompt_tokens] += image_tokens_BND.mean(dim=1)
        return embeddings

    def marked(self, image_tokens_BND: Tensor) -> Tensor:
        """image tokens · ``<|image|>``, [B, N + 1, D]."""
        marker = self.image_token.to(image_tokens_BND.dtype).expand(image_tokens_BND.shape[0], 1, -1)
        return torch.cat([image_tokens_BND, marker], dim=1)

    def prefill(self, images: Tensor, prompt: Sequence[int]) -> tuple[Tensor, DynamicCache]:
        """Run the prefix once.

        Args:
            images: as in :meth:`forward`.
            prompt: BOS and prompt token ids.

        Returns:
            logits of the first token of a label, float32 [B, V], and the prefix's keys and values.
        """
        hidden_BPD, cache = self._run_prefix(images, prompt)
        return self.decoder.logits(hidden_BPD[:, -1]), cache

    def _run_prefix(self, images: Tensor, prompt: Sequence[int]) -> tuple[Tensor, DynamicCache]:
        """Hidden states of the prefix, [B, P, D], and its keys and values."""
        from transformers import DynamicCache

        cache = DynamicCache()  # by a configuration it would drop what is beyond a sliding window
        return self.decoder(*self._prefix(images, prompt), cache), cache

    def prefix_attention(self, images: Tensor, prompt: Sequence[int]) -> list[Tensor]:
        """Attention weights of every decoder block in the prefix, each [B, H, P, P]; arguments: :meth:`prefill`."""
        return self.decoder.attention(*self._prefix(images, prompt))[1]

    def _prefix(self, images: Tensor, prompt: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, P, D], positions [1, P] and mask [1, 1, P, P] of image tokens · ``<|image|>`` · prompt."""
        image_tokens = self.encode(images)
        batch, count, _ = image_tokens.shape
        device = image_tokens.device
        embeddings = self.embed(image_tokens, torch.tensor(prompt, device=device).expand(batch, -1), len(prompt))
        length = embeddings.shape[1]
        segments = torch.zeros(1, length, dtype=torch.long, device=device)
        mask = attention_mask(segments, count, self.config.attention)
        return embeddings, torch.arange(length, device=device)[None], mask

    def step(self, tokens_BK: Tensor, position: int, mask: Tensor, cache: DynamicCache) -> Tensor:
        """One token for each of K branches behind the cache, all at the same ``position``: logits [B, K, V]."""
        positions = torch.full((1, tokens_BK.shape[1]), position, device=tokens_BK.device)
        return self.decoder.logits(self.decoder(self.decoder.embed(tokens_BK), positions, mask, cache))
