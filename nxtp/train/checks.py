"""Settings that are impossible or cannot work together: found before anything is built."""

from __future__ import annotations

from numbers import Real
from types import NoneType
from typing import Any, get_args, get_type_hints

import psutil
import torch
from lightning import Trainer
from omegaconf import DictConfig
from torch import nn

from nxtp.config import rank_count, to_dataclass
from nxtp.distributed.parallelize import mixed_precision
from nxtp.errors import UserError, at_least, nearest
from nxtp.eval.embedders import PACKAGED, packaged_encoder
from nxtp.model.model import Model
from nxtp.train.optim import OptimConfig, create_optimizer, create_schedule, state_bytes

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # dtype of the weights, and of autocast
    "32-true": (torch.float32, None),
    "64-true": (torch.float64, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
_SHORT = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def full_precision(precision: Any) -> str:
    """Lightning's ``precision`` as a key of :data:`PRECISIONS`.

    Raises:
        UserError: it is none.
    """
    name = _SHORT.get(str(precision), str(precision))
    if name not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UserError(f"trainer.precision={name} is unknown.{nearest(name, PRECISIONS)} Known: {known}.")
    return name


def strategy_name(trainer: Any) -> str:
    """A name of Lightning's, as "ddp", or a class."""
    strategy = trainer["strategy"]
    return strategy if isinstance(strategy, str) else str(strategy["_target_"]).rpartition(".")[2]


def check_settings(cfg: DictConfig) -> None:
    """What is wrong on any machine; `nxtp describe` checks it too.

    Raises:
        UserError: a number that Lightning takes is impossible, or settings contradict each other.
    """
    trainer = cfg.trainer
    for name, hint in get_type_hints(Trainer.__init__).items():  # Lightning compares many of them unchecked
        others = set(get_args(hint) or [hint]) - {int, float}
        if others <= {NoneType} and name in trainer and not isinstance(trainer[name], (Real, *others)):
            raise UserError(f"trainer.{name} must be a number, got '{trainer[name]}'.")
    for name in ("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch"):
        if (value := trainer.get(name)) is not None:
            at_least(f"trainer.{name}", value, 1)
    interval = trainer.get("val_check_interval")
    if interval == 0 or not isinstance(interval, int | float | None):  # ranks would not agree on when a time is up
        raise UserError(
            f"trainer.val_check_interval must be a number of batches or a share of an epoch, got {interval}."
        )
    if cfg.matmul_precision not in (None, "highest", "high", "medium"):
        raise UserError(f"matmul_precision must be highest, high, medium or null, got {cfg.matmul_precision}.")
    if cfg.validation.semantic == PACKAGED:
        packaged_encoder()
    check_global_batch(cfg)
    precision = full_precision(trainer.precision)
    if trainer.accelerator == "cpu":
        refuse_half(precision)
    is_sharded = strategy_name(trainer) == "FSDP2Strategy"
    if is_sharded:
        mixed_precision(precision)
    optim = to_dataclass(OptimConfig, cfg.optim, "optim")
    parameters = [nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))]
    optimizer = create_optimizer([{"params": parameters}], optim, sharded=is_sharded)
    create_schedule(optimizer, optim, total_steps=10)
    unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
    if unscales and precision == "16-mixed" and trainer.gradient_clip_val:
        raise UserError(
            "optim.optimizer is fused, and trainer.precision=16-mixed cannot clip its gradients: "
            "set optim.optimizer.fused=false, trainer.gradient_clip_val=null or trainer.precision=bf16-mixed."
        )


def check_memory(model: Model, cfg: DictConfig, optim: OptimConfig) -> None:
    """Weights, gradients and the optimizer's state are the least that training needs.

    Raises:
        UserError: they are more than the memory of a GPU, or a process's part of this machine's.
    """
    parameters = list(model.parameters())
    trained, ranks = sum(p.numel() for p in parameters if p.requires_grad), rank_count(cfg.trainer)
    of_a_number = PRECISIONS[full_precision(cfg.trainer.precision)][0].itemsize
    numbers = sum(p.numel() for p in parameters) + trained
    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        has, what = torch.cuda.get_device_properties(0).total_memory, "a GPU"
    else:
        has, what = psutil.virtual_memory().total * int(cfg.trainer.num_nodes) // ranks, "this machine for each process"
    sharers = ranks if strategy_name(cfg.trainer) == "FSDP2Strategy" else 1
    if of_a_number * (numbers + 4 * trained) / sharers < has:
        return
    needed = of_a_number * (numbers + state_bytes(model, optim) / 4) / sharers
    if needed > has:
        raise UserError(
            f"Training needs at least {needed / 1e9:.1f} GB (weights, gradients, optimizer state), and {what} has "
            f"{has / 1e9:.1f} GB: keep fewer blocks (model.decoder.depth), train fewer parts (optim.trainable, "
            "model.decoder.lora), or use trainer=fsdp."
        )


def check_global_batch(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a step would have other images than the recipe's.
    """
    if cfg.get("global_batch") is None:
        return
    at_least("global_batch", cfg.global_batch, 1)
    batch, ranks, batches = cfg.data.batch_size, rank_count(cfg.trainer), cfg.trainer.accumulate_grad_batches
    if (images := batch * ranks * batches) != cfg.global_batch:
        raise UserError(
            f"global_batch={cfg.global_batch} is not data.batch_size={batch} × {ranks} ranks × "
            f"trainer.accumulate_grad_batches={batches} = {images}: change one of them, "
            f"or train with global_batch={images}."
        )


def check_machine(cfg: DictConfig) -> None:
    """
    Raises:
        UserError: the configuration needs a GPU and PyTorch finds none.
    """
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return
    if cfg.trainer.accelerator == "gpu":
        raise UserError(
            "trainer.accelerator is 'gpu' and PyTorch finds no GPU: use trainer=cpu or, to try another trainer, "
            "trainer.accelerator=cpu trainer.precision=32-true."
        )
    refuse_half(full_precision(cfg.trainer.precision))


def refuse_half(precision: str) -> None:
    """
    Raises:
        UserError: ``precision`` is float16, which no CPU trains in; Lightning would take another one.
    """
    if precision in ("16-mixed", "16-true"):
        raise UserError(f"trainer.precision={precision} needs a GPU: on a CPU use bf16-mixed or 32-true.")
