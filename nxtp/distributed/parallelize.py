"""How a model is laid over devices: sharding (FSDP2), tensor parallelism, activation checkpoints, compiled blocks.

Everything else is written for one process. A strategy's own work is Lightning's and PyTorch's; this module says what
its units are, and which ranks see which data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nxtp.distributed.sharded_checkpoints import ShardCheckpoints
from nxtp.errors import UserError, nearest
from nxtp.model.model import Model
from nxtp.model.weights import full_tensor

_HEADS_APART = {  # each rank computes some heads of a decoder block, and a part of its feed-forward width
    **{f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
    "self_attn.o_proj": RowwiseParallel(),
    **{f"mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")},
    "mlp.down_proj": RowwiseParallel(),
}
_POLICIES = {  # by trainer.precision; kept weights, optimiser state and the sums of gradients are float32 in both
    "32-true": MixedPrecisionPolicy(),
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


@dataclass
class ParallelConfig:
    """Switches that change how the same numbers are computed, under every strategy.

    ``activation_checkpointing``  compute each block's activations again in the backward pass instead of keeping them
    ``compile``   torch.compile each block
    """

    activation_checkpointing: bool = False
    compile: bool = False


def blocks_of(model: Model) -> list[nn.Module]:
    """The units of sharding, checkpointing and compilation: the encoder's blocks, then the decoder's."""
    return [*model.encoder.blocks(), *model.decoder.blocks]


def parallelize(
    model: Model, config: ParallelConfig, mesh: DeviceMesh | None = None, precision: str = "32-true"
) -> Model:
    """Apply the switches and, with a ``mesh`` ("data_parallel" × "tensor_parallel"), cut the weights up over it.

    Frozen parameters are sharded like the others. Parameters become DTensors; the model is called as before.

    Args:
        precision: the trainer's. Under a mesh ``bf16-mixed`` gathers weights and keeps activations in bfloat16.

    Raises:
        UserError: a precision that sharding cannot have, or heads that the tensor-parallel ranks cannot share.
    """
    if config.activation_checkpointing:
        lm = model.decoder.lm  # transformers 5.23 has renamed it
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.encoder.visual.set_grad_checkpointing(True)
    if config.compile:
        for block in blocks_of(model):
            block.compile()
    if mesh is None:
        return model
    if precision not in _POLICIES:
        raise UserError(
            f"trainer.precision is '{precision}'.{nearest(precision, _POLICIES)} Sharded weights can have "
            f"{' or '.join(_POLICIES)}."
        )
    if mesh["tensor_parallel"].size() > 1:
        _check_divisible(model, mesh["tensor_parallel"].size())
        for block in model.decoder.blocks:
            parallelize_module(block, mesh["tensor_parallel"], _HEADS_APART)
    options = {"mesh": mesh["data_parallel"], "mp_policy": _POLICIES[precision]}
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    for method in ("prefill", "step"):  # what sampling calls instead of forward
        register_fsdp_forward_method(model, method)
    return model


def _check_divisible(model: Model, ranks: int) -> None:
    fields = model.decoder.lm.config
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(fields, name) % ranks:
            raise UserError(
                f"The decoder's {name} of {getattr(fields, name)} cannot be shared by {ranks} ranks: choose another "
                "trainer.strategy.tensor_parallel_size."
            )


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2, and tensor parallelism where asked, by Lightning's strategy; each rank saves its part of a checkpoint.

    Args:
        tensor_parallel_size: ranks that share each decoder block. The other factor of the number of ranks is
            data-parallel: it shards the weights and sees different data.
    """

    def __init__(self, tensor_parallel_size: int = 1, **options: Any):
        super().__init__(data_parallel_size=1, tensor_parallel_size=tensor_parallel_size, **options)
        self._checkpoints = ShardCheckpoints()

    def setup_environment(self) -> None:
        ranks, group = self.num_nodes * self.num_processes, self._tensor_parallel_size
        if group < 1 or ranks % group:
            raise UserError(f"trainer.strategy.tensor_parallel_size is {group}: {ranks} ranks cannot be split so.")
        self._data_parallel_size = ranks // group
        super().setup_environment()

    # Lightning's state dictionaries stay empty: tensors are taken, by name, when all of them are at hand.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        self._checkpoints.save(self.model, self.optimizers, rest, self.broadcast(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        return self._checkpoints.load(self.model, self.optimizers, Path(self.broadcast(checkpoint_path)))

    def remove_checkpoint(self, filepath: Any) -> None:
        self._checkpoints.wait()
        super().remove_checkpoint(filepath)

    def teardown(self) -> None:
        self._checkpoints.close()
        super().teardown()


def data_ranks(trainer: L.Trainer | None) -> tuple[int, int]:
    """(rank, number) of this process among those that see different data; (0, 1) without a trainer."""
    if trainer is None:
        return 0, 1
    if isinstance(trainer.strategy, FSDP2Strategy):
        mesh = trainer.strategy.device_mesh["data_parallel"]
        return mesh.get_local_rank(), mesh.size()
    return trainer.global_rank, trainer.world_size


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole weights on every rank, so that each may call the model as often as it needs (validation, sampling)."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in groups that lie over the same devices in the same way: what one fused kernel can take."""

    def key(parameter: nn.Parameter) -> str:
        return repr(parameter.device_mesh) if isinstance(parameter, DTensor) else ""

    return [list(group) for _, group in groupby(sorted(parameters, key=key), key)]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most ``limit``; the norm before, float32 []."""
    groups = by_mesh(p for p in parameters if p.grad is not None)
    norms = [full_tensor(nn.utils.get_total_norm([p.grad for p in group])) for group in groups]
    total = nn.utils.get_total_norm(norms)
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, total)
    return total
