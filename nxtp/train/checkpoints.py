"""Checkpoints in one file, and the weights of a checkpoint of either form.

A file and a directory of shards hold the same: Lightning's state, the weights by name, the optimiser's state. A run
that was saved by any number of ranks in either form continues on any number of ranks in either form.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from nxtp.distributed.saving import Background, copied, not_written, read_file
from nxtp.distributed.sharded_checkpoints import REST, TensorsOnly, read_into, read_shards, under
from nxtp.model.weights import Spec, Weights
from nxtp.runs.atomic import recover, remove, replace


class FileCheckpoints(TorchCheckpointIO):
    """A checkpoint in one file: copied, then written aside and renamed while training goes on."""

    def __init__(self) -> None:
        self._background = Background()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self._background.submit(self._write, copied(checkpoint), Path(path))

    @staticmethod
    def _write(checkpoint: dict[str, Any], path: Path) -> None:
        aside = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(aside)
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            replace(aside, path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                aside.unlink()
            raise not_written(path, error) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        self._background.wait()
        path = recover(Path(path)) or Path(path)
        return read_shards(path) if path.is_dir() else read_file(path)

    def remove_checkpoint(self, path: Any) -> None:
        self._background.wait()
        super().remove_checkpoint(path)

    def wait(self) -> None:
        """Until the last checkpoint is on disk."""
        self._background.wait()

    def teardown(self) -> None:
        self._background.close()


class CheckpointWeights(Weights):
    """A checkpoint's weights, one tensor at a time, in one process; ``rest`` is what else it holds.

    Raises:
        UserError: missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = recover(Path(path)) or Path(path)
        if self.path.is_dir():
            self.rest = read_file(self.path / REST)
            stored = under("model.", TensorsOnly(self.path).read_metadata().state_dict_metadata)
            self.specs = {name: Spec(tuple(entry.size), entry.properties.dtype) for name, entry in stored.items()}
        else:
            self.rest = read_file(self.path)
            self._state = self.rest.pop("state_dict", {})
            self.specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        if not self.path.is_dir():
            return self._state[name]  # mapped, not loaded
        tensor = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        read_into({f"model.{name}": tensor}, self.path)
        return tensor
