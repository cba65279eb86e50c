"""Activation checkpointing → compiled blocks → FSDP2: applied to a model, in this order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from nxtp.errors import UserError, at_least
from nxtp.model.model import Model

_POLICIES = {  # by trainer.precision; stored weights, optimizer state and gradient sums are float32 in both
    "32-true": MixedPrecisionPolicy(),
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


@dataclass
class ParallelConfig:
    """How the same numbers are computed, under every strategy.

    ``activation_checkpointing``  recompute each block's activations in the backward pass instead of storing them
    ``compile``   torch.compile each block
    ``reshard_after_forward``  trainer=fsdp: free a block's gathered weights until its backward pass; false is faster
                               and keeps all of them
    ``start_timeout``   seconds that ranks wait for each other at the start
    """

    activation_checkpointing: bool = False
    compile: bool = False
    reshard_after_forward: bool = True
    start_timeout: float = 300.0

    def __post_init__(self) -> None:
        at_least("parallel.start_timeout", self.start_timeout, 1)


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """What FSDP2 gathers, computes and reduces in under ``trainer.precision``.

    Raises:
        UserError: a precision that is not supported here.
    """
    if precision not in _POLICIES:
        raise UserError(f"trainer=fsdp supports trainer.precision={' or '.join(_POLICIES)}, got {precision}.")
    return _POLICIES[precision]


def parallelize(
    model: Model, config: ParallelConfig, mesh: DeviceMesh | None = None, precision: str = "32-true"
) -> Model:
    """Apply ``config`` and, with a one-dimensional ``mesh``, shard all weights over it, frozen ones too.

    A unit of all three is one block of the encoder or the decoder; embedding and output layer are sharded as two more,
    unless they share their weights. Sharded parameters become DTensors; the model is
    called as before.

    Args:
        precision: the trainer's. With a mesh, ``bf16-mixed`` gathers weights and keeps activations in bfloat16.

    Raises:
        UserError: a precision that FSDP2 does not support here.
    """
    blocks = [*model.encoder.blocks(), *model.decoder.blocks]
    if config.activation_checkpointing:
        lm = model.decoder.lm  # transformers 5.23 has renamed it
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.encoder.visual.set_grad_checkpointing(True)
    if config.compile:
        for block in blocks:
            block.compile()
    if mesh is None:
        return model
    policy, lm = mixed_precision(precision), model.decoder.lm
    ends = [] if lm.config.tie_word_embeddings else [lm.model.embed_tokens, lm.lm_head]
    for unit in [*blocks, *ends, model]:
        reshard = config.reshard_after_forward and unit not in (lm.lm_head, model)  # whose backward pass comes at once
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    for method in ("prefill", "step", "evaluate"):  # what validation and sampling call instead of forward
        register_fsdp_forward_method(model, method)
    return model


@contextmanager
def unsharded(model: Model, reshard_after_forward: bool = True) -> Iterator[None]:
    """Gather the full weights on every rank, so that each may call the model as often as it needs (sampling)."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(reshard_after_forward and unit not in (model.decoder.lm.lm_head, model))
