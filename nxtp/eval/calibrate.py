"""`nxtp calibrate`: fit label probabilities to what is right on held-out images; stored in the model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from nxtp.config import to_dataclass
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.errors import UserError
from nxtp.eval.curves import BINS, LabelHits, brier_score, calibration_error, fit, reliability, save_reliability
from nxtp.eval.vocabulary import closed_vocabulary
from nxtp.inference.calibration import CLASSIFY, FILE, Calibration, write_calibrations
from nxtp.inference.model_directory import WEIGHTS, read_config, weights_sum
from nxtp.inference.recognizer import Recognizer
from nxtp.sampling.ranking import ranking_config
from nxtp.sampling.samplers import sampler_config, settings_of

LEAST = 10  # labels that are right, and as many that are not, of each half


def calibrate(cfg: DictConfig) -> dict[str, float]:
    """Calibrate one sampler on the first set of ``data.val``: fitted on every second image, measured on the others.

    The result replaces that of the same sampler in calibration.json of the model directory; calibration.png shows all.
    Where the error is not lower after than before, nothing is stored.
    Returns the expected calibration error ``before`` and ``after``.

    Raises:
        UserError: the set has too few labels, or none that the model predicts; or the directory is not a local one.
    """
    directory = Path("" if OmegaConf.is_missing(cfg, "model_dir") else str(cfg.model_dir))
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"'{directory}' is no local model directory, to write {FILE} to: nxtp calibrate DIR data=…")
    config = to_dataclass(DataConfig, cfg.data, "data")
    if not config.val:
        raise UserError("data.val has no set to calibrate on: add +data.val.held_out=DIR, or data=scenes.")
    if ranking_config(cfg.ranking).name != "prob" or cfg.threshold is not None:
        raise UserError("Probabilities of all predicted labels are calibrated: omit ranking and threshold.")
    recognizer = Recognizer.from_pretrained(directory, device=cfg.device)
    sampler = sampler_config(cfg.sampler)
    classes = closed_vocabulary(cfg, recognizer)
    name, settings = (CLASSIFY, {"classes": classes.fingerprint}) if classes is not None else settings_of(sampler)
    known, recognizer.calibrations = recognizer.calibrations, {}
    data = WebDatasetDataModule(
        config, recognizer.tokenizer, transform=recognizer.pixels, num_image_tokens=recognizer.model.num_image_tokens
    )
    where, spec = next(iter(config.val.items()))
    hits = LabelHits()
    for batch in track(data.loader(where, spec, training=False), where, transient=True):
        hits.update(recognizer.label_pixels(batch.images, cfg.top_k, classes, sampler), batch.labels)
    found = calibration_of(hits, where)
    found.settings = settings
    found.measured |= {"shards": str(spec), "top_k": cfg.top_k}
    error: Mapping[str, float] = found.measured["ece"]
    for line in summary(name, found):
        Console().print(line, highlight=False, soft_wrap=True)
    if error["after"] >= error["before"]:
        Console().print("The expected calibration error is not lower: nothing is stored.", highlight=False)
        return dict(error)
    known[name] = found
    write_calibrations(directory, weights_sum(read_config(directory)), known)
    save_reliability({n: each for n, each in known.items() if "bins" in each.measured}, directory / "calibration.png")
    Console().print(
        f"{FILE} and calibration.png, the reliability diagram, in {directory}", highlight=False, soft_wrap=True
    )
    return dict(error)


def summary(name: str, found: Calibration) -> list[str]:
    """What was fitted, on how much; and its errors on how much else."""
    m, error, brier = found.measured, found.measured["ece"], found.measured["brier"]
    images, labels = m["held_out_images"], m["held_out_labels"]
    return [
        f"{name}: temperature {found.temperature:.3f}, offset {found.offset:+.3f}",
        f"fitted to {m['labels'] - labels:,} labels, the top {m['top_k']} of {m['images'] - images:,} images; "
        f"measured on {labels:,} labels of {images:,} others:",
        f"expected calibration error {error['before']:.4f} before, {error['after']:.4f} after",
        f"Brier score {brier['before']:.4f} before, {brier['after']:.4f} after, {brier['constant']:.4f} for a constant",
    ]


def calibration_of(hits: LabelHits, where: str) -> Calibration:
    """Fitted on the images of even number, measured on those of odd number.

    Raises:
        UserError: there are too few labels, or what is more probable is right less often.
    """
    p, right = np.array(hits.probabilities), np.array(hits.right, dtype=bool)
    odd = np.array(hits.images, dtype=int) % 2 == 1
    if not hits.count:
        raise UserError(f"data.val.{where}: no image has labels; calibration needs some that are known.")
    if not right.any():
        text = f"data.val.{where}: none of {len(right):,} predicted labels is right"
        raise UserError(f"{text}. Is the model of another vocabulary? Its labels and the set's have none in common.")
    doubt = f"{right.sum():,} of {len(right):,} predicted labels are right: are the set's labels those of the model?"
    least = min(count for half in (odd, ~odd) for count in (right[half].sum(), (~right[half]).sum()))
    if least < LEAST:
        advice = f"Only {doubt}" if right.sum() < 4 * LEAST else "Use a larger set."
        raise UserError(f"data.val.{where}: each half needs {LEAST} labels that are right and {LEAST} that are not, "
                        f"one has {least}. {advice}")  # fmt: skip
    temperature, offset = fit(p[~odd], right[~odd])
    try:
        found = Calibration(temperature, offset)
    except ValueError:
        text = f"data.val.{where}: labels of higher probability are right less often: no temperature mends that"
        raise UserError(f"{text}. {doubt}") from None
    after = np.array([q for _, q in found([("", each) for each in p[odd].tolist()])])
    brier = {"before": brier_score(p[odd], right[odd]), "after": brier_score(after, right[odd])}
    brier["constant"] = brier_score(np.full(odd.sum(), right[~odd].mean()), right[odd])
    bins = {"before": reliability(p[odd], right[odd]), "after": reliability(after, right[odd])}
    ece = {when: round(calibration_error(each), 6) for when, each in bins.items()}
    rounded = {when: [[round(x, 6) for x in point] for point in each] for when, each in bins.items()}
    measured = {"set": where, "images": hits.count, "labels": len(p), "bin_count": BINS, "ece": ece, "bins": rounded}
    measured |= {"held_out_images": hits.count // 2, "held_out_labels": int(odd.sum())}
    measured["brier"] = {when: round(each, 6) for when, each in brier.items()}
    return Calibration(temperature, offset, measured=measured)
