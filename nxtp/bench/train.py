"""`nxtp bench train`: training as `nxtp train` does it, and steps of the reference implementation."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from nxtp.bench.data import write_photos
from nxtp.bench.models import SIZES, STEPS, Trainer
from nxtp.bench.processes import Child, assert_equal, children
from nxtp.bench.reporting import build_table, caption, machine_description, memory_caption, ratio
from nxtp.model.flops import compute_dtype, peak_flops
from nxtp.model.layout import MATCHED, PUBLISHED


def measure_train(
    *,
    size: str,
    repeats: int,
    batch_size: int,
    device: str,
    precision: str,
    seed: int,
    compiled: bool = False,
    profile: str | None = None,
) -> dict[str, Any]:
    """Training images per second, model FLOP/s and peak memory of both ways.

    Ours reads synthetic photographs from shards with the recipe's loader (:class:`nxtp.bench.models.Trainer`).

    Args:
        batch_size: weights, gradients, AdamW's state and the libraries (2.5 GB at full size) need the same memory in
            both ways, so the memory ratio falls as the batch grows; the published batch is 16 per GPU.
        size, device, precision, seed: of :class:`nxtp.bench.models.Worker`.
        compiled: also ours with ``parallel.compile``.
        profile: a directory: after the measurement, ours runs once more with PyTorch's profiler.

    Returns:
        ``images_per_s_ratio`` and ``peak_memory_ratio`` (ours / published), the numbers behind them, the machine. A
        row's ``mfu`` is None where the device's peak is unknown; both ways count model FLOPs of real tokens.

    Raises:
        UserError: the two ways differ.
    """
    machine = machine_description(device)
    options: dict[str, Any] = {"size": size, "batch_size": batch_size, "device": device, "precision": precision}
    steps, side = STEPS[device], SIZES[size]().config.encoder.image_size
    with TemporaryDirectory() as temporary:
        shards = Path(temporary, "shards")  # 640×480 for 224 pixels
        write_photos(shards, 2 * steps * batch_size, side * 20 // 7, side * 15 // 7, seed, labelled=True)
        with children(Trainer, **options, seed=seed, shards=str(shards)) as (ours, published):
            difference = assert_equal(ours.call("result"), published.call("result"), "training step")
            published.call("use_precision")
            cases: dict[str, tuple[Child, dict[str, Any]]] = {
                "ours": (ours, {"objective": PUBLISHED}),
                "published": (published, {"objective": PUBLISHED}),
                "ours, matched": (ours, {"objective": MATCHED}),
            }
            if compiled:
                cases["ours, compiled"] = ours, {"objective": PUBLISHED, "compiled": True}
            peaks = {}
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
            for _ in range(repeats):
                for name, (child, settings) in cases.items():
                    measured[name].append(child.call("measure", **settings))
                    peaks[name] = (child.peak, child.peak - child.baseline)
            if profile:
                ours.call("measure", objective=PUBLISHED, profile=profile)
    peak = peak_flops(machine.get("gpu", ""), compute_dtype(precision))
    seconds = {name: [batch_size / values["images_per_s"] for values in rounds] for name, rounds in measured.items()}
    rows = {}
    for name, rounds in measured.items():
        row = {key: median(values[key] for values in rounds) for key in rounds[0]}
        mfu = row["tflops"] * 1e12 / peak if peak else None
        memory = dict(zip(("peak_bytes", "peak_above_model_bytes"), peaks[name], strict=True))
        rows[name] = {"seconds": median(seconds[name]), **row, "mfu": mfu, **memory}
    return options | {
        "images_per_s_ratio": ratio(seconds["published"], seconds["ours"]),
        "peak_memory_ratio": peaks["ours"][0] / peaks["published"][0],
        "peak_above_model_ratio": peaks["ours"][1] / max(peaks["published"][1], 1),
        "matched_images_per_s_ratio": ratio(seconds["published"], seconds["ours, matched"]),
        "difference": difference,
        "rows": rows,
        "parameters": ours.parameters,
        "repeats": repeats,
        "machine": machine,
    }


def train_table(result: dict[str, Any]) -> Table:
    rows = []
    for name, row in result["rows"].items():
        shared = (
            name in ("ours, matched", "ours, compiled") and "gpu" not in result["machine"]
        )  # the same process as ours
        memory = ("", "") if shared else (f"{row[k] / 1e9:.2f}" for k in ("peak_bytes", "peak_above_model_bytes"))
        mfu, wait = (f"{row[key]:.1%}" if row.get(key) is not None else "" for key in ("mfu", "data_wait"))
        speed = f"{row['seconds']:.3f}", f"{row['images_per_s']:.2f}", f"{row['tflops']:.3g}"
        rows.append((name, *speed, mfu, wait, *memory))
    speed, memory, above = (result[k] for k in ("images_per_s_ratio", "peak_memory_ratio", "peak_above_model_ratio"))
    rows.append(("ours / published", "", f"{speed:.1f}×", "", "", "", f"{memory:.2f}×", f"{above:.2f}×"))
    trained = "the published parts train" if result["size"] == "g3m" else "all parameters train"
    text = (
        f"Steps of {result['batch_size']} images, {trained}; medians of {result['repeats']} rounds. Ours: Lightning's "
        "loop, loader and copies included; published: forward, backward and AdamW of one batch on the device. Both "
        f"count the model FLOPs of real tokens; {memory_caption(result['machine'])}"
    )
    columns = ("", "s per step", "images/s", "TFLOP/s", "MFU", "data wait", "peak memory GB", "above the model GB")
    return build_table("Training step against the reference implementation", columns, rows, caption(result, text))
