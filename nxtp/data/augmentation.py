"""`data.transforms`: random changes of training images, the same for a sample in an epoch however often it is read."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from nxtp.config import instantiated
from nxtp.errors import UserError, one_line


class Augmentation:
    """The steps of ``data.transforms`` in their order: RGB image → RGB image of any size.

    Raises:
        UserError: a step cannot be instantiated.
    """

    def __init__(self, steps: Mapping[str, Any]):
        given = {f"data.transforms.{name}": node for name, node in steps.items() if node is not None}
        self.steps = {name: instantiated(node, name) for name, node in given.items()}

    def __call__(self, image: Image.Image, seed: int, sample: str) -> Image.Image:
        """
        Args:
            seed: ≥ 0, < 2³²; of the random numbers of torch, numpy and Python, whose states do not change.
            sample: its name, for messages.

        Raises:
            UserError: a step fails, or returns no RGB image.
        """
        with isolate_rng(include_cuda=False):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs too
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            for name, step in self.steps.items():
                try:
                    image = step(image)
                except Exception as error:
                    reason = one_line(error)
                    raise UserError(f"{name} failed on {sample}: {type(error).__name__}: {reason}") from error
                if not isinstance(image, Image.Image) or image.mode != "RGB":
                    kind = image.mode if isinstance(image, Image.Image) else type(image).__name__
                    raise UserError(f"{name} must return an RGB image of Pillow, got {kind}.")
        return image
