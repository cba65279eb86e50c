"""Image → input pixels without torch: to the bit what :func:`nxtp.data.transforms.to_pixels` gives.

torch resizes uint8 as two passes of whole numbers: 16-bit weights, columns first, each pass rounded to uint8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from nxtp.data.images import placed

Kernel = Callable[[np.ndarray], np.ndarray]
_A = -0.5  # of the cubic kernel: Keys's, as Pillow has it


def to_pixels(
    image: Image.Image, size: int, interpolation: str = "bicubic", resize_mode: str = "shortest"
) -> np.ndarray:
    """uint8 [3, size, size]."""
    image, (height, width), (top, left) = placed(image, size, resize_mode)
    pixels = np.array(image, dtype=np.uint8)
    if image.size != (size, size):
        pixels = _resized(pixels.swapaxes(0, 1), width, left, size, interpolation).swapaxes(0, 1)
        pixels = _resized(pixels, height, top, size, interpolation)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _resized(pixels: np.ndarray, length: int, first: int, count: int, interpolation: str) -> np.ndarray:
    """Rows ``first`` to ``first + count`` of ``pixels`` [n, …] resized to ``length`` rows; zero beyond them."""
    if first < 0 or first + count > length:
        inside = _resized(pixels, length, 0, length, interpolation)
        return np.pad(inside, [(-first, first + count - length)] + [(0, 0)] * (pixels.ndim - 1))
    if length == len(pixels):
        return pixels[first : first + count]
    starts, weights = _weights(len(pixels), length, *KERNELS[interpolation])
    precision = _precision(weights.max())
    whole = np.trunc(weights * (1 << precision) + np.copysign(0.5, weights))
    flat = pixels.reshape(len(pixels), -1)
    rows = np.empty((count, flat.shape[1]), dtype=np.uint8)
    for i in range(count):
        start = starts[first + i]
        taps = whole[first + i][: len(pixels) - start]
        total = taps @ flat[start : start + len(taps)].astype(np.float64)  # below 2^53: exact
        rows[i] = np.clip(np.floor((total + (1 << (precision - 1))) / (1 << precision)), 0, 255)
    return rows.reshape(count, *pixels.shape[1:])


def _weights(before: int, after: int, radius: int, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """For each row after resizing the first row it is made of, and the weights from there: [after], [after, taps]."""
    scale = before / after
    wide = max(scale, 1.0)
    support = radius * wide
    centres = scale * (np.arange(after) + 0.5)
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + support + 0.5).astype(np.int64), before)
    taps = np.arange(int(np.ceil(support)) * 2 + 1)
    weights = kernel((taps + starts[:, None] - centres[:, None] + 0.5) / wide)
    weights[taps >= (ends - starts)[:, None]] = 0.0
    return starts, weights / weights.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * _A - 4 * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0.0)


KERNELS: dict[str, tuple[int, Kernel]] = {"bicubic": (2, _cubic), "bilinear": (1, _linear)}  # with their radius


def _precision(highest: float) -> int:
    """How many bits the weights are shifted by: as many as the highest of them has room for in 16 bits, at most 22."""
    precision = 0
    while precision < 22 and int(0.5 + highest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return precision
