"""The samplers by name: a batch of images in, labels with their tokens' probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from nxtp.config import to_dataclass
from nxtp.errors import UserError, nearest
from nxtp.model.model import Model
from nxtp.model.tokenizer import LabelTokenizer
from nxtp.sampling.autoregressive import BeamConfig, GreedyConfig, beam, greedy, split_labels
from nxtp.sampling.closed_vocabulary import Vocabulary
from nxtp.sampling.exact import ExactConfig, exact
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.one_shot import OneShotConfig, SamplerConfig, one_shot

SAMPLERS: dict[str, type[SamplerConfig]] = {
    "one_shot": OneShotConfig,
    "greedy": GreedyConfig,
    "beam": BeamConfig,
    "exact": ExactConfig,
}


def sampler_config(choice: str | Mapping[str, Any] | SamplerConfig = "one_shot") -> SamplerConfig:
    """A sampler's configuration from its name, from ``{"name": …, settings}``, or as it is.

    Raises:
        UserError: an unknown sampler or setting; names the nearest.
    """
    if isinstance(choice, SamplerConfig):
        return choice
    settings = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = settings.pop("name", "one_shot")
    if name not in SAMPLERS:
        raise UserError(f"No sampler '{name}'.{nearest(name, SAMPLERS)} Known: {', '.join(SAMPLERS)}.")
    return to_dataclass(SAMPLERS[name], settings, "sampler")


def settings_of(config: SamplerConfig) -> tuple[str, dict[str, Any]]:
    """Name and settings: the reverse of :func:`sampler_config`."""
    return next(name for name, kind in SAMPLERS.items() if type(config) is kind), asdict(config)


def sample(
    model: Model,
    images: Tensor,
    config: SamplerConfig,
    *,
    tokenizer: LabelTokenizer,
    top_k: int,
    classes: Vocabulary | None = None,
) -> Samples:
    """Labels of a batch by any sampler.

    Args:
        images: uint8 [B, 3, S, S], or normalised floating point.
        top_k: labels per image for one-shot and exact search; greedy and beam search return all labels of their text.
        classes: the only labels that may result, for one-shot sampling.

    Raises:
        UserError: ``classes`` with another sampler.
    """
    if classes is not None and not isinstance(config, OneShotConfig):
        raise UserError("Only one-shot sampling can be restricted to classes; `classify` ranks classes exactly.")
    delimiter = tokenizer.delimiter_id
    common = {"prompt": tokenizer.prompt_ids, "delimiter": delimiter, "never_first": never_first(model, tokenizer)}
    if isinstance(config, ExactConfig):
        return exact(model, images, config, top_k=top_k, **common)
    if isinstance(config, BeamConfig):
        eos = tokenizer.tokenizer.eos_token_id
        tokens, probs = beam(model, images, config, eos=eos if eos != tokenizer.bos_id else None, **common)
        return split_labels(tokens, probs, delimiter, config.max_tokens)
    if isinstance(config, GreedyConfig):
        tokens, probs = greedy(model, images, config, **common)
        return split_labels(tokens, probs, delimiter, config.max_tokens)
    return one_shot(model, images, top_k=top_k, classes=classes, **asdict(config), **common)


def never_first(model: Model, tokenizer: LabelTokenizer) -> Sequence[int]:
    """Ids that cannot start a label: the delimiter, special tokens, vocabulary rows that the tokenizer lacks."""
    return [*tokenizer.never_first, *range(len(tokenizer), model.decoder.vocab_size)]
