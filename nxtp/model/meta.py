"""A model's shapes without its weights, and how many parameters it has."""

from __future__ import annotations

import torch

from nxtp.errors import UserError
from nxtp.model.model import Model, ModelConfig
from nxtp.model.trainable import TrainableConfig, choose_trainable


def meta_model(config: ModelConfig, vocab_size: int | None, trainable: TrainableConfig | None = None) -> Model:
    """The model's shapes without its weights, on the meta device, in well under a second.

    Raises:
        UserError: its numbers are impossible, as a width of 0; or torchvision is of another PyTorch.
    """
    from transformers.initialization import no_init_weights

    try:
        import torchvision  # noqa: F401  # first, for open_clip and transformers
    except RuntimeError as error:  # its operators are those of one version of PyTorch
        problem = f"PyTorch and torchvision do not fit each other ({error})"
        raise UserError(f"{problem}: install both at once, pip install torch torchvision.") from error
    try:
        with torch.device("meta"), no_init_weights():
            model = Model(config, vocab_size, load_pretrained=False)
    except (ArithmeticError, AssertionError, RuntimeError) as error:  # of open_clip, transformers and PyTorch
        raise UserError(f"model cannot be built with these numbers: {' '.join(str(error).split())[:200]}.") from error
    if trainable is not None:
        choose_trainable(model, trainable)
    return model


def count_parameters(model: Model) -> dict[str, int]:
    """Parameters by part, all and trained: ``encoder``, ``encoder_trained``, …, ``total``, ``total_trained``."""
    counts: dict[str, int] = {}
    for part in ("encoder", "projection", "image_token", "decoder", "total"):
        found = [p for n, p in model.named_parameters() if part == "total" or n.split(".")[0] == part]
        counts[part] = sum(p.numel() for p in found)
        counts[f"{part}_trained"] = sum(p.numel() for p in found if p.requires_grad)
    return counts
