"""FSDP2 as a Lightning strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor

from nxtp.distributed.checkpoints import BackgroundCheckpoints, read_checkpoint


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state are sharded over all ranks; each rank saves its part of a checkpoint."""

    lightning_restore_optimizer = True
    # Lightning's dictionaries contain sharded tensors here, and are otherwise those of any other strategy.
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict

    def __init__(self, **options: Any):
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, **options)
        self.checkpoint_io = BackgroundCheckpoints()

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients of batches that are accumulated stay whole on each rank; the step's last batch reduces them."""
        model = self.lightning_module.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """The checkpoint with this rank's part of each tensor; weights are read into the model's own."""
        self.checkpoint_io.wait()
        weights = self.lightning_module.state_dict()
        numbered = [enumerate(p for group in o.param_groups for p in group["params"]) for o in self.optimizers]
        parameters = {f"{index}/{n}": parameter for index, own in enumerate(numbered) for n, parameter in own}

        def target(key: str, shape: tuple[int, ...]) -> Tensor | None:
            kind, name = key.split("/", 1)
            if kind == "state_dict":
                return weights.get(name)
            parameter = parameters.get(name.rpartition("/")[0])  # None in validation, which has no optimizer
            if parameter is None:
                return None
            return torch.empty_like(parameter) if shape == parameter.shape else torch.empty(shape)

        return read_checkpoint(Path(self.broadcast(checkpoint_path)), target)

    def teardown(self) -> None:
        self.checkpoint_io.teardown()
        super().teardown()
