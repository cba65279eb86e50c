"""`nxtp bench train`: training steps of our implementation and of the reference implementation."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.table import Table

from nxtp.bench.models import Trainer
from nxtp.bench.processes import assert_equal, children
from nxtp.bench.reporting import build_table, caption, machine_description, memory_caption, ratio
from nxtp.model.flops import compute_dtype, peak_flops
from nxtp.model.layout import Objective


def measure_train(*, repeats: int, batch_size: int, device: str, precision: str, **options: Any) -> dict[str, Any]:
    """Training steps per second, model FLOP/s and peak memory of both ways.

    Args:
        batch_size: weights, gradients, AdamW's state and the libraries (2.5 GB at full size) need the same memory in
            both ways, so the memory ratio falls as the batch grows; the published batch is 16 per GPU.
        device, precision, options: of :class:`nxtp.bench.models.Worker`.

    Returns:
        ``images_per_s_ratio`` and ``peak_memory_ratio`` (ours / published), the numbers behind them, the machine. A
        row's ``mfu`` is None where the device's peak is unknown; both ways count the same model FLOPs.

    Raises:
        UserError: the two ways differ.
    """
    machine = machine_description(device)
    options |= {"batch_size": batch_size, "device": device, "precision": precision}
    with children(Trainer, **options) as (ours, published):
        difference = assert_equal(ours.call("result"), published.call("result"), "training step")
        cases = {
            "ours": (ours, Objective.PUBLISHED),
            "published": (published, Objective.PUBLISHED),
            "ours, matched": (ours, Objective.MATCHED),
        }
        for child in (ours, published):
            child.call("use_precision")
        for child, objective in cases.values():
            child.call("measure", objective=objective)  # allocates the optimiser's state
        peaks = {}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, (child, objective) in cases.items():
                seconds[name].append(child.call("measure", objective=objective))
                peaks[name] = (child.peak, child.peak - child.baseline)
        flops = {name: child.call("flops", objective=objective) for name, (child, objective) in cases.items()}
    peak = peak_flops(machine.get("gpu", ""), compute_dtype(precision))
    rows = {
        name: {
            "seconds": median(times),
            "images_per_s": batch_size / median(times),
            "tflops": flops[name] / median(times) / 1e12,
            "mfu": flops[name] / median(times) / peak if peak else None,
            "peak_bytes": peaks[name][0],
            "peak_above_model_bytes": peaks[name][1],
        }
        for name, times in seconds.items()
    }
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
        shared = name == "ours, matched" and "gpu" not in result["machine"]  # the same process as ours
        memory = ("", "") if shared else (f"{row[k] / 1e9:.2f}" for k in ("peak_bytes", "peak_above_model_bytes"))
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        rows.append((name, f"{row['seconds']:.2f}", f"{row['images_per_s']:.2f}", f"{row['tflops']:.3g}", mfu, *memory))
    speed, memory, above = (result[k] for k in ("images_per_s_ratio", "peak_memory_ratio", "peak_above_model_ratio"))
    rows.append(("ours / published", "", f"{speed:.1f}×", "", "", f"{memory:.2f}×", f"{above:.2f}×"))
    trained = "the published parts train" if result["size"] == "g3m" else "all parameters train"
    text = (
        f"Forward, backward and AdamW of {result['batch_size']} images, {trained}; medians of {result['repeats']} "
        f"rounds; both ways count the model FLOPs of real tokens; {memory_caption(result['machine'])}"
    )
    columns = ("", "s per step", "images/s", "TFLOP/s", "MFU", "peak memory GB", "above the model GB")
    return build_table("Training step against the reference implementation", columns, rows, caption(result, text))
