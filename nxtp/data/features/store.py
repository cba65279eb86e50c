"""Features of a frozen encoder, computed once and kept on disk: later epochs, runs and sweeps read them.

A store belongs to one encoder. What it keeps is found by the image's encoded bytes, not by where the image lies:
shards may be moved, mixed, cut down; an image that changed is simply not there. Parts are written whole, so that a run
that was killed goes on with the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nxtp.model.encoder import Encoder
from nxtp.errors import UserError
from nxtp.runs.atomic import write_json
from nxtp.model.weights import full_tensor

META = "features.json"
LOCK = ".lock"
DTYPES = ("float16", "float32")
KEY_BYTES = 16
_UNUSABLE = "unusable.npy"  # in a part: of which keys there is no image


def image_key(image: bytes) -> bytes:
    """What an image's features are found by: a hash of its encoded bytes."""
    return hashlib.blake2b(image, digest_size=KEY_BYTES).digest()


def fingerprint(encoder: Encoder) -> str:
    """Of all that its tokens depend on: architecture, input, weights. A collective call where they are sharded."""
    config = {k: v for k, v in asdict(encoder.config).items() if k != "pretrained"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(full_tensor(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Meta:
    """What a store holds: image tokens [tokens, width] as ``dtype``, of the encoder with this fingerprint."""

    encoder: str
    tokens: int
    width: int
    dtype: str
    format: int = 1

    @property
    def bytes_each(self) -> int:
        return self.tokens * self.width * np.dtype(self.dtype).itemsize


class FeatureStore:
    """Reads a store, by image.

    Raises:
        UserError: no store, or one that is damaged.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            self.meta = Meta(**json.loads((self.directory / META).read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"No features in '{directory}': make them with nxtp features (docs/training.md).") from None
        except OSError as error:
            raise UserError(f"'{self.directory / META}' cannot be read: {error}.") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"'{self.directory / META}' is damaged ({error}): make the features again.") from error
        self.parts = sorted(self.directory.glob("part-*"))
        opened = [self._open(part) for part in self.parts]
        sizes = [len(keys) for keys, _, _ in opened]
        every = np.concatenate([keys for keys, _, _ in opened]) if opened else np.empty(0, f"S{KEY_BYTES}")
        order = np.argsort(every, kind="stable")
        self._keys = every[order]
        self._part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
        self._row = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes] or [np.empty(0, np.int32)])[order]
        self._unusable = np.concatenate([unusable for _, unusable, _ in opened] or [np.empty(0, bool)])[order]
        self._begin = [begin for _, _, begin in opened]  # of each part's tokens, in its file

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def _find(self, key: bytes) -> int | None:
        stored = np.array(key, dtype=f"S{KEY_BYTES}")
        place = int(np.searchsorted(self._keys, stored))
        return place if place < len(self._keys) and self._keys[place] == stored else None

    def read(self, image: bytes) -> Tensor | None:
        """Features [N, D_encoder] of an image's encoded bytes; None for one that could not be decoded.

        Raises:
            KeyError: the store has no such image.
            UserError: its file is gone or cut short.
        """
        place = self._find(image_key(image))
        if place is None:
            raise KeyError(self.directory)
        if self._unusable[place]:
            return None
        part, row = int(self._part[place]), int(self._row[place])
        path = self.parts[part] / "tokens.npy"
        offset = self._begin[part] + row * self.meta.bytes_each
        try:  # not kept open: a store of terabytes has more parts than a process may have files
            values = np.fromfile(path, self.meta.dtype, self.meta.tokens * self.meta.width, offset=offset)
            return torch.from_numpy(values.reshape(self.meta.tokens, self.meta.width))
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read ({error}).") from error

    def _open(self, part: Path) -> tuple[np.ndarray, np.ndarray, int]:
        """A part's keys and which have no image, [n] each, and where its tokens begin.

        Raises:
            UserError: a file is missing, cut short, or not of this store.
        """
        try:
            keys, unusable = (np.load(part / name, allow_pickle=False) for name in ("keys.npy", _UNUSABLE))
            tokens = np.load(part / "tokens.npy", mmap_mode="r", allow_pickle=False)
            if tokens.shape != (len(keys), self.meta.tokens, self.meta.width) or tokens.dtype != self.meta.dtype:
                raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}, not those of {len(keys)} images")
            if keys.shape != (len(keys), KEY_BYTES) or keys.dtype != np.uint8 or unusable.shape != (len(keys),):
                raise ValueError("keys of another kind")
        except (FileNotFoundError, NotADirectoryError, EOFError, TypeError, ValueError) as error:
            raise UserError(f"'{part}' is damaged ({error}): delete it and run nxtp features again.") from error
        except OSError as error:
            raise UserError(f"'{part}' cannot be read: {error}.") from error
        return keys.view(f"S{KEY_BYTES}").ravel(), unusable, tokens.offset

    def check(self, encoder: Encoder) -> None:
        """
        Raises:
            UserError: the store is another encoder's.
        """
        if (self.meta.tokens, self.meta.width) != (encoder.num_tokens, encoder.width):
            raise UserError(
                f"data.features: '{self.directory}' holds {self.meta.tokens} tokens of width {self.meta.width}; this "
                f"encoder has {encoder.num_tokens} of {encoder.width}."
            )
        if self.meta.encoder != fingerprint(encoder):
            raise UserError(
                f"data.features: '{self.directory}' was made with another encoder (its weights, input or architecture "
                "differ): make features for this one in a directory of its own."
            )


class FeatureWriter:
    """Adds parts to a store. Each is written aside and renamed; one writer at a time.

    Raises:
        UserError: the directory cannot be written, is another encoder's, or another process is writing there.
    """

    def __init__(self, directory: Path, meta: Meta):
        self.directory, self.meta = directory, meta
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / LOCK).open("w")  # held until this process ends, however it ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (directory / META).exists():
                write_json(directory / META, asdict(meta))
        except BlockingIOError:
            raise UserError(f"Another nxtp features is writing to '{directory}': wait for it.") from None
        except OSError as error:
            raise UserError(f"'{directory}' cannot be written: {error}.") from error
        if FeatureStore(directory).meta != meta:
            raise UserError(f"'{directory}' holds features of another encoder or dtype: choose another directory.")
        for left in directory.glob(".part-*"):
            shutil.rmtree(left)

    def check_room(self, images: int) -> None:
        """
        Raises:
            UserError: so many images' features will not fit on the disk.
        """
        needed, free = images * self.meta.bytes_each, shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"The features of {images:,} images need {needed / 1e9:,.1f} GB in '{self.directory}', where "
                f"{free / 1e9:,.1f} GB are free. Name another directory, or fewer images (data.fraction)."
            )

    def write(self, keys: Sequence[bytes], tokens: np.ndarray, unusable: np.ndarray) -> None:
        """
        Args:
            tokens: [n, N, D_encoder]; of an image that could not be decoded anything.
            unusable: bool [n], which those are.

        Raises:
            UserError: the disk is full, or refuses.
        """
        number = 1 + max((int(p.name[5:]) for p in self.directory.glob("part-*")), default=-1)
        aside, part = self.directory / f".part-{number:06d}", self.directory / f"part-{number:06d}"
        try:
            aside.mkdir()
            np.save(aside / "keys.npy", np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES))
            np.save(aside / "tokens.npy", tokens.astype(self.meta.dtype, copy=False))
            np.save(aside / _UNUSABLE, unusable)
            os.rename(aside, part)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"'{part}' cannot be written: {error}. What was made before stays.") from error


def in_parts(batches: Iterator[tuple[list[bytes], Tensor, np.ndarray]], size: int) -> Iterator[tuple]:
    """Batches of (keys, tokens, unusable) joined to parts of at least ``size`` images; the last may be smaller."""
    held: list[tuple] = []
    for batch in batches:
        held.append(batch)
        if sum(len(keys) for keys, _, _ in held) >= size:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(held: list[tuple]) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    keys, tokens, unusable = zip(*held, strict=True)
    return [k for each in keys for k in each], torch.cat(tokens).numpy(), np.concatenate(unusable)
