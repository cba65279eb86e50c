"""The samplers by name: one image batch in, labels with their tokens' probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nxtp.config import to_dataclass
from nxtp.errors import UserError, at_least, nearest
from nxtp.model.model import Model
from nxtp.model.tokenizer import LabelTokenizer
from nxtp.sampling.autoregressive import BeamConfig, GreedyConfig, beam, greedy, split_labels
from nxtp.sampling.closed_vocabulary import Allowed
from nxtp.sampling.exact import ExactConfig, exact
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS, Samples, one_shot


@dataclass
class OneShotConfig:
    """
    ``max_tokens``   a label is cut there
    ``temperature``  logits are divided by it: the same labels, other probabilities
    """

    max_tokens: int = MAX_LABEL_TOKENS
    temperature: float = 1.0

    def __post_init__(self):
        at_least("sampler.max_tokens", self.max_tokens, 1)
        if self.temperature <= 0:
            raise UserError(f"sampler.temperature is {self.temperature}: above 0, please.")


SAMPLERS = {"one_shot": OneShotConfig, "greedy": GreedyConfig, "beam": BeamConfig, "exact": ExactConfig}
SamplerConfig = OneShotConfig | GreedyConfig | BeamConfig | ExactConfig


def sampler_config(choice: str | Mapping[str, Any] | SamplerConfig = "one_shot") -> SamplerConfig:
    """A sampler's configuration from its name, from ``{"name": …, settings}``, or as it is.

    Raises:
        UserError: an unknown sampler or setting; names the nearest.
    """
    if isinstance(choice, tuple(SAMPLERS.values())):
        return choice
    settings = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = settings.pop("name", "one_shot")
    if name not in SAMPLERS:
        raise UserError(f"No sampler '{name}'.{nearest(name, SAMPLERS)} Known: {', '.join(SAMPLERS)}.")
    return to_dataclass(SAMPLERS[name], settings, "sampler")


def sample(
    model: Model,
    images: Tensor,
    config: SamplerConfig,
    *,
    tokenizer: LabelTokenizer,
    top_k: int,
    allowed: Allowed | None = None,
) -> Samples:
    """Labels of a batch by any sampler.

    Args:
        images: uint8 [B, 3, S, S], or normalised floating point.
        top_k: labels an image, of one-shot and exact search; greedy and beam search write as many as their text holds.
        allowed: the only labels that may come out, of one-shot sampling.

    Raises:
        UserError: another sampler is to be held to the allowed labels.
    """
    if allowed is not None and not isinstance(config, OneShotConfig):
        raise UserError("Only one-shot sampling can be held to given labels; classify gives their exact order.")
    common = {
        "prompt": tokenizer.prompt_ids,
        "delimiter": tokenizer.delimiter_id,
        "never_first": never_first(model, tokenizer),
    }
    if isinstance(config, OneShotConfig):
        settings = {"max_tokens": config.max_tokens, "temperature": config.temperature, "allowed": allowed}
        return one_shot(model, images, top_k=top_k, **settings, **common)
    if isinstance(config, ExactConfig):
        return exact(model, images, config, top_k=top_k, **common)
    if isinstance(config, BeamConfig):
        eos = tokenizer.tokenizer.eos_token_id
        text = beam(model, images, config, eos=eos if eos != tokenizer.bos_id else None, **common)
    else:
        text = greedy(model, images, config, **common)
    return split_labels(*text, tokenizer.delimiter_id, config.max_tokens)


def never_first(model: Model, tokenizer: LabelTokenizer) -> Sequence[int]:
    """Ids that cannot start a label: the delimiter, special tokens, vocabulary rows that the tokenizer lacks."""
    return [*tokenizer.never_first, *range(len(tokenizer), model.decoder.vocab_size)]
