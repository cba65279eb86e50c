"""Calibrated probabilities: a label that is predicted with 0.8 is among the image's labels in 80 of 100 cases.

A model's own probability is another number: that one label, drawn from those of the image, is this one. With three
objects in an image each has at most a third. So besides a temperature T there is an offset b for how many labels an
image has: logit(calibrated) = logit(p) / T + b. It keeps the order of labels. `nxtp calibrate` fits both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxtp.errors import UserError
from nxtp.model.untrusted import read_json
from nxtp.runs.atomic import write_json

if TYPE_CHECKING:
    from nxtp.sampling.ranking import Labels

log = logging.getLogger("nxtp")

FILE = "calibration.json"
FORMAT = 1
CLASSIFY = "classify"  # the name of a closed vocabulary among samplers


def logit(probability: float) -> float:
    """0 and 1 have none: they count as the nearest numbers that a product of float32 may be."""
    probability = min(max(probability, 1e-30), 1 - 1e-7)
    return math.log(probability) - math.log1p(-probability)


@dataclass
class Calibration:
    """Of one sampler; called with ranked labels, it returns them with calibrated probabilities.

    ``settings``  of the sampler that was calibrated: with others its probabilities are other ones
    ``measured``  what `nxtp calibrate` found on images that it did not fit to: set, images, labels, ``ece``, ``bins``;
                  how many images and labels were held out, and ``brier``, which earlier files lack
    """

    temperature: float
    offset: float
    settings: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = [self.temperature, self.offset]
        if not all(isinstance(n, int | float) and abs(n) < 1e300 for n in numbers) or self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} and offset {self.offset} must be finite, the first > 0")
        if not isinstance(self.settings, dict) or not isinstance(self.measured, dict):
            raise ValueError("settings and measured must be objects")

    def __call__(self, labels: Labels) -> Labels:
        scaled = ((label, logit(p) / self.temperature + self.offset) for label, p in labels)
        return [(label, 1 / (1 + math.exp(-z)) if z > -700 else 0.0) for label, z in scaled]


def read_calibrations(directory: Path, weights: str | None) -> dict[str, Calibration]:
    """Sampler → its calibration; none if a model directory has no calibration.json, or that of other weights.

    Raises:
        UserError: it is damaged or of another format.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"'{path}' has format {content.get('format')}, this nxtp reads {FORMAT}: run nxtp calibrate.")
    if content.get("weights") != weights:
        log.warning("'%s' is of other weights and not used: run nxtp calibrate again.", path)
        return {}
    try:
        return {str(name): Calibration(**each) for name, each in dict(content["samplers"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is damaged: {error}.") from error


def write_calibrations(directory: Path, weights: str | None, samplers: Mapping[str, Calibration]) -> None:
    """Nothing without ``samplers``."""
    if samplers:
        found = {name: asdict(each) for name, each in samplers.items()}
        write_json(directory / FILE, {"format": FORMAT, "weights": weights, "samplers": found})
