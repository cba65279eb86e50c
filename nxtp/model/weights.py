"""Weights on disk, read and written tensor by tensor: a conversion needs memory for one tensor, not for a model."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nxtp.errors import UserError, some_of
from nxtp.model.hub import reason

MODEL_FILE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 1 << 23  # 60,000 tensors
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Spec(NamedTuple):
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights(ABC):
    """Named tensors on disk: ``specs`` describes them, :meth:`read` loads one."""

    specs: dict[str, Spec]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU."""


class SafetensorsFiles(Weights):
    """One or several safetensors files as one set of names."""

    def __init__(self, paths: Sequence[Path]):
        self.specs, self._file = {}, {}
        for path in paths:
            try:
                if path.exists() and not path.is_file():
                    raise UserError(f"'{path}' is not a regular file.")
                with path.open("rb") as start:
                    if int.from_bytes(start.read(8), "little") > _MAX_HEADER_BYTES:
                        raise UserError(f"'{path}' cannot be read as safetensors: its header is too long.")
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        part = file.get_slice(name)
                        self.specs[name] = Spec(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                        self._file[name] = path
            except FileNotFoundError:
                raise UserError(f"No file '{path}'.") from None
            except (SafetensorError, OSError, KeyError) as error:
                raise UserError(f"'{path}' cannot be read as safetensors: {reason(error)}.") from error

    def read(self, name: str) -> Tensor:
        with safe_open(self._file[name], framework="pt") as file:
            return file.get_tensor(name)


def write_safetensors(
    path: Path | None, specs: Mapping[str, Spec], read: Callable[[str], Tensor], track: Callable = iter
) -> None:
    """Write a safetensors file one tensor at a time; ``safetensors.torch.save_file`` needs all tensors at once.

    The format: an 8-byte length, a JSON header, the tensors' bytes end to end; wide types first, for their alignment.

    Args:
        path: None on ranks that only contribute their parts of sharded tensors: they read, and write nothing.
        read: gives the tensor of a name, of the announced shape and dtype.
        track: wraps the list of names, to show progress.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    if path is None:
        for name in names:
            read(name)
        return
    for name in names:
        shape, dtype = specs[name]
        start, end = end, end + specs[name].bytes
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in track(names):
            tensor = read(name).detach().to("cpu").contiguous()
            if Spec.of(tensor) != specs[name]:
                raise ValueError(f"{name}: announced {specs[name]}, got {Spec.of(tensor)}")
            if tensor.numel():
                file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def mismatch(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """How the tensors ``found`` (name → shape) differ from those ``expected``; '' if they do not."""
    shapes = [
        f"{name}: {_times(found[name])}, expected {_times(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    kinds = {"missing": missing, "surplus": surplus, "of another shape": shapes}
    return "; ".join(f"{len(names)} {kind} ({some_of(names)})" for kind, names in kinds.items() if names)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


class ComputesBuffers(nn.Module):
    """A module that computes its buffers again wherever it is moved or cast: they stay float32, and none is stored."""

    def compute_buffers(self) -> None:
        """Replace each computed buffer, on the device where it is."""
        raise NotImplementedError

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:  # what .to(), .bfloat16() and .to_empty() call
        super()._apply(fn, recurse)
        self.compute_buffers()
        return self


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on every rank; a collective call where it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Copy the full tensor, which every rank has, into a parameter; a sharded one takes its own part."""
    if hasattr(parameter, "full_tensor"):  # a DTensor; importing its class takes half as long as importing torch
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        full = distribute_tensor(full.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(full)
