"""Image → the encoder's input pixels: the same for shards, evaluation and prediction."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize the short side to ``size`` (bicubic), crop the centre: uint8 [3, size, size].

    As in CLIP's preprocessing; the mean and standard deviation are applied by the encoder. An RGB image of
    size × size comes out unchanged.
    """
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        # Crop first, in the source's coordinates: a strip of a very long image costs no more than its centre.
        left, top = (width - size) // 2, (height - size) // 2
        box = (left / scale, top / scale, (left + size) / scale, (top + size) / scale)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
