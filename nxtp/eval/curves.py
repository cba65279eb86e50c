"""Calibration and precision-recall curves of label probabilities."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_precision_recall_curve

from nxtp.data.labels.cleaning import distinct, normalise
from nxtp.inference.calibration import Calibration, logit
from nxtp.inference.figures import HIT, MISS, new_figure, save_figure
from nxtp.sampling.ranking import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 15
POINTS = 200  # of a curve, about


@dataclass
class LabelHits:
    """The distinct labels predicted for images that have labels: the same ones that exact match counts.

    ``probabilities``, ``right``  of each predicted label its probability, and whether it is among its image's labels;
                                  of equal ones the first's
    ``images``                    the number of its image
    ``truths``                    how many labels all images have
    """

    probabilities: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    count: int = 0
    truths: int = 0

    def update(self, predictions: Sequence[Labels], targets: Sequence[Sequence[str]]) -> None:
        for ranked, truth in zip(predictions, map(set, map(distinct, targets)), strict=True):
            if truth:
                first = {normalise(label): probability for label, probability in reversed(ranked)}
                said = distinct(label for label, _ in ranked)
                self.probabilities += [min(first[label], 1.0) for label in said]  # sums, rounded
                self.right += [label in truth for label in said]
                self.images += [self.count] * len(said)
                self.count += 1
                self.truths += len(truth)


@dataclass
class Curve:
    """Precision and recall over all images for each threshold on the labels' probabilities, in order of rising recall.

    ``average_precision``  Σ (R_i - R_{i-1}) P_i over the thresholds, from the highest down: the area under the curve's
                           steps. Labels that are not among the predictions count as never found, so it depends on k.
    """

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    labels_per_image: np.ndarray

    @classmethod
    def of(cls, hits: LabelHits) -> Curve:
        """Thresholds are the distinct probabilities."""
        if not hits.right:
            return cls(*(np.empty(0) for _ in range(4)))
        right = torch.tensor(hits.right, dtype=torch.long)
        scores = torch.tensor(hits.probabilities, dtype=torch.float64)
        precision, recall, thresholds = binary_precision_recall_curve(scores, right)
        found = recall[:-1].flip(0).numpy() * int(right.sum())  # the last point has no threshold
        precision = precision[:-1].flip(0).numpy()
        kept = np.searchsorted(np.sort(-scores.numpy()), -thresholds.flip(0).numpy(), side="right")
        return cls(thresholds.flip(0).numpy(), precision, found / max(hits.truths, 1), kept / max(hits.count, 1))

    @property
    def average_precision(self) -> float:
        return float((np.diff(self.recall, prepend=0.0) * self.precision).sum())

    @property
    def f1(self) -> np.ndarray:
        return 2 * self.precision * self.recall / np.maximum(self.precision + self.recall, 1e-12)


def write_curves(curves: Mapping[str, Curve], directory: Path) -> list[str]:
    """curve.csv, about 200 points of each set, and curve.png: names of the files."""
    with (directory / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "threshold", "precision", "recall", "f1", "labels_per_image"])
        for name, curve in curves.items():
            numbers = np.stack([curve.threshold, curve.precision, curve.recall, curve.f1, curve.labels_per_image], 1)
            chosen = np.unique(np.linspace(0, len(numbers) - 1, POINTS).astype(int)) if len(numbers) else ()
            writer.writerows([name, *(f"{number:.6g}" for number in numbers[i])] for i in chosen)
    figure = new_figure(6.4, 4.8)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        label = f"{name}: average precision {curve.average_precision:.3f}"
        best = [int(curve.f1.argmax())] if len(curve.f1) else []
        label += "".join(f", F1 {curve.f1[i]:.2f} at {curve.threshold[i]:.2g}" for i in best)
        axes.step(curve.recall, curve.precision, where="pre", label=label, marker="o", markevery=best)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.05))
    axes.set_title("Labels above a threshold on their probability, over all images", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    save_figure(figure, directory / "curve.png")
    return ["curve.csv", "curve.png"]


def reliability(probabilities: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[list[float]]:
    """[mean probability, share that is right, number of labels] of each non-empty bin; bins are equally wide."""
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    members = [index == i for i in range(bins)]
    return [[float(probabilities[m].mean()), float(right[m].mean()), int(m.sum())] for m in members if m.any()]


def calibration_error(found: Sequence[Sequence[float]]) -> float:
    """Expected calibration error of :func:`reliability`: mean of |probability - share that is right| over labels."""
    return sum(abs(p - share) * n for p, share, n in found) / max(sum(n for *_, n in found), 1)


def brier_score(probabilities: np.ndarray, right: np.ndarray) -> float:
    """Mean of (probability - 1 if right, else 0)² over labels. Unlike the error above, a constant does not lower it."""
    return float(((probabilities - right) ** 2).mean())


def fit(probabilities: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Temperature and offset with the least negative log-likelihood of what is right.

    The temperature is negative or infinite where higher probabilities are right less often.
    """
    logits = torch.tensor([logit(p) for p in probabilities.tolist()], dtype=torch.float64)
    truth = torch.tensor(right, dtype=torch.float64)
    slope, offset = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.0, 0.0))
    optimizer = torch.optim.LBFGS([slope, offset], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(slope * logits + offset, truth)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (1 / slope.item() if slope.item() else float("inf")), offset.item()


def save_reliability(samplers: Mapping[str, Calibration], path: Path) -> None:
    """A PNG of a panel per sampler: probability against the share that is right, before and after."""
    figure = new_figure(4.2 * len(samplers), 4.4)
    for axes, (name, each) in zip(figure.subplots(1, len(samplers), squeeze=False)[0], samplers.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--")
        for when, colour in (("before", MISS), ("after", HIT)):
            _draw_bins(axes, each.measured["bins"][when], colour, f"{when}: error {each.measured['ece'][when]:.3f}")
        axes.set(xlabel="probability of a label", xlim=(0, 1), ylim=(0, 1), title=name, aspect="equal")
        axes.legend(frameon=False, loc="best", fontsize=9)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share that is right")
    figure.tight_layout()
    save_figure(figure, path)


def _draw_bins(axes: Axes, bins: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Points grow with the number of labels."""
    columns: Any = np.array(bins).T
    most = columns[2].max()
    axes.plot(columns[0], columns[1], color=colour, lw=1.2, label=label)
    axes.scatter(columns[0], columns[1], s=12 + 90 * columns[2] / most, color=colour, alpha=0.8, zorder=3)
