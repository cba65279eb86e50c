"""Checkpoints, as one file or as a directory of shards: written in the background, read without running code.

Both contain Lightning's dictionary. A directory stores its tensors with PyTorch's distributed checkpointing, each
rank its part, and the rest in rest.pt; any number of ranks, of any strategy, can resume from either form.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nxtp.errors import UserError, one_line, root_cause
from nxtp.model.weights import Spec, Weights, assign
from nxtp.runs.atomic import recover, remove, replace

OLD_FORMAT = "of an older nxtp, which can export it; its run cannot be resumed by this one: train again"
REST = "rest.pt"  # in a directory: what is not a tensor of the model or an optimizer
INDEX = ".metadata"  # PyTorch's
STAGERS_LAST = torch.__version__ >= (2, 13)  # older ones are closed by the first copy they make


class BackgroundCheckpoints(TorchCheckpointIO):
    """Copies a checkpoint, then writes it while training goes on: sharded weights to a directory, others to a file.

    It is written beside ``path`` and takes its place when it is complete. One is written at a time: the next save or
    load waits for it and raises its error.

    ``pause_s``  seconds that saving has held up the training, so far
    """

    def __init__(self) -> None:
        self.pause_s = 0.0
        self._kept_stager = _stager()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future] | None = None
        self._group: dist.ProcessGroup | None = None  # of its own: training's collectives go on meanwhile

    @property
    def _stager(self) -> DefaultStager:
        return self._kept_stager if STAGERS_LAST else _stager()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """A collective call if weights are sharded."""
        begin = time.perf_counter()
        self.wait()
        path = Path(path)
        if any(isinstance(tensor, DTensor) for tensor in checkpoint["state_dict"].values()):
            future = self._save_shards(checkpoint, path)
        else:
            future = self._pool.submit(_write_file, self._on_host(checkpoint), path)
        self._pending = path, future
        self.pause_s += time.perf_counter() - begin

    def _on_host(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A copy. PyTorch's stager, which pins memory, cannot copy the 8-bit blocks of torchao's optimizers."""
        tensors = (leaf for leaf in tree_leaves(checkpoint.get("optimizer_states")) if isinstance(leaf, Tensor))
        if all(type(tensor) is Tensor for tensor in tensors):
            return self._stager.stage(checkpoint)
        return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)

    def _save_shards(self, checkpoint: dict[str, Any], path: Path) -> Future:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        states = [state | {"state": {}} for state in checkpoint.get("optimizer_states", [])]
        rest = checkpoint | {"state_dict": {}, "optimizer_states": states}
        writer = _ShardWriter(path, copy.deepcopy(rest))
        return dcp.async_save(
            _flat(checkpoint), storage_writer=writer, process_group=self._group, async_stager=self._stager
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written; the one before it is unchanged.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        path, future = pending
        try:
            future.result()
        except (Exception, CheckpointException) as error:
            remove(_part(path))
            kept = f" The previous one is still in '{path}'." if path.exists() else ""
            raise UserError(
                f"The checkpoint '{path}' could not be written: {_reason(error)}.{kept} "
                "Free some space and run the same command again."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        self.wait()
        path = recover(Path(path)) or Path(path)
        return read_checkpoint(path) if path.is_dir() else read_file(path)

    def remove_checkpoint(self, path: Any) -> None:
        self.wait()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.wait()


def _stager() -> DefaultStager:
    gpu = torch.cuda.is_available()  # then copied to pinned memory, which is kept for the next
    return DefaultStager(StagingOptions(gpu, False, False, gpu))


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _write_file(checkpoint: dict[str, Any], path: Path) -> None:
    part = _part(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    remove(part)
    with part.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    replace(part, path)


class _ShardWriter(dcp.FileSystemWriter):
    """Writes to a directory beside ``path``, which the first rank renames when all ranks have written their part."""

    def __init__(self, path: Path, rest: dict[str, Any]):
        super().__init__(_part(path))
        self._final, self._rest = path, rest

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list) -> list:
        """Called on the first rank, before any rank writes: create the directory."""
        remove(_part(self._final))
        _part(self._final).mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise root_cause(error) from None  # the first rank gets it without what caused it

    def finish(self, metadata: Metadata, results: list) -> None:
        """Called on the first rank, after all ranks have written."""
        with (_part(self._final) / REST).open("wb") as file:
            torch.save(self._rest, file)
        super().finish(metadata, results)
        replace(_part(self._final), self._final)


def _flat(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by "state_dict/NAME" and "optimizer_states/OPTIMIZER/PARAMETER/PART"; parameters are numbered."""
    flat = {f"state_dict/{name}": tensor for name, tensor in checkpoint.get("state_dict", {}).items()}
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for number, parts in optimizer["state"].items():
            flat |= {f"optimizer_states/{index}/{number}/{part}": tensor for part, tensor in parts.items()}
    return flat


def read_file(path: Path) -> dict[str, Any]:
    """A checkpoint file's contents on the CPU, mapped rather than loaded: tensors and plain values, never code.

    Raises:
        UserError: missing, damaged, or it contains anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"No checkpoint '{path}'.") from None
    except Exception as error:  # damaged archives raise many types
        raise UserError(f"'{path}' cannot be read as a checkpoint: {_reason(error)}.") from error


def read_checkpoint(
    path: Path | str, target: Callable[[str, tuple[int, ...]], Tensor | None] | None = None
) -> dict[str, Any]:
    """Lightning's dictionary, from a file or a directory. With ``target`` in a process group, a collective call.

    Args:
        target: for each tensor, by its key in :class:`StoredCheckpoint` and its full shape, the tensor to fill, sharded
            or not; None skips it. By default all are read in full.

    Raises:
        UserError: missing, damaged, or not of this model.
    """
    stored = StoredCheckpoint(path)
    tensors = {}
    for key, spec in stored.specs.items():
        tensor = torch.empty(spec.shape, dtype=spec.dtype) if target is None else target(key, spec.shape)
        if tensor is not None:
            tensors[key] = tensor
    stored.read_into(tensors)
    checkpoint = stored.rest
    for key, tensor in tensors.items():
        kind, found, name = key.partition("/")
        if not found:
            raise UserError(f"'{path}' is {OLD_FORMAT}.")
        if kind == "state_dict":
            checkpoint[kind][name] = tensor
        else:
            optimizer, number, part = name.split("/")
            checkpoint[kind][int(optimizer)]["state"].setdefault(int(number), {})[part] = tensor
    return checkpoint


class StoredCheckpoint(Weights):
    """A checkpoint on disk: ``specs`` of its tensors, by the keys of :func:`_flat`; ``rest`` is everything else.

    Raises:
        UserError: missing or damaged.
    """

    def __init__(self, path: Path | str):
        self.path = recover(Path(path)) or Path(path)
        self._tensors: dict[str, Tensor] | None = None  # of a file; mapped, not loaded
        if self.path.is_dir():
            self.rest = read_file(self.path / REST)
            stored = TensorsOnly(self.path).read_metadata().state_dict_metadata
            self.specs = {key: Spec(tuple(entry.size), entry.properties.dtype) for key, entry in stored.items()}
        else:
            self.rest = read_file(self.path)
            self._tensors = _flat(self.rest)
            self.specs = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        self.read_into({name: tensor})
        return tensor

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors``, sharded or not; a collective call in a process group.

        Raises:
            UserError: the checkpoint is damaged, or not of this model.
        """
        try:
            if self._tensors is not None:
                for key, tensor in tensors.items():
                    assign(tensor, self._tensors[key])
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is one process
                dcp.load(tensors, storage_reader=TensorsOnly(self.path), no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            message = f"'{self.path}' cannot be read as a checkpoint of this model: {_reason(error)}."
            raise UserError(message) from error


class TensorsOnly(dcp.FileSystemReader):
    """Reads a directory of shards; its index, a pickle, may refer to what an index consists of and to nothing else.

    PyTorch would unpickle, in full, what an index declares to be bytes: only tensors are accepted.
    """

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        try:
            content = (Path(self.path) / INDEX).read_bytes()
        except OSError:
            raise UserError(f"'{self.path}' is not a complete checkpoint: it has no {INDEX}.") from None
        try:
            metadata = _IndexUnpickler(io.BytesIO(content)).load()
            stored = metadata.state_dict_metadata
            other = [name for name, entry in stored.items() if not isinstance(entry, TensorStorageMetadata)]
        except Exception as error:  # a damaged or hostile pickle raises many types
            raise UserError(f"'{self.path}' cannot be read as a checkpoint: {_reason(error)}.") from error
        if other:
            raise UserError(f"'{self.path}' is refused: {', '.join(other[:3])} is not a tensor.")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("pathlib", "PosixPath"),
        ("collections", "OrderedDict"),
    )

    def find_class(self, module: str, name: str) -> Any:
        listed = (module, name) in self._NAMES
        value = super().find_class(module, name) if listed or module in (*self._MODULES, "torch") else None
        if listed or isinstance(value, torch.dtype) or (isinstance(value, type) and value.__module__ in self._MODULES):
            return value
        raise pickle.UnpicklingError(f"a checkpoint's index does not need {module}.{name}")


def _reason(error: BaseException) -> str:
    """One line; of several ranks' errors the first. On a full disk PyTorch speaks of an unexpected position."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    error = root_cause(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:300].rstrip(".")
