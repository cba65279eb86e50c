"""Image → input pixels without torch: to the bit what :func:`nxtp.data.transforms.to_pixels` gives.

torch resizes uint8 as two passes of whole numbers: 16-bit weights, columns first, each pass rounded to uint8.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from nxtp.data.images import middle_of_strip

_A = -0.5  # of the cubic kernel: Keys's, as Pillow has it


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Short side resized to ``size`` (bicubic, antialiased), the centre cut out: uint8 [3, size, size]."""
    image, short = middle_of_strip(image), min(image.size)
    pixels = np.array(image, dtype=np.uint8)
    if image.size != (size, size):
        height, width = (int(size * side / short) for side in pixels.shape[:2])
        top, left = (round((side - size) / 2) for side in (height, width))
        pixels = _resized(pixels.swapaxes(0, 1), width, left, size).swapaxes(0, 1)
        pixels = _resized(pixels, height, top, size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _resized(pixels: np.ndarray, length: int, first: int, count: int) -> np.ndarray:
    """Rows ``first`` to ``first + count`` of ``pixels`` [n, …] resized to ``length`` rows."""
    if length == len(pixels):
        return pixels[first : first + count]
    starts, weights = _weights(len(pixels), length)
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


def _weights(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row after resizing the first row it is made of, and the weights from there: [after], [after, taps]."""
    scale = before / after
    wide = max(scale, 1.0)
    support = 2 * wide
    centres = scale * (np.arange(after) + 0.5)
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + support + 0.5).astype(np.int64), before)
    taps = np.arange(int(np.ceil(support)) * 2 + 1)
    weights = _cubic((taps + starts[:, None] - centres[:, None] + 0.5) / wide)
    weights[taps >= (ends - starts)[:, None]] = 0.0
    return starts, weights / weights.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * _A - 4 * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _precision(highest: float) -> int:
    """How many bits the weights are shifted by: as many as the highest of them has room for in 16 bits, at most 22."""
    precision = 0
    while precision < 22 and int(0.5 + highest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return precision
