"""What trains, in which groups, at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    ``warmup``    steps; a value below 1 is a share of all steps
    ``final_lr``  learning rate at the last step, as a share of ``lr``
    ``weight_decay`` acts on matrices; not on vectors, norms, embeddings
    ``decay_final_norm``  on the decoder's final norm too, as published
    ``state_bits``  32, or 8: both moments in blocks of 8-bit numbers (torchao), a quarter of the memory
    """

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.1
    decay_final_norm: bool = False
    warmup: float = 0.05
    final_lr: float = 0.0
    state_bits: int = 32
    trainable: TrainableConfig = field(default_factory=TrainableConfig)


def parameter_groups(model: nn.Module, weight_decay: float, also: Sequence[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Two groups of the parameters that train: matrices with weight decay; vectors and embeddings without.

    Args:
        also: vectors that decay all the same.
    """
    also_ids = {id(p) for p in also}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if (p.ndim >= 2 and id(p) not in embeddings) or id(p) in also_ids]
    chosen = {id(p) for p in decays}
    rest = [p for p in trained if id(p) not in chosen]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate_factor(step: int, total: int, warmup: float, final: float) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: linear warm-up, then cosine to ``final``."""
    warmup_steps = warmup * total if warmup < 1 else warmup
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / max(total - warmup_steps, 1), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: Model, config: OptimConfig, total_steps: int, fused: bool = True):
    """AdamW and its per-step schedule over ``total_steps``.

    Raises:
        UserError: ``state_bits`` is neither 32 nor 8, or needs a package that is not installed.
    """
    also = list(model.decoder.lm.model.norm.parameters()) if config.decay_final_norm else []
    groups = parameter_groups(model, config.weight_decay, also)
    settings = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.state_bits == 32:
        optimizer = torch.optim.AdamW(groups, **settings, fused=fused)
    elif config.state_bits == 8:
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise UserError("optim.state_bits=8 is not for sharded weights, whose state is cut up anyway: say 32.")
        optimizer = _adamw_8_bit()(groups, **settings)
    else:
        raise UserError(f"optim.state_bits is {config.state_bits}: 32 or 8, please.")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total_steps, config.warmup, config.final_lr)
    )
    return optimizer, schedule


def _adamw_8_bit() -> type[torch.optim.Optimizer]:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("optim.state_bits=8 needs torchao: pip install 'nxtp[8bit]'.") from None
    return AdamW8bit
