"""Weight files as they are given out: PyTorch's pickles, TorchScript archives, safetensors. No code in them is run."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxtp.errors import UserError
from nxtp.model.hub import reason
from nxtp.model.weights import SafetensorsFiles, Spec, Weights


def open_weights(path: Path) -> Weights:
    """A weight file of any format, recognised by its contents.

    Raises:
        UserError: a file that is missing, truncated or of another format.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFiles([path])
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return TorchScriptFile(path)
    return PickledFile(path)


MAPPED_BYTES = 1 << 28  # read from a file before it is mapped again


class PickledFile(Weights):
    """Tensors of a PyTorch pickle, at the top or under ``model`` or ``state_dict``.

    ``extra`` has the plain values beside them. The file is memory-mapped again after every :data:`MAPPED_BYTES`, so
    that no more of its pages stay in memory; a file from before PyTorch 1.6 cannot be mapped and is read at once.

    Raises:
        UserError: a file that is missing, truncated, not one of tensors, or that would run code.
    """

    def __init__(self, path: Path):
        self.path, self._is_mapped = path, zipfile.is_zipfile(path)
        content = self._content()
        is_mapping = isinstance(content, Mapping)
        self._key = next((key for key in ("model", "state_dict") if is_mapping and key in content), None)
        state = content if self._key is None else content[self._key]
        if not isinstance(state, Mapping):
            raise UserError(f"'{path}' contains {type(state).__name__}, not named tensors.")
        self._state, self._bytes_read = state, 0
        self.specs = {name: Spec.of(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}
        self.extra = {k: v for k, v in content.items() if isinstance(v, (int, float, str))} if self._key else {}
        if not self.specs:
            raise UserError(f"'{path}' contains no tensors.")

    def _content(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._is_mapped)
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"'{self.path}' is not a file.") from None
        except pickle.UnpicklingError as error:
            problem = f"damaged, or it contains more than tensors and plain values ({reason(error)})"
            raise UserError(f"'{self.path}' is refused: {problem}.") from error
        except Exception as error:  # damaged archives raise many types
            raise UserError(f"'{self.path}' is truncated, or not a PyTorch file ({reason(error)}).") from error

    def read(self, name: str) -> Tensor:
        if self._is_mapped and self._bytes_read > MAPPED_BYTES:
            content = self._content()
            self._state, self._bytes_read = content if self._key is None else content[self._key], 0
        tensor = self._state[name].clone()
        self._bytes_read += tensor.nbytes
        return tensor


class TorchScriptFile(Weights):
    """Parameters and buffers of a TorchScript archive (OpenAI's CLIP files, up to 0.9 GB), read at once.

    Its program is not loaded: the unpickler knows tensors and modules, and refuses everything else.

    Raises:
        UserError: a file that is truncated, not an archive of tensors, or that would run code.
    """

    def __init__(self, path: Path):
        try:
            with zipfile.ZipFile(path) as archive:
                pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(pickled) as file:
                    self._tensors = dict(_TensorsOnly(file, archive, pickled.removesuffix(".pkl")).load().tensors())
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise UserError(f"'{path}' cannot be read: truncated, or not a TorchScript archive.") from error
        except Exception as error:  # a damaged or hostile pickle raises many types
            raise UserError(f"'{path}' is refused: it is not a module of tensors ({reason(error)}).") from error
        self.specs = {name: Spec.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class _Module:
    """A TorchScript object: its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in self.attributes.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Module):
                yield from value.tensors(f"{prefix}{name}.")


class _TensorsOnly(pickle.Unpickler):
    """Knows tensors, modules and plain values; imports nothing."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, storages: str):
        super().__init__(file)
        self._archive, self._storages = archive, storages

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name.endswith("Storage"):  # FloatStorage → torch.float
            return getattr(torch, name.removesuffix("Storage").lower(), None)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: storage.as_strided(shape, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":
            return list  # lists of numbers or of tensors: not parameters
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, identity: Any) -> Tensor:
        kind, dtype, key, *_ = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something that is not a tensor's storage")
        return torch.frombuffer(bytearray(self._archive.read(f"{self._storages}/{key}")), dtype=dtype)
