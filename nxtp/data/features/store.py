"""Features of a frozen encoder on disk: computed once, read by later epochs, runs and sweeps.

Features are found by the image's encoded bytes: shards may be moved, mixed or cut down, and an image that changed has
no features. Parts are written whole, so that a killed command continues with the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nxtp.errors import UserError
from nxtp.model.encoder import Encoder
from nxtp.model.weights import full_tensor
from nxtp.runs.atomic import atomic_directory, write_json

META = "features.json"
LOCK = ".lock"
DTYPES = ("float16", "float32")
KEY_BYTES = 16
Part = tuple[Sequence[bytes], np.ndarray, np.ndarray]  # keys [n], tokens [n, N, D_encoder], unusable bool [n]


def image_key(image: bytes) -> bytes:
    """The key of an image's features: a hash of its encoded bytes."""
    return hashlib.blake2b(image, digest_size=KEY_BYTES).digest()


def fingerprint(encoder: Encoder) -> str:
    """A hash of the encoder's architecture, input and weights. A collective call if the weights are sharded."""
    unsaid = {"interpolation": "bicubic", "resize_mode": "shortest"}.items()  # in the stores of before
    config = {k: v for k, v in asdict(encoder.config).items() if k != "pretrained" and (k, v) not in unsaid}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(full_tensor(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Meta:
    """features.json: image tokens [tokens, width] as ``dtype``, of the encoder with this fingerprint."""

    encoder: str
    tokens: int
    width: int
    dtype: str
    format: int = 1

    @property
    def bytes_each(self) -> int:
        """Of one image's features."""
        return self.tokens * self.width * np.dtype(self.dtype).itemsize


class FeatureStore:
    """Reads a store, by image.

    Raises:
        UserError: no store, or a damaged one.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            self.meta = Meta(**json.loads((self.directory / META).read_text()))
        except (FileNotFoundError, NotADirectoryError):
            message = f"No features in '{directory}': compute them with nxtp features (docs/training.md)."
            raise UserError(message) from None
        except OSError as error:
            raise UserError(f"'{self.directory / META}' cannot be read: {error}.") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"'{self.directory / META}' is damaged ({error}): compute the features again.") from error
        self.parts = sorted(self.directory.glob("part-*"))
        opened = [self._open(part) for part in self.parts]
        sizes = [len(keys) for keys, _, _ in opened]
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(keys for keys, _, _ in opened)])
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
        self._row = np.concatenate([np.arange(n, dtype=np.int32) for n in (0, *sizes)])[order]
        self._unusable = np.concatenate([np.empty(0, bool), *(unusable for _, unusable, _ in opened)])[order]
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
            UserError: its file is missing or truncated.
        """
        place = self._find(image_key(image))
        if place is None:
            raise KeyError(self.directory)
        if self._unusable[place]:
            return None
        part, row = int(self._part[place]), int(self._row[place])
        path = self.parts[part] / "tokens.npy"
        offset = self._begin[part] + row * self.meta.bytes_each
        try:  # opened each time: a store of terabytes has more parts than a process may have files
            values = np.fromfile(path, self.meta.dtype, self.meta.tokens * self.meta.width, offset=offset)
            return torch.from_numpy(values.reshape(self.meta.tokens, self.meta.width))
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read ({error}).") from error

    def _open(self, part: Path) -> tuple[np.ndarray, np.ndarray, int]:
        """A part's keys and which could not be decoded, [n] each, and the offset of its tokens in their file."""
        try:
            keys, unusable = (np.load(part / f"{name}.npy") for name in ("keys", "unusable"))
            tokens = np.load(part / "tokens.npy", mmap_mode="r")
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
        """Check that the features are those of ``encoder``.

        Raises:
            UserError: they are another encoder's.
        """
        if (self.meta.tokens, self.meta.width) != (encoder.num_tokens, encoder.width):
            raise UserError(
                f"data.features: '{self.directory}' has {self.meta.tokens} tokens of width {self.meta.width}; this "
                f"encoder has {encoder.num_tokens} of {encoder.width}."
            )
        if self.meta.encoder != fingerprint(encoder):
            raise UserError(
                f"data.features: '{self.directory}' was computed with another encoder (weights, input or architecture "
                "differ): compute features of this one in another directory."
            )


class FeatureWriter:
    """Adds parts to a store; one command at a time, of one or several ranks.

    Args:
        share: (rank, number of ranks). The first rank's writer comes first: it creates the store.

    Raises:
        UserError: the directory cannot be written, is another encoder's, or another command writes to it.
    """

    def __init__(self, directory: Path, meta: Meta, share: tuple[int, int] = (0, 1)):
        self.directory, self.meta, self.share = directory, meta, share
        if share[0] > 0:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / LOCK).open("w")
            weakref.finalize(self, lock.close)  # held as long as this writer is, or until the process ends, however
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (directory / META).exists():
                write_json(directory / META, asdict(meta))
        except BlockingIOError:
            raise UserError(f"Another nxtp features writes to '{directory}': wait for it.") from None
        except OSError as error:
            raise UserError(f"'{directory}' cannot be written: {error}.") from error
        if FeatureStore(directory).meta != meta:
            raise UserError(f"'{directory}' has features of another encoder or dtype: choose another directory.")
        for unfinished in directory.glob(".part-*"):
            shutil.rmtree(unfinished)

    def check_room(self, images: int) -> None:
        """Check that the features of so many images fit on the disk.

        Raises:
            UserError: they do not.
        """
        needed, free = images * self.meta.bytes_each, shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(
                f"The features of {images:,} images need {needed / 1e9:,.1f} GB in '{self.directory}', where "
                f"{free / 1e9:,.1f} GB are free. Use another directory, or fewer images (data.fraction)."
            )

    def write(self, keys: Sequence[bytes], tokens: np.ndarray, unusable: np.ndarray) -> None:
        """Add a part, whole or not at all.

        Args:
            tokens: [n, N, D_encoder]; anything for an image that could not be decoded.
            unusable: bool [n], which those are.

        Raises:
            UserError: it cannot be written.
        """
        rank, ranks = self.share
        last = max((int(p.name[5:]) for p in self.directory.glob("part-*")), default=-1)
        number = last + 1 + (rank - last - 1) % ranks  # the next that no other rank writes
        part = self.directory / f"part-{number:06d}"
        try:
            with atomic_directory(part) as new:
                np.save(new / "keys.npy", np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES))
                np.save(new / "tokens.npy", tokens.astype(self.meta.dtype, copy=False))
                np.save(new / "unusable.npy", unusable)
                for file in new.iterdir():  # NumPy is silent about a file's last 4 KB that found no room
                    np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"'{part}' cannot be written: {error}. Earlier parts remain.") from error


def in_parts(batches: Iterator[Part], size: int) -> Iterator[Part]:
    """Batches joined to parts of at least ``size`` images; the last may be smaller."""
    held: list[Part] = []
    for batch in batches:
        held.append(batch)
        if sum(len(keys) for keys, _, _ in held) >= size:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(held: list[Part]) -> Part:
    keys, tokens, unusable = zip(*held, strict=True)
    return [key for each in keys for key in each], np.concatenate(tokens), np.concatenate(unusable)
