"""A checkpoint in a directory of shards: every rank writes its own part, any number of ranks reads them.

Weights are kept by name, the optimiser's state by parameter name, what else there is in ``rest.pt``.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from nxtp.distributed.saving import Background, copied, not_written, read_file, reason_of
from nxtp.errors import UserError
from nxtp.runs.atomic import recover, remove, replace

REST = "rest.pt"  # what is not tensors of the model or the optimiser
INDEX = ".metadata"  # PyTorch's
GROUPS = "optimizer_groups"  # in the rest: each optimiser's parameter groups, by name


class ShardCheckpoints:
    """A checkpoint in a directory to which every rank writes its own part."""

    def __init__(self) -> None:
        self._background = Background()
        self._group: dist.ProcessGroup | None = None  # of its own: training's collectives go on meanwhile

    def save(self, model: nn.Module, optimizers: Sequence[Optimizer], rest: Mapping[str, Any], path: Path) -> None:
        """A collective call.

        Args:
            rest: what else belongs to the checkpoint; plain values and small tensors. The first rank's is kept.
        """
        self._background.wait()
        content = {**rest, GROUPS: [optimizer_groups(model, optimizer) for optimizer in optimizers]}
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        self._background.submit(self._write, copied(_named(model, optimizers)), copied(content), Path(path))

    def _write(self, tensors: dict[str, Tensor], rest: dict[str, Any], path: Path) -> None:
        aside, first = path.with_name(f".{path.name}.part"), dist.get_rank() == 0
        try:
            failed: list[str | None] = [None]
            if first:
                try:
                    remove(aside)
                    aside.mkdir(parents=True)
                    torch.save(rest, aside / REST)
                except (OSError, RuntimeError) as error:
                    failed = [reason_of(error)]
            dist.broadcast_object_list(failed, src=0, group=self._group)
            if failed[0] is not None:
                raise OSError(failed[0])
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside), process_group=self._group)
            if first:
                replace(aside, path)
        except (Exception, CheckpointException) as error:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            raise not_written(path, error) from error

    def load(self, model: nn.Module, optimizers: Sequence[Optimizer], path: Path) -> dict[str, Any]:
        """Fill model and optimisers, from a file too; the rest is returned. A collective call."""
        self._background.wait()
        path = recover(path) or path
        if not path.is_dir():
            checkpoint = read_file(path)
            states = checkpoint.pop("optimizer_states", [])
            named = [by_name(s, names_of(model, o)) for s, o in zip(states, optimizers, strict=False)]
            weights, options = checkpoint.pop("state_dict"), StateDictOptions(full_state_dict=True)
        else:
            checkpoint = read_file(path / REST)
            tensors = _named(model, optimizers)
            read_into(tensors, path)
            named = _optimizer_states(tensors, checkpoint.pop(GROUPS)[: len(optimizers)])
            weights, options = under("model.", tensors), StateDictOptions()
        set_model_state_dict(model, weights, options=options)
        for optimizer, state in zip(optimizers, named, strict=True):
            set_optimizer_state_dict(model, optimizer, optim_state_dict=state, options=options)
        return checkpoint

    def wait(self) -> None:
        self._background.wait()

    def close(self) -> None:
        self._background.close()


def _named(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Weights and optimiser state by name, sharded as they are."""
    tensors = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    for number, optimizer in enumerate(optimizers):
        state = get_optimizer_state_dict(model, optimizer)["state"]
        tensors |= {f"optimizer.{number}.{n}.{part}": t for n, parts in state.items() for part, t in parts.items()}
    return tensors


def _optimizer_states(tensors: Mapping[str, Tensor], groups: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"state": _by_parameter(under(f"optimizer.{number}.", tensors)), "param_groups": own}
        for number, own in enumerate(groups)
    ]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``{"a.b.exp_avg": t}`` → ``{"a.b": {"exp_avg": t}}``."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        state.setdefault(name, {})[part] = tensor
    return state


def read_shards(path: Path) -> dict[str, Any]:
    """A directory of shards as one process reads it whole: what :func:`read_file` gives of a file."""
    checkpoint = read_file(path / REST)
    specs = TensorsOnly(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(spec.size, dtype=spec.properties.dtype) for name, spec in specs.items()}
    read_into(tensors, path)
    checkpoint["state_dict"] = under("model.", tensors)
    checkpoint["optimizer_states"] = [by_number(s) for s in _optimizer_states(tensors, checkpoint.pop(GROUPS))]
    return checkpoint


def read_into(tensors: dict[str, Tensor], path: Path) -> None:
    """Fill ``tensors``, whole or sharded, from the shards of a checkpoint; a collective call where there are ranks.

    Raises:
        UserError: the checkpoint is damaged, or of another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            dcp.load(tensors, storage_reader=TensorsOnly(path), no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:
        raise UserError(f"'{path}' cannot be read as a checkpoint of this model: {reason_of(error)}.") from error


class TensorsOnly(dcp.FileSystemReader):
    """Reads a directory of shards; its index, a pickle, may name what an index is made of and nothing else.

    PyTorch would unpickle, in full, what an index declares to be bytes: only tensors are taken.
    """

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        try:
            content = (Path(self.path) / INDEX).read_bytes()
        except OSError:
            raise UserError(f"'{self.path}' is not a whole checkpoint: it has no {INDEX}.") from None
        try:
            metadata = _IndexUnpickler(io.BytesIO(content)).load()
            stored = metadata.state_dict_metadata
            other = [name for name, entry in stored.items() if not isinstance(entry, TensorStorageMetadata)]
        except Exception as error:  # a damaged or hostile pickle raises many types
            raise UserError(f"'{self.path}' cannot be read as a checkpoint: {reason_of(error)}.") from error
        if other:
            raise UserError(f"'{self.path}' is refused: {', '.join(other[:3])} is not a tensor.")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str) -> Any:
        plain = (module, name) in {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("pathlib", "PosixPath"),
            ("collections", "OrderedDict"),
        }
        value = super().find_class(module, name) if plain or module in (*self._MODULES, "torch") else None
        if plain or isinstance(value, torch.dtype) or (isinstance(value, type) and value.__module__ in self._MODULES):
            return value
        raise pickle.UnpicklingError(f"a checkpoint's index does not need {module}.{name}")


# The optimiser's state: PyTorch numbers parameters group by group, a sharded checkpoint names them.


def names_of(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of an optimiser's parameters, group by group: entry i is what it calls parameter i."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Its parameter groups with names in place of parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Numbered → named."""
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]],
    }


def by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """Named → numbered, in the order of the groups."""
    number = {name: i for i, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [{**group, "params": [number[n] for n in group["params"]]} for group in state["param_groups"]],
    }
