"""Greedy and beam search: one text per image, its labels separated by delimiters (paper, section 4.4, table 5).

The objective ``published`` trains such text: positions continue from label to label, and a label's first token is
predicted at the previous delimiter. As in training, tokens attend to what ``model.attention`` lets them see, by default
the prefix and their own label only; ``published: true`` reproduces what the published code does instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nxtp.model.attention_rule import attention_mask
from nxtp.model.model import Model
from nxtp.sampling.label_probability import Label, Samples
from nxtp.sampling.one_shot import SamplerConfig

if TYPE_CHECKING:
    from transformers import DynamicCache, LogitsProcessorList


@dataclass(kw_only=True)
class AutoregressiveConfig(SamplerConfig):
    """
    ``max_new_tokens``      tokens generated per image, delimiters included
    ``max_tokens``          a longer label is cut to this many tokens when the text is split
    ``repetition_penalty``  logits of tokens already generated are divided by it (multiplied where negative); 1: none
    ``published``           the published code's attention, penalty and probabilities
    """

    max_new_tokens: int = field(default=64, metadata={"≥": 1})
    repetition_penalty: float = field(default=1.0, metadata={">": 0})
    published: bool = False


@dataclass(kw_only=True)
class GreedyConfig(AutoregressiveConfig):
    """
    ``temperature``  0 takes the likeliest token; above 0 tokens are drawn, with logits divided by it
    ``top_k``        draw among this many likeliest tokens; null: all
    ``top_p``        draw among the likeliest tokens that together have this probability; null: all
    ``seed``         of the draws; a batch shares one generator, so another batch size gives other texts
    """

    temperature: float = field(default=0.0, metadata={"≥": 0})
    top_k: int | None = field(default=None, metadata={"≥": 1})
    top_p: float | None = field(default=None, metadata={">": 0, "≤": 1})
    seed: int = 0


@dataclass(kw_only=True)
class BeamConfig(AutoregressiveConfig):
    """
    ``num_beams``       hypotheses per image
    ``patience``        the search ends when patience · num_beams texts have ended with EOS
    ``length_penalty``  a text's log-probability is divided by its length to this power
    """

    num_beams: int = field(default=3, metadata={"≥": 1})
    patience: float = field(default=1.0, metadata={">": 0})
    length_penalty: float = 1.0


@torch.inference_mode()
def greedy(
    model: Model,
    images: Tensor,
    config: GreedyConfig,
    *,
    prompt: Sequence[int],
    delimiter: int,
    never_first: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Generate token after token: the likeliest one, or drawn. Arguments as in :func:`nxtp.sampling.one_shot.one_shot`;
    published mode ignores ``never_first``.

    Returns:
        tokens int64 [B, T] and the model's own probability of each, float32 [B, T]; in published mode the probability
        after penalty and temperature.
    """
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    logits_BV, cache = model.prefill(images, prompt)
    prefix = model.num_image_tokens + 1 + len(prompt)
    tokens_BT = torch.empty(len(images), 0, dtype=torch.long, device=logits_BV.device)
    probs_BT = torch.empty(len(images), 0, device=logits_BV.device)
    generator = torch.Generator(logits_BV.device).manual_seed(config.seed)
    process = _penalty_and_temperature(config)
    process += _label_starts(config, delimiter, never_first)
    warp = LogitsProcessorList()  # top_p first: it applies to the whole distribution, as top_k does
    if config.top_p is not None:
        warp.append(TopPLogitsWarper(config.top_p))
    if config.top_k is not None:
        warp.append(TopKLogitsWarper(config.top_k))
    for step in range(config.max_new_tokens):
        own_BV = logits_BV
        logits_BV = process(tokens_BT, logits_BV)
        if config.temperature > 0:
            token_B1 = torch.multinomial(warp(tokens_BT, logits_BV).softmax(dim=-1), 1, generator=generator)
        else:
            token_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        reported_BV = (logits_BV if config.published else own_BV).softmax(dim=-1)
        probs_BT = torch.cat([probs_BT, reported_BV.gather(1, token_B1)], dim=1)
        tokens_BT = torch.cat([tokens_BT, token_B1], dim=1)
        if step + 1 < config.max_new_tokens:
            logits_BV = _next_logits(model, cache, tokens_BT, prefix, delimiter, config)
    return tokens_BT, probs_BT


@torch.inference_mode()
def beam(
    model: Model,
    images: Tensor,
    config: BeamConfig,
    *,
    prompt: Sequence[int],
    delimiter: int,
    eos: int | None = None,
    never_first: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Beam search: the text with the highest log-probability divided by length.

    Args:
        eos: the id that ends a text early; None: every text has ``max_new_tokens`` tokens.

    Returns:
        tokens int64 [B, T] and their probabilities float32 [B, T]; a text that ended early is padded with delimiters
        of probability 1.
    """
    width = config.num_beams
    first_BV, cache = model.prefill(images, prompt)
    prefix = model.num_image_tokens + 1 + len(prompt)
    batch, vocabulary = first_BV.shape
    device = first_BV.device
    cache.batch_repeat_interleave(width)
    logits_RV = first_BV.repeat_interleave(width, dim=0)  # R = B · num_beams rows
    tokens_RT = torch.empty(batch * width, 0, dtype=torch.long, device=device)
    probs_RT = torch.empty(batch * width, 0, device=device)
    scores_BW = torch.full((batch, width), -torch.inf, device=device)
    scores_BW[:, 0] = 0.0  # all beams start equal: only one may branch
    process = _penalty_and_temperature(config)
    # A text may end where a label would start, so EOS is not suppressed there.
    starts = _label_starts(config, delimiter, [i for i in never_first if i != eos])
    ended: list[list[tuple[float, Tensor, Tensor]]] = [[] for _ in range(batch)]
    searching = set(range(batch))  # images whose search continues; the others are computed too, but do not change
    for step in range(config.max_new_tokens):
        log_p_RV = starts(tokens_RT, process(tokens_RT, logits_RV).log_softmax(dim=-1))
        total_BWV = scores_BW[..., None] + log_p_RV.view(batch, width, vocabulary)
        # Twice as many candidates as beams: even if every beam ends here, as many continue.
        scores_BC, flat_BC = total_BWV.flatten(1).topk(min(2 * width, width * vocabulary), dim=-1)
        parent_BC, token_BC = flat_BC // vocabulary, flat_BC % vocabulary
        row_BC = parent_BC + width * torch.arange(batch, device=device)[:, None]
        prob_BC = log_p_RV[row_BC, token_BC].exp()
        ends_BC = token_BC == eos if eos is not None else torch.zeros_like(token_BC, dtype=torch.bool)
        normaliser = (step + 1) ** config.length_penalty
        for image, candidate in ends_BC.nonzero().tolist():
            score, row = scores_BC[image, candidate].item(), row_BC[image, candidate]
            if image in searching and candidate < width and score > -torch.inf:
                ended[image].append((score / normaliser, tokens_RT[row], probs_RT[row]))
        keep_BW = ends_BC.int().argsort(dim=1, stable=True)[:, :width]  # the best that continue
        scores_BW = scores_BC.gather(1, keep_BW)
        rows_R = row_BC.gather(1, keep_BW).flatten()
        tokens_RT = torch.cat([tokens_RT[rows_R], token_BC.gather(1, keep_BW).view(-1, 1)], dim=1)
        probs_RT = torch.cat([probs_RT[rows_R], prob_BC.gather(1, keep_BW).view(-1, 1)], dim=1)
        is_last = step + 1 == config.max_new_tokens
        for image in [i for i in searching if is_last or len(ended[i]) >= config.patience * width]:
            searching.remove(image)
            best = image * width  # of the unfinished texts
            ended[image].append((scores_BW[image, 0].item() / normaliser, tokens_RT[best], probs_RT[best]))
        if not searching:
            break
        cache.batch_select_indices(rows_R)
        logits_RV = _next_logits(model, cache, tokens_RT, prefix, delimiter, config, causal=config.published)
    length = tokens_RT.shape[1]
    tokens_BT = torch.full((batch, length), delimiter, device=device)
    probs_BT = torch.ones(batch, length, device=device)
    for image in range(batch):
        _, tokens, probs = max(ended[image], key=lambda text: text[0])
        tokens_BT[image, : len(tokens)], probs_BT[image, : len(probs)] = tokens, probs
    return tokens_BT, probs_BT


def _next_logits(
    model: Model,
    cache: DynamicCache,
    tokens_RT: Tensor,
    prefix: int,
    delimiter: int,
    config: AutoregressiveConfig,
    causal: bool = False,
) -> Tensor:
    """Logits [R, V] of the token after the last one; the cache holds all tokens before the last."""
    rows, length = tokens_RT.shape
    start = length - 1
    if causal:
        mask = torch.ones(1, 1, 1, prefix + length, dtype=torch.bool, device=tokens_RT.device)
    elif config.published:
        # This mask changes what earlier tokens saw: compute the text again, keep the prefix only.
        if cache.get_seq_length() > prefix:
            cache.crop(prefix - cache.get_seq_length())
        mask = published_text_mask(tokens_RT, prefix, delimiter)
        start = 0
    else:
        is_end_RT = (tokens_RT == delimiter).int()
        segments_RT = 1 + is_end_RT.cumsum(dim=1) - is_end_RT  # a delimiter belongs to the label that it ends
        segments_RT = torch.cat([segments_RT.new_zeros(rows, prefix), segments_RT], dim=1)
        mask = attention_mask(segments_RT, model.num_image_tokens, model.config.attention, prefix + start)
    positions = torch.arange(prefix + start, prefix + length, device=tokens_RT.device)[None]
    hidden = model.decoder(model.decoder.embed(tokens_RT[:, start:]), positions, mask, cache)
    return model.decoder.logits(hidden[:, -1])


def published_text_mask(tokens_RT: Tensor, prefix: int, delimiter: int) -> Tensor:
    """The published greedy mask of a whole text behind its prefix: bool [R, 1, T, P + T].

    Once delimiter n + 1 is generated, no token after delimiter n sees the range from the last prompt token to
    delimiter n. So an unfinished label sees the label before it, and a finished one also loses the prompt's end.
    """
    rows, length = tokens_RT.shape
    index_T = torch.arange(length, device=tokens_RT.device)
    is_end_RT = tokens_RT == delimiter
    latest_R = torch.where(is_end_RT, index_T, -1).amax(dim=1)
    counted_RT = is_end_RT & (index_T < latest_R[:, None])  # every delimiter but the latest
    last_RT = torch.where(counted_RT, index_T, -1).cummax(dim=1).values
    before_RT = torch.cat([last_RT.new_full((rows, 1), -1), last_RT[:, :-1]], dim=1)  # strictly before the token
    column = torch.arange(-prefix, length, device=tokens_RT.device)
    hidden_RTC = (before_RT[..., None] >= 0) & (column >= -1) & (column <= before_RT[..., None])
    return ((column <= index_T[:, None]) & ~hidden_RTC)[:, None]


def _penalty_and_temperature(config: AutoregressiveConfig) -> LogitsProcessorList:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

    def published_penalty(tokens_RT: Tensor, logits_RV: Tensor) -> Tensor:
        """Divides negative logits too, which raises their probability."""
        return logits_RV.scatter(1, tokens_RT, logits_RV.gather(1, tokens_RT) / config.repetition_penalty)

    process = LogitsProcessorList()
    if config.published and config.repetition_penalty != 1.0:
        process.append(published_penalty)
    elif config.repetition_penalty != 1.0:
        process.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
    if config.temperature > 0:
        process.append(TemperatureLogitsWarper(float(config.temperature)))
    return process


def _label_starts(config: AutoregressiveConfig, delimiter: int, never_first: Sequence[int]) -> LogitsProcessorList:
    """-inf for ``never_first`` where a label starts: at the beginning and behind a delimiter."""
    from transformers import LogitsProcessorList

    def suppress(tokens_RT: Tensor, logits_RV: Tensor) -> Tensor:
        ids = torch.tensor(never_first, device=logits_RV.device)
        previous_R = tokens_RT[:, -1] if tokens_RT.shape[1] else tokens_RT.new_full((len(tokens_RT),), delimiter)
        return torch.where((previous_R == delimiter)[:, None], logits_RV.index_fill(1, ids, -torch.inf), logits_RV)

    return LogitsProcessorList([] if config.published or not never_first else [suppress])


def split_labels(tokens_BT: Tensor, probs_BT: Tensor, delimiter: int, max_tokens: int) -> Samples:
    """Autoregressive texts → labels in the order of generation; an unfinished last label counts as cut.

    Empty labels have length 0; images with fewer labels are padded with them.
    """
    result: list[list[Label]] = []
    for tokens, probs in zip(tokens_BT.tolist(), probs_BT.tolist(), strict=True):
        labels: list[Label] = []
        begin = 0
        for end in [i for i, token in enumerate(tokens) if token == delimiter] + [len(tokens)]:
            cap = begin + max_tokens  # the delimiter's probability does not count for a cut label
            if end > begin:
                labels.append((tokens[begin : min(end, cap)], probs[begin : min(end + 1, cap)]))
            begin = end + 1
        result.append(labels or [((), ())])
    samples = Samples.of(result, delimiter, tokens_BT.device)
    samples.disjoint = False
    return samples
