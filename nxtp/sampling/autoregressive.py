"""Greedy and beam search: one running text a image, labels and delimiters end to end (paper, section 4.4, table 5).

Text like this is what the objective ``published`` trains: positions run on from label to label, and the first token
of a label is predicted at the delimiter of the label before. By default a label's tokens attend to the prefix and to
their own label only (:func:`nxtp.model.layout.attention_mask`), as in training; ``published`` reproduces what the published
code does instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from nxtp.errors import UserError, at_least
from nxtp.model.model import Model
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS, Samples


@dataclass
class RunningTextConfig:
    """
    ``max_new_tokens``          tokens written an image, delimiters included
    ``max_tokens``          a label longer than this is cut to it when the text is split
    ``repetition_penalty``  logits of tokens already written are divided by it (multiplied where negative); 1: none
    ``published``           the published code's attention, penalty and probabilities
    """

    max_new_tokens: int = 64
    max_tokens: int = MAX_LABEL_TOKENS
    repetition_penalty: float = 1.0
    published: bool = False

    def __post_init__(self):
        at_least("sampler.max_new_tokens", self.max_new_tokens, 1)
        at_least("sampler.max_tokens", self.max_tokens, 1)
        if self.repetition_penalty <= 0:
            raise UserError(f"sampler.repetition_penalty is {self.repetition_penalty}: above 0, please (1: none).")


@dataclass
class GreedyConfig(RunningTextConfig):
    """
    ``temperature``  0 takes the likeliest token; above it tokens are drawn, logits divided by it first
    ``top_k``   draw among this many likeliest tokens; null: all
    ``top_p``   draw among the likeliest tokens that together hold this probability; null: all
    ``seed``         of the drawing; a batch is drawn together, so other batches draw other texts
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        at_least("sampler.temperature", self.temperature, 0)
        if self.top_k is not None:
            at_least("sampler.top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"sampler.top_p is {self.top_p}: above 0 and at most 1, please.")


@dataclass
class BeamConfig(RunningTextConfig):
    """
    ``num_beams``           hypotheses kept
    ``patience``        the search ends when patience · num_beams texts have ended with EOS
    ``length_penalty``  a text's log-probability is divided by its length to this power
    ``temperature``     logits are divided by it
    """

    num_beams: int = 3
    patience: float = 1.0
    length_penalty: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        at_least("sampler.num_beams", self.num_beams, 1)
        if self.patience <= 0 or self.temperature <= 0:
            raise UserError("sampler.patience and sampler.temperature must be above 0.")


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
    """Write token after token, the likeliest or drawn.

    Args:
        images: uint8 [B, 3, S, S], or normalised floating point.
        prompt: BOS and prompt token ids.
        never_first: ids that no label may start with; not applied in published mode.

    Returns:
        tokens int64 [B, T] and the probability float32 [B, T] of each: the model's own; in published mode after
        penalty and temperature.
    """
    logits_BV, cache = model.prefill(images, prompt)
    prefix = model.num_image_tokens + 1 + len(prompt)
    batch, device = len(images), logits_BV.device
    tokens_BT = torch.empty(batch, 0, dtype=torch.long, device=device)
    probs_BT = torch.empty(batch, 0, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    barred = torch.tensor(list(never_first), dtype=torch.long, device=device)
    for step in range(config.max_new_tokens):
        own_BV = logits_BV
        logits_BV = _penalised(logits_BV, tokens_BT, config)
        if config.temperature > 0:
            logits_BV = logits_BV / config.temperature
        logits_BV = _without_barred_starts(logits_BV, tokens_BT, delimiter, barred, config)
        if config.temperature > 0:
            token_B1 = torch.multinomial(_narrowed(logits_BV, config).softmax(dim=-1), 1, generator=generator)
        else:
            token_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        shown_BV = logits_BV if config.published else own_BV
        probs_BT = torch.cat([probs_BT, shown_BV.softmax(dim=-1).gather(1, token_B1)], dim=1)
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
    """Beam search: the text of the highest log-probability divided by length.

    Args:
        eos: the id that ends a text early; None: every text has ``max_new_tokens`` tokens.

    Returns:
        tokens int64 [B, T] and their probabilities float32 [B, T]; behind a text that ended early delimiters of
        probability 1.
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
    scores_BW[:, 0] = 0.0  # all beams begin alike: only one may branch
    # A text may end where a label would start, so the end of text is not barred there.
    barred = torch.tensor([i for i in never_first if i != eos], dtype=torch.long, device=device)
    ended: list[list[tuple[float, Tensor, Tensor]]] = [[] for _ in range(batch)]
    running = set(range(batch))  # images whose search goes on; the others are computed along, and change no more
    for step in range(config.max_new_tokens):
        log_p_RV = (_penalised(logits_RV, tokens_RT, config) / config.temperature).log_softmax(dim=-1)
        log_p_RV = _without_barred_starts(log_p_RV, tokens_RT, delimiter, barred, config)
        total_BWV = scores_BW[..., None] + log_p_RV.view(batch, width, vocabulary)
        # Twice as many as needed: at most every beam ends here, and as many go on.
        scores_BC, flat_BC = total_BWV.flatten(1).topk(min(2 * width, width * vocabulary), dim=-1)
        parent_BC, token_BC = flat_BC // vocabulary, flat_BC % vocabulary
        row_BC = parent_BC + width * torch.arange(batch, device=device)[:, None]
        prob_BC = log_p_RV[row_BC, token_BC].exp()
        ends_BC = token_BC == eos if eos is not None else torch.zeros_like(token_BC, dtype=torch.bool)
        if eos is not None:
            for image, candidate in ends_BC.nonzero().tolist():
                if image in running and candidate < width and scores_BC[image, candidate] > -torch.inf:
                    row = row_BC[image, candidate]
                    score = scores_BC[image, candidate].item() / (step + 1) ** config.length_penalty
                    ended[image].append((score, tokens_RT[row], probs_RT[row]))
        keep_BW = ends_BC.int().argsort(dim=1, stable=True)[:, :width]  # the best that go on
        scores_BW = scores_BC.gather(1, keep_BW)
        rows_R = row_BC.gather(1, keep_BW).flatten()
        tokens_RT = torch.cat([tokens_RT[rows_R], token_BC.gather(1, keep_BW).view(-1, 1)], dim=1)
        probs_RT = torch.cat([probs_RT[rows_R], prob_BC.gather(1, keep_BW).view(-1, 1)], dim=1)
        last = step + 1 == config.max_new_tokens
        for image in [i for i in running if last or len(ended[i]) >= config.patience * width]:
            running.remove(image)
            score = scores_BW[image, 0].item() / (step + 1) ** config.length_penalty
            ended[image].append((score, tokens_RT[image * width], probs_RT[image * width]))  # the best that is open
        if not running:
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
    config: RunningTextConfig,
    causal: bool = False,
) -> Tensor:
    """Logits [R, V] behind the last of the tokens, whose predecessors are cached."""
    length = tokens_RT.shape[1]
    if config.published and not causal:
        # Its mask changes what earlier tokens saw: the text is computed anew, only the prefix stays.
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :prefix], layer.values[:, :, :prefix]
        mask = published_text_mask(tokens_RT, prefix, delimiter)
        start = 0
    elif causal:
        mask = torch.ones(1, 1, 1, prefix + length, dtype=torch.bool, device=tokens_RT.device)
        start = length - 1
    else:
        mask = _own_label_mask(tokens_RT, prefix, delimiter)
        start = length - 1
    positions = torch.arange(prefix + start, prefix + length, device=tokens_RT.device)[None]
    hidden = model.decoder(model.decoder.embed(tokens_RT[:, start:]), positions, mask, cache)
    return model.decoder.logits(hidden[:, -1])


def _own_label_mask(tokens_RT: Tensor, prefix: int, delimiter: int) -> Tensor:
    """What the last token sees: the prefix and its own label. bool [R, 1, 1, P + T]."""
    is_end_RT = (tokens_RT == delimiter).int()
    segment_RT = is_end_RT.cumsum(dim=1) - is_end_RT  # a delimiter belongs to the label that it ends
    own_RT = segment_RT == segment_RT[:, -1:]
    return torch.cat([own_RT.new_ones(len(own_RT), prefix), own_RT], dim=1)[:, None, None]


def published_text_mask(tokens_RT: Tensor, prefix: int, delimiter: int) -> Tensor:
    """The published greedy mask of a whole text behind its prefix: bool [R, 1, T, P + T].

    Once delimiter n + 1 is out, every token after delimiter n stops seeing what lies from the last prompt token to
    delimiter n. So a label sees the label before it until it is ended itself, and from then on loses the prompt's end.
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


def _without_barred_starts(
    logits_RV: Tensor, tokens_RT: Tensor, delimiter: int, barred: Tensor, config: RunningTextConfig
) -> Tensor:
    """-inf for the ids ``barred`` where a label starts: at the beginning and behind a delimiter."""
    if config.published or len(barred) == 0:
        return logits_RV
    if tokens_RT.shape[1] == 0:
        return logits_RV.index_fill(1, barred, -torch.inf)
    starts_R1 = (tokens_RT[:, -1] == delimiter)[:, None]
    return torch.where(starts_R1, logits_RV.index_fill(1, barred, -torch.inf), logits_RV)


def _penalised(logits_RV: Tensor, tokens_RT: Tensor, config: RunningTextConfig) -> Tensor:
    if config.repetition_penalty == 1.0 or tokens_RT.shape[1] == 0:
        return logits_RV
    written = logits_RV.gather(1, tokens_RT)
    lower = written / config.repetition_penalty
    if not config.published:
        lower = torch.where(written > 0, lower, written * config.repetition_penalty)
    return logits_RV.scatter(1, tokens_RT, lower)


def _narrowed(logits_BV: Tensor, config: GreedyConfig) -> Tensor:
    """-inf outside the ``top_k`` likeliest tokens and the ``top_p`` mass."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    drop_BV = torch.zeros_like(sorted_BV, dtype=torch.bool)
    if config.top_k is not None:
        drop_BV[:, config.top_k :] = True
    if config.top_p is not None:
        probs_BV = sorted_BV.softmax(dim=-1)
        drop_BV |= probs_BV.cumsum(dim=-1) - probs_BV >= config.top_p  # the first always stays
    return logits_BV.masked_fill(drop_BV.gather(1, order_BV.argsort(dim=-1)), -torch.inf)


def split_labels(tokens_BT: Tensor, probs_BT: Tensor, delimiter: int, max_tokens: int) -> Samples:
    """Running texts → labels in the order of writing; the last, unfinished one as if it were cut.

    Empty labels have length 0; images with fewer labels are filled up with such.
    """
    result: list[list[tuple[list[int], list[float]]]] = []
    for tokens, probs in zip(tokens_BT.tolist(), probs_BT.tolist(), strict=True):
        labels: list[tuple[list[int], list[float]]] = [([], [])]
        for token, prob in zip(tokens, probs, strict=True):
            if token == delimiter:
                if len(labels[-1][1]) < max_tokens:  # a label that was cut ends without its delimiter's probability
                    labels[-1][1].append(prob)
                labels.append(([], []))
            elif len(labels[-1][0]) < max_tokens:
                labels[-1][0].append(token)
                labels[-1][1].append(prob)
        result.append([label for label in labels if label[0]] or [([], [])])
    samples = Samples.of(result, delimiter, tokens_BT.device)
    samples.disjoint = False
    return samples
