"""The optimizer, its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nxtp.config import instantiated
from nxtp.errors import UserError, at_least
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig

MUON = "timm.optim.muon.Muon"


@dataclass
class OptimConfig:
    """The optimizer, its learning-rate schedule, and what trains.

    ``lr``            the highest learning rate
    ``encoder_lr``    that of the encoder, if another
    ``weight_decay``  of matrices; vectors, norms and embeddings have none
    ``decay_final_norm``  of the decoder's final norm too, as published
    ``optimizer``     a class of an optimizer as its ``_target_`` and arguments; it gets ``lr`` and the parameters
    ``schedule``      a function or class as its ``_target_`` and arguments; it gets the optimizer and the number of
                      steps, and returns one of torch's schedulers
    """

    lr: float = 1e-3
    encoder_lr: float | None = None
    weight_decay: float = 0.1
    decay_final_norm: bool = False
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        if self.encoder_lr is not None:
            at_least("optim.encoder_lr", self.encoder_lr, 0)
        # Not as defaults of the fields, which would be merged into another class's arguments.
        self.optimizer = self.optimizer or {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.98], "eps": 1e-6}
        self.schedule = self.schedule or {"_target_": "nxtp.train.optim.warmup_cosine"}


def build_optimizer(model: Model, config: OptimConfig, total_steps: int, fused: bool = True) -> tuple[Optimizer, Any]:
    """The optimizer of what trains, and its schedule over ``total_steps``.

    Raises:
        UserError: as :func:`create_optimizer`; the schedule is not found, or refuses its arguments.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = create_optimizer(groups_of(model, config), config, fused=fused, sharded=sharded)
    optimizer.register_load_state_dict_pre_hook(refuse_other_groups)
    return optimizer, create_schedule(optimizer, config, total_steps)


def groups_of(model: Model, config: OptimConfig) -> list[dict[str, Any]]:
    """What trains, in groups for :func:`create_optimizer`."""
    also = list(model.decoder.lm.model.norm.parameters()) if config.decay_final_norm else []
    apart = [model.decoder.lm.lm_head.weight] if config.optimizer["_target_"] == MUON else []
    return with_encoder_lr(parameter_groups(model, config.weight_decay, also, apart), model.encoder, config)


def with_encoder_lr(groups: list[dict[str, Any]], encoder: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The groups, divided into the encoder's and the rest where the encoder has a learning rate of its own."""
    if config.encoder_lr is None:
        return groups
    own, divided = {id(p) for p in encoder.parameters()}, []
    for group in groups:
        for inside, rate in ((True, {"lr": config.encoder_lr}), (False, {})):
            if params := [p for p in group["params"] if (id(p) in own) is inside]:
                divided.append(group | {"params": params} | rate)
    return divided


def create_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, *, fused: bool = False, sharded: bool = False
) -> Optimizer:
    """The optimizer of these groups, without a schedule.

    Args:
        fused: where the optimizer has a fused implementation, and its arguments do not say which.

    Raises:
        UserError: no such optimizer, or it refuses its arguments; it needs a package that is not installed, or cannot
            update ``sharded`` weights.
    """
    target = str(config.optimizer.get("_target_"))
    package = target.partition(".")[0]
    if package == "torchao":
        if sharded:
            raise UserError("optim=adamw8bit does not support sharded weights, whose state is sharded too: use adamw.")
        if find_spec(package) is None:
            raise UserError("optim=adamw8bit needs torchao: pip install 'nxtp[8bit]'.")
    settings: dict[str, Any] = {"lr": config.lr, "_convert_": "all"}
    if fused and package == "torch" and "fused" not in config.optimizer:
        settings |= {"fused": True} if _takes(target, "fused") else {}
    return instantiated(config.optimizer, "optim.optimizer", params=groups, **settings)


def refuse_other_groups(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """A hook of ``load_state_dict``, whose own error names no settings.

    Raises:
        UserError: the saved state has other parameter groups.
    """
    every = saved["param_groups"], optimizer.param_groups
    theirs, ours = ([len(group["params"]) for group in groups] for groups in every)
    if theirs != ours:
        raise UserError(
            f"The checkpoint's optimizer has groups of {theirs} parameters, that of this run {ours}: set "
            "optim.trainable, optim.encoder_lr, optim.decay_final_norm and optim.optimizer as the run that saved it "
            "did (config.yaml in its directory)."
        )


def create_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> Any:
    """The schedule, told the number of steps by the name that it has for it."""
    target = str(config.schedule.get("_target_"))
    steps = {name: total_steps for name in ("total_steps", "num_training_steps", "T_max") if _takes(target, name)}
    return instantiated(config.schedule, "optim.schedule", optimizer=optimizer, **steps, _convert_="all")


def _takes(target: str, argument: str) -> bool:
    """Whether what a ``_target_`` names has this argument."""
    try:
        return argument in inspect.signature(pkgutil.resolve_name(target)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return False  # instantiating it says what is wrong


def parameter_groups(
    model: nn.Module, weight_decay: float, also: Sequence[nn.Parameter] = (), fallback: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """What trains, in groups: matrices with weight decay, vectors and embeddings without.

    timm's ``param_groups_weight_decay`` has no way to add a vector to the first group.

    Args:
        also: vectors that decay too.
        fallback: matrices in a group of their own, which Muon leaves to AdamW, as it then does embeddings and vectors.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    apart: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            decays = (p.ndim >= 2 and id(p) not in embeddings) or any(p is vector for vector in also)
            (apart if any(p is matrix for matrix in fallback) else decaying if decays else others).append(p)
    mark = {"use_fallback": True} if fallback else {}
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": apart, "weight_decay": weight_decay} | mark,
        {"params": others, "weight_decay": 0.0} | mark,
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final_lr: float = 0.0) -> LambdaLR:
    """Linear warm-up, then cosine, as shares of the optimizer's learning rate.

    Unlike transformers' ``get_cosine_with_min_lr_schedule_with_warmup`` the first step has a rate above 0, the warm-up
    may be a share of all steps, and the rate stays at ``final_lr`` after the last step.

    Args:
        warmup: steps; below 1: a share of ``total_steps``.
        final_lr: at the last step.

    Raises:
        UserError: a negative number.
    """
    at_least("optim.schedule.warmup", warmup, 0)
    at_least("optim.schedule.final_lr", final_lr, 0)
    warmup_steps = warmup * total_steps if warmup < 1 else warmup

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, share)


def state_bytes(model: Model, optim: OptimConfig) -> int:
    """Bytes of the optimizer's state on this rank: that of small parameters after a step, in proportion."""
    groups = groups_of(model, optim)
    if optim.optimizer["_target_"].startswith("torchao."):
        return 2 * sum(_bytes_of_8_bit_moment(p) for group in groups for p in group["params"])
    smalls = [[nn.Parameter(torch.zeros((8,) * p.ndim, dtype=p.dtype)) for p in group["params"]] for group in groups]
    optimizer = create_optimizer([group | {"params": s} for group, s in zip(groups, smalls, strict=True)], optim)
    for small in (s for group in smalls for s in group):
        small.grad = torch.zeros_like(small)
    optimizer.step()

    def bytes_per_number(small: nn.Parameter) -> float:
        state = optimizer.state[small]
        return sum(t.nbytes for name, t in state.items() if isinstance(t, Tensor) and name != "step") / small.numel()

    pairs = (
        (p, s) for group, few in zip(groups, smalls, strict=True) for p, s in zip(group["params"], few, strict=True)
    )
    return round(sum(local(p).numel() * bytes_per_number(s) for p, s in pairs))


def _bytes_of_8_bit_moment(parameter: Tensor) -> int:
    """torchao keeps a byte per number and a float32 per 256; small or odd parameters stay float32."""
    count = local(parameter).numel()
    return count + count // 64 if count >= 4096 and count % 256 == 0 else 4 * count


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
