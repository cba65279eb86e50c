"""One-shot sampling (paper, section 3.4): the prefix is computed once, and K labels grow as branches behind it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nxtp.errors import UserError
from nxtp.model.attention_rule import branch_mask
from nxtp.model.model import Model
from nxtp.sampling.label_probability import Samples

if TYPE_CHECKING:
    from transformers import DynamicCache

    from nxtp.sampling.closed_vocabulary import Vocabulary

MAX_LABEL_TOKENS = 19  # as published: a label without a delimiter by then is cut there
_COMPARE = {"≥": operator.ge, ">": operator.gt, "≤": operator.le}


@dataclass(kw_only=True)
class SamplerConfig:
    """Settings that all samplers share; a field's metadata says what its value must be.

    ``max_tokens``   a longer label is cut to this many tokens
    ``temperature``  logits are divided by it

    Raises:
        UserError: a value out of range.
    """

    max_tokens: int = field(default=MAX_LABEL_TOKENS, metadata={"≥": 1})
    temperature: float = field(default=1.0, metadata={">": 0})

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            for sign, limit in setting.metadata.items():
                if value is not None and not _COMPARE[sign](value, limit):
                    raise UserError(f"sampler.{setting.name} must be {sign} {limit}, got {value}.")


@dataclass(kw_only=True)
class OneShotConfig(SamplerConfig):
    """One-shot sampling has no other settings. A temperature changes probabilities, not labels."""


@torch.inference_mode()
def one_shot(
    model: Model,
    images: Tensor,
    *,
    prompt: Sequence[int],
    delimiter: int,
    top_k: int,
    max_tokens: int = MAX_LABEL_TOKENS,
    never_first: Sequence[int] = (),
    temperature: float = 1.0,
    classes: Vocabulary | None = None,
    prefilled: tuple[Tensor, DynamicCache] | None = None,
) -> Samples:
    """The ``top_k`` likeliest first tokens, each continued greedily until its delimiter.

    The labels are K branches in one row behind the cached prefix (:func:`nxtp.model.attention_rule.branch_mask`). A
    branch that has ended is no longer computed, and its keys are removed from the cache.

    Args:
        model: in evaluation mode.
        images: uint8 [B, 3, S, S], or normalised floating point.
        prompt: BOS and prompt token ids.
        delimiter: the id that ends a label.
        top_k: K, at most the vocabulary without ``never_first``.
        max_tokens: a label without a delimiter is cut after this many tokens.
        never_first: ids that no label may start with.
        temperature: logits are divided by it.
        classes: the only labels that may result, of any length. Probabilities stay those among all tokens.
        prefilled: what ``model.prefill`` returned for these images.
    """
    logits_BV, cache = prefilled or model.prefill(images, prompt)
    prefix = model.num_image_tokens + 1 + len(prompt)
    if classes is not None:
        max_tokens = classes.longest + 1
        never_first = sorted(set(range(logits_BV.shape[-1])) - set(classes.node_of_first))
    probs, tokens = first_tokens(logits_BV, top_k, never_first, temperature)
    nodes_BA = classes.start(tokens) if classes is not None else None
    batch, branches = tokens.shape

    tokens_BKL = torch.full((batch, branches, max_tokens + 1), delimiter, device=tokens.device)
    probs_BKL = probs.new_ones(batch, branches, max_tokens + 1)
    tokens_BKL[..., 0], probs_BKL[..., 0] = tokens, probs

    # A of the K branches are still computed: as many as the image with the most unfinished branches needs.
    active_BA = torch.arange(branches, device=tokens.device).expand(batch, -1)
    current_BA, running_BA = tokens, tokens != delimiter
    for step in range(1, max_tokens):
        needed = int(running_BA.sum(dim=1).max())
        if needed == 0:
            break
        if needed < active_BA.shape[1]:
            keep_BA = running_BA.int().argsort(dim=1, descending=True, stable=True)[:, :needed]
            _keep_branches(cache, keep_BA, prefix, steps=step - 1)
            active_BA, current_BA, running_BA = (t.gather(1, keep_BA) for t in (active_BA, current_BA, running_BA))
            nodes_BA = nodes_BA.gather(1, keep_BA.cpu()) if nodes_BA is not None else None
        mask = branch_mask(prefix, active_BA.shape[1], step, device=tokens.device)
        logits_BAV = model.step(current_BA, prefix + step - 1, mask, cache)
        if classes is not None and nodes_BA is not None:
            prob_BA, current_BA, nodes_BA = classes.likeliest(logits_BAV.div_(temperature), nodes_BA)
        else:
            prob_BA, current_BA = likeliest_(logits_BAV, temperature)
        current_BA = current_BA.where(running_BA, delimiter)
        tokens_BKL[:, :, step].scatter_(1, active_BA, current_BA)
        probs_BKL[:, :, step].scatter_(1, active_BA, prob_BA.where(running_BA, 1.0))
        running_BA = running_BA & (current_BA != delimiter)
    return Samples.grown(tokens_BKL, probs_BKL, delimiter)


def first_tokens(
    logits_BV: Tensor, top_k: int, never_first: Sequence[int] = (), temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Probabilities float32 and ids int64, each [B, K], of the likeliest tokens that may start a label."""
    first_BV = (logits_BV / temperature).softmax(dim=-1)
    count = min(top_k, first_BV.shape[-1] - len(set(never_first)))
    if never_first:
        first_BV = first_BV.index_fill(1, torch.tensor(never_first, device=first_BV.device), -1.0)
    return first_BV.topk(count, dim=-1)


def likeliest_(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Probability and id of the likeliest token, each [...]; overwrites the logits [..., V].

    For a hundred branches the logits exceed a core's cache, so every pass over them and every copy costs time.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    top, ids = logits.max(dim=-1, keepdim=True)
    return logits.sub_(top).exp_().sum(dim=-1).reciprocal(), ids[..., 0]


def _keep_branches(cache: DynamicCache, keep_BA: Tensor, prefix: int, steps: int) -> None:
    """Remove all other branches' keys and values from the cache, whose row is ``prefix · step 1 · … · step n``."""
    if steps == 0:
        return
    for layer in cache.layers:
        for name in ("keys", "values"):
            old = getattr(layer, name)
            batch, heads, _, width = old.shape
            tree = old[:, :, prefix:].unflatten(2, (steps, -1))
            index = keep_BA[:, None, None, :, None].expand(batch, heads, steps, -1, width)
            kept = tree.gather(3, index).flatten(2, 3)
            setattr(layer, name, torch.cat([old[:, :, :prefix], kept], dim=2))
