"""Image → the encoder's input pixels: the same for shards, evaluation and prediction."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from nxtp.data.images import middle_of_strip


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize the short side to ``size`` (bicubic, antialiased), crop the centre: uint8 [3, size, size].

    CLIP's preprocessing, as torchvision's Resize and CenterCrop do it on an RGB image, but three times faster: a pixel
    in 200 differs by one level. The mean and standard deviation are applied by the encoder. An image of size × size
    comes out unchanged.
    """
    image, short = middle_of_strip(image), min(image.size)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    if image.size != (size, size):
        height, width = (int(size * side / short) for side in pixels.shape[1:])
        pixels = interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
        top, left = (round((side - size) / 2) for side in (height, width))
        pixels = pixels[:, top : top + size, left : left + size]
    return pixels.contiguous()
