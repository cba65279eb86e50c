"""The optimizer: parameter groups, AdamW, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nxtp.config import instantiated
from nxtp.errors import UserError, at_least
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig


@dataclass
class OptimConfig:
    """AdamW, or another optimizer, with linear warm-up and cosine decay.

    ``warmup``    steps; a value below 1 is a share of all steps
    ``final_lr``  learning rate at the last step, as a share of ``lr``
    ``weight_decay``      of matrices; vectors, norms and embeddings have none
    ``decay_final_norm``  of the decoder's final norm too, as published
    ``state_bits``  32, or 8: both moments in blocks of 8-bit numbers (torchao), a quarter of the memory
    ``optimizer``   another one: its ``_target_`` and arguments; ``betas``, ``eps`` and ``state_bits`` are AdamW's only
    """

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 0.1
    decay_final_norm: bool = False
    warmup: float = 0.05
    final_lr: float = 0.0
    state_bits: int = 32
    optimizer: dict[str, Any] | None = None
    trainable: TrainableConfig = field(default_factory=TrainableConfig)

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "warmup", "final_lr"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must be two numbers ≥ 0 and < 1, got {self.betas}.")


def build_optimizer(model: Model, config: OptimConfig, total_steps: int, fused: bool = True) -> tuple[Optimizer, Any]:
    """The optimizer of what trains, and its schedule over ``total_steps``."""
    also = list(model.decoder.lm.model.norm.parameters()) if config.decay_final_norm else []
    groups = parameter_groups(model, config.weight_decay, also)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = create_optimizer(groups, config, fused=fused, sharded=sharded)
    return optimizer, build_schedule(optimizer, total_steps, config.warmup, config.final_lr)


def create_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, *, fused: bool = False, sharded: bool = False
) -> Optimizer:
    """The optimizer of these groups, without a schedule.

    Raises:
        UserError: no such optimizer, or it refuses its arguments; ``state_bits`` is neither 32 nor 8, needs a package
            that is not installed, or does not go together with ``sharded`` weights.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.optimizer is not None:
        return instantiated(config.optimizer, "optim.optimizer", params=groups, lr=config.lr, _convert_="all")
    if config.state_bits == 32:
        return torch.optim.AdamW(groups, **settings, fused=fused)
    if config.state_bits == 8:
        if sharded:
            raise UserError("optim.state_bits=8 does not support sharded weights, whose state is sharded too: use 32.")
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError("optim.state_bits=8 needs torchao: pip install 'nxtp[8bit]'.") from None
        return AdamW8bit(groups, **settings)
    raise UserError(f"optim.state_bits must be 32 or 8, got {config.state_bits}.")


def parameter_groups(model: nn.Module, weight_decay: float, also: Sequence[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """What trains, in two groups: matrices with weight decay, vectors and embeddings without.

    timm's ``param_groups_weight_decay`` has no way to add a vector to the first group.

    Args:
        also: vectors that decay too.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            decays = (p.ndim >= 2 and id(p) not in embeddings) or any(p is vector for vector in also)
            (decaying if decays else others).append(p)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_schedule(optimizer: Optimizer, total_steps: int, warmup: float, final: float) -> LambdaLR:
    """The learning rate at each step, as a share of the optimizer's: linear warm-up, then cosine to ``final``.

    Unlike transformers' ``get_cosine_with_min_lr_schedule_with_warmup`` the first step has a rate above 0, the warm-up
    may be a share of all steps, and the rate stays at ``final`` after the last step.
    """
    warmup_steps = warmup * total_steps if warmup < 1 else warmup

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, share)
