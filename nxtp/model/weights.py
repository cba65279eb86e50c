"""Weight files, one tensor at a time: safetensors, PyTorch's pickles, TorchScript archives. No code in them is run.

A checkpoint of many gigabytes is described without loading it, and read and written tensor by tensor: a conversion
needs memory for one tensor, not for a model.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nxtp.errors import UserError
from nxtp.model.hub import reason

MODEL_FILE = "model.safetensors"
_TYPES = (  # torch's dtype, its name in safetensors, its storage class in pickles
    (torch.float64, "F64", "DoubleStorage"),
    (torch.float32, "F32", "FloatStorage"),
    (torch.float16, "F16", "HalfStorage"),
    (torch.bfloat16, "BF16", "BFloat16Storage"),
    (torch.int64, "I64", "LongStorage"),
    (torch.int32, "I32", "IntStorage"),
    (torch.int16, "I16", "ShortStorage"),
    (torch.int8, "I8", "CharStorage"),
    (torch.uint8, "U8", "ByteStorage"),
    (torch.bool, "BOOL", "BoolStorage"),
)
_NAMES = {dtype: name for dtype, name, _ in _TYPES}
_DTYPES = {name: dtype for dtype, name, _ in _TYPES}
_STORAGES = {storage: dtype for dtype, _, storage in _TYPES}


class Spec(NamedTuple):
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

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


class PickledFile(Weights):
    """Tensors of a PyTorch pickle, at the top or under one of ``keys``; ``extra`` has the plain values beside them.

    Read with ``weights_only=True`` and memory-mapped, anew for each tensor, so that pages do not stay in memory.
    """

    def __init__(self, path: Path, keys: Sequence[str] = ("model", "state_dict")):
        self.path = Path(path)
        content = self._content()
        self._key = next((key for key in keys if isinstance(content, Mapping) and key in content), None)
        state = content if self._key is None else content[self._key]
        if not isinstance(state, Mapping):
            raise UserError(f"'{path}' contains {type(state).__name__}, not named tensors.")
        self.specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in state.items() if isinstance(t, Tensor)}
        self.extra = {k: v for k, v in content.items() if isinstance(v, (int, float, str))} if self._key else {}
        if not self.specs:
            raise UserError(f"'{path}' contains no tensors.")

    def _content(self) -> Any:
        try:
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(self.path, map_location="cpu", weights_only=True)  # written before PyTorch 1.6
        except FileNotFoundError:
            raise UserError(f"No file '{self.path}'.") from None
        except IsADirectoryError:
            raise UserError(f"'{self.path}' is a directory: give a file.") from None
        except pickle.UnpicklingError as error:
            problem = f"damaged, or it contains more than tensors and plain values ({reason(error)})"
            raise UserError(f"'{self.path}' is refused: {problem}.") from error
        except Exception as error:  # damaged archives raise many types
            raise UserError(f"'{self.path}' is truncated, or not a PyTorch file ({reason(error)}).") from error

    def read(self, name: str) -> Tensor:
        content = self._content()
        return (content if self._key is None else content[self._key])[name].clone()


class TorchScriptFile(Weights):
    """Parameters and buffers of a TorchScript archive (OpenAI's CLIP files), read without loading its program.

    The unpickler knows tensors and modules, which become dictionaries of attributes; it refuses everything else.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self._prefix = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
                with archive.open(f"{self._prefix}data.pkl") as file:
                    self._parts = dict(_walk(_TensorsOnly(file).load()))
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise UserError(f"'{path}' cannot be read: truncated, or not a TorchScript archive.") from error
        except Exception as error:  # a damaged or hostile pickle raises many types
            raise UserError(f"'{path}' is refused: it is not a module of tensors ({reason(error)}).") from error
        self.specs = {name: Spec(part.shape, part.dtype) for name, part in self._parts.items()}
        if not self.specs:
            raise UserError(f"'{path}' contains no tensors.")

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a file is a TorchScript archive, rather than a PyTorch pickle."""
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())

    def read(self, name: str) -> Tensor:
        part = self._parts[name]
        try:
            with zipfile.ZipFile(self.path) as archive:
                content = bytearray(archive.read(f"{self._prefix}data/{part.key}"))
            storage = torch.frombuffer(content, dtype=part.dtype)
            return storage.as_strided(part.shape, part.stride, part.offset).clone()
        except (KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"'{self.path}' is damaged at '{name}' ({reason(error)}).") from error


class _StoredTensor(NamedTuple):
    """Where an archive stores a tensor."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """A TorchScript object's attributes."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _TensorsOnly(pickle.Unpickler):
    """Knows tensors (as :class:`_StoredTensor`), modules (as :class:`_Module`) and plain values; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _stored_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":
            return list  # lists of numbers or of tensors: not parameters
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, identity: Any) -> tuple[str, torch.dtype]:
        kind, dtype, key, _location, _count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something that is not a tensor's storage")
        return str(key), dtype


def _stored_tensor(storage: tuple[str, torch.dtype], offset: int, shape, stride, *_) -> _StoredTensor:
    return _StoredTensor(storage[0], storage[1], int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def _walk(module: Any, prefix: str = "") -> Iterable[tuple[str, _StoredTensor]]:
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, _StoredTensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{name}.")


def open_weights(path: Path) -> Weights:
    """A weight file of any format, recognised by its contents.

    Raises:
        UserError: a file that is missing, truncated or of another format.
    """
    if not path.is_file():
        raise UserError(f"No file '{path}'.")
    if path.suffix == ".safetensors":
        return SafetensorsFiles([path])
    return TorchScriptFile(path) if TorchScriptFile.recognises(path) else PickledFile(path)


def write_safetensors(
    path: Path, specs: Mapping[str, Spec], read: Callable[[str], Tensor], track: Callable = iter
) -> None:
    """Write a safetensors file one tensor at a time; ``safetensors.torch.save_file`` needs all tensors at once.

    The format: an 8-byte length, a JSON header, the tensors' bytes end to end; wide types first, for their alignment.

    Args:
        read: gives the tensor of a name, of the announced shape and dtype.
        track: wraps the list of names, to show progress.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    names = _file_order(specs)
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
            if (tuple(tensor.shape), tensor.dtype) != specs[name]:
                raise ValueError(f"{name}: announced {specs[name]}, got {tuple(tensor.shape)} {tensor.dtype}")
            if tensor.numel():
                file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def _file_order(specs: Mapping[str, Spec]) -> list[str]:
    return sorted(specs, key=lambda name: -specs[name].dtype.itemsize)


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


def write_module(path: Path | None, module: nn.Module, skip: Collection[str] = ()) -> None:
    """Write a module's state as safetensors, one tensor at a time.

    Args:
        path: None on ranks that only contribute their parts of a sharded module's tensors.
        skip: names of tensors to skip: those tied to another one.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in skip}
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    if path is not None:
        write_safetensors(path, specs, lambda name: full_tensor(state[name]))
    else:
        for name in _file_order(specs):
            full_tensor(state[name])
