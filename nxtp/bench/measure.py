"""`nxtp bench train|predict`: the measurements and their tables."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table

from nxtp.bench.processes import WAYS, assert_equal, children, choose_device, machine_description, machine_line
from nxtp.bench.workers import SIZES, Predictor, Trainer
from nxtp.model.flops import compute_dtype, peak_flops
from nxtp.model.layout import Objective

COUNTS = (1, 20, 100)  # labels an image in `bench predict`


def measure_train(
    size: str = "full",
    repeats: int = 3,
    batch: int = 8,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Training steps a second, model FLOP/s and peak memory of both ways.

    Args:
        batch: images a step. Weights, gradients, AdamW's state and the libraries (2.5 GB at full size) weigh the
            same in both ways, so that the ratio of memory falls with the batch; the published one is 16 a GPU.
        precision: of the measured steps; results are compared in float32 first.

    Returns:
        ``images_per_s_ratio`` and ``peak_memory_ratio`` (ours / published), what they are made of, the machine. A
        row's ``mfu`` is None where the device's peak is unknown; both ways are held to the same model FLOPs.

    Raises:
        UserError: the two ways disagree, or there is no such device.
    """
    device = choose_device(device)
    machine = machine_description(device)
    options = {"size": SIZES[size], "batch": batch, "seed": seed, "device": device, "precision": precision}
    with children(Trainer, **options) as (ours, theirs):
        difference = assert_equal(ours.ask("result"), theirs.ask("result"), "training step")
        cases = {
            "ours": (ours, Objective.PUBLISHED),
            "published": (theirs, Objective.PUBLISHED),
            "ours, matched": (ours, Objective.MATCHED),
        }
        for child in (ours, theirs):
            child.ask("narrow")
        for child, objective in cases.values():
            child.ask("measure", objective=objective)  # the optimiser's state is made here
        peaks = {}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, (child, objective) in cases.items():
                seconds[name].append(child.ask("measure", objective=objective))
                peaks[name] = (child.peak, child.peak - child.baseline)
        flops = {name: child.ask("flops", objective=objective) for name, (child, objective) in cases.items()}
        parameters = ours.parameters
    peak = peak_flops(machine.get("gpu", ""), compute_dtype(precision))
    rows = {
        name: {
            "seconds": median(times),
            "images_per_s": batch / median(times),
            "tflops": flops[name] / median(times) / 1e12,
            "mfu": flops[name] / median(times) / peak if peak else None,
            "peak_bytes": peaks[name][0],
            "peak_above_model_bytes": peaks[name][1],
        }
        for name, times in seconds.items()
    }
    return {
        "images_per_s_ratio": ratio(seconds["published"], seconds["ours"]),
        "peak_memory_ratio": peaks["ours"][0] / peaks["published"][0],
        "peak_above_model_ratio": peaks["ours"][1] / max(peaks["published"][1], 1),
        "matched_images_per_s_ratio": ratio(seconds["published"], seconds["ours, matched"]),
        "difference": difference,
        "rows": rows,
        "parameters": parameters,
        "size": size,
        "batch": batch,
        "precision": precision,
        "repeats": repeats,
        "machine": machine,
    }


def measure_predict(
    size: str = "full",
    repeats: int = 3,
    steps: int = 3,
    batch: int = 64,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Seconds an image of both ways, for 1, 20 and 100 labels, and our images a second in batches.

    Args:
        steps: decoding steps after the first token; random weights hardly ever end a label sooner.
        batch: images of a batch, for the throughput. The published way, K sequences an image without a cache, is not
            asked for it.
        precision: of the measured calls; in another than 32-true results are compared in float32 first.

    Returns:
        ``ratio@20``, ``ratio@100``: published / ours, encoder and prefix included. ``decode_ratio@…``: after the
        first token, i.e. less the time of the same call with one token a label. ``top100_over_top1``: ours.

    Raises:
        UserError: the two ways disagree, or there is no such device.
    """
    device = choose_device(device)
    tokens = steps + 1
    whole: dict[tuple[str, int], list[float]] = {}
    decode: dict[tuple[str, int], list[float]] = {}
    batches: dict[int, list[float]] = {k: [] for k in COUNTS}
    peaks: dict[int, int] = {}
    differences = []
    exact = precision == "32-true"
    options = {"size": SIZES[size], "batch": batch, "seed": seed, "device": device, "precision": precision}
    with children(Predictor, **options) as (ours, theirs):

        def both(top_k: int, tokens: int, compare: bool) -> dict[str, float]:
            """Each way's seconds."""
            answers = {child.way: child.ask("measure", top_k=top_k, tokens=tokens) for child in (ours, theirs)}
            if compare:
                results = (answers[child.way][1] for child in (ours, theirs))
                differences.append(assert_equal(*results, case=f"top-{top_k}"))
            return {way: seconds for way, (seconds, _) in answers.items()}

        if not exact:
            for k in COUNTS:
                both(k, tokens, compare=True)
            for child in (ours, theirs):
                child.ask("narrow")
        for k in COUNTS[:-1]:
            both(k, tokens, compare=exact)  # before anything counts
        for _ in range(repeats):
            for k in COUNTS:
                first, every = both(k, 1, compare=exact), both(k, tokens, compare=exact)
                for way in WAYS:
                    whole.setdefault((way, k), []).append(every[way])
                    decode.setdefault((way, k), []).append(max(every[way] - first[way], 1e-6))
        for _ in range(repeats):
            for k in COUNTS:
                batches[k].append(ours.ask("measure", top_k=k, tokens=tokens, images=batch)[0])
                peaks[k] = ours.peak
        parameters = ours.parameters
    result: dict[str, Any] = {}
    for k in COUNTS[1:]:
        result[f"ratio@{k}"] = ratio(whole["published", k], whole["ours", k])
        result[f"decode_ratio@{k}"] = ratio(decode["published", k], decode["ours", k])
    most = COUNTS[-1]
    result[f"top{most}_over_top1"] = ratio(whole["ours", most], whole["ours", 1])
    rows = {
        f"{way}@{k}": {"seconds": median(whole[way, k]), "decode_seconds": median(decode[way, k])}
        for k in COUNTS
        for way in WAYS
    }
    for k in COUNTS:
        rows[f"ours@{k}"] |= {"images_per_s": batch / median(batches[k]), "peak_bytes": peaks[k]}
    return result | {
        "difference": max(differences),
        "rows": rows,
        "parameters": parameters,
        "size": size,
        "steps": steps,
        "batch": batch,
        "precision": precision,
        "repeats": repeats,
        "machine": machine_description(device),
    }


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over the rounds of one time by the other of the same round."""
    return median(n / d for n, d in zip(numerators, denominators, strict=True))


def caption(result: dict[str, Any], what: str) -> str:
    return (
        f"{what}. {result['parameters'] / 1e6:,.0f} M parameters, {result['precision']}; results equal to "
        f"{result['difference']:.0e} relative{'' if result['precision'] == '32-true' else ' in float32'}. "
        f"{machine_line(result['machine'])}"
    )


def _memory(result: dict[str, Any]) -> str:
    return "allocated on the GPU" if "gpu" in result["machine"] else "the largest resident set of a process"


def train_table(result: dict[str, Any]) -> Table:
    table = Table(title="Training step: ours beside the published way", caption_justify="left")
    table.add_column(no_wrap=True)
    for column in ("s a step", "images/s", "TFLOP/s", "MFU", "peak memory GB", "above the model GB"):
        table.add_column(column, justify="right")
    for name, row in result["rows"].items():
        shared = name == "ours, matched" and "gpu" not in result["machine"]  # the same process as ours
        peak, above = (f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "peak_above_model_bytes"))
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        numbers = (f"{row['seconds']:.2f}", f"{row['images_per_s']:.2f}", f"{row['tflops']:.3g}", mfu)
        table.add_row(name, *numbers, *(("", "") if shared else (peak, above)))
    speed, memory, above = (result[k] for k in ("images_per_s_ratio", "peak_memory_ratio", "peak_above_model_ratio"))
    table.add_section()
    table.add_row("ours / published", "", f"{speed:.1f}×", "", "", f"{memory:.2f}×", f"{above:.2f}×")
    trained = "the published parts train" if result["size"] == "g3m" else "all parameters train"
    table.caption = caption(
        result,
        f"Forward, backward and AdamW of {result['batch']} images, {trained}; medians of {result['repeats']} rounds; "
        f"FLOPs are the model's, of real tokens, in both ways; memory is {_memory(result)}",
    )
    return table


def predict_table(result: dict[str, Any]) -> Group:
    """Both ways on one image; ours in batches."""
    table = Table(title="One-shot prediction of one image: ours beside the published way", caption_justify="left")
    for column in ("labels", "ours s", "published s", "ratio", "decoding: ours s", "published s", "ratio"):
        table.add_column(column, justify="right")
    batches = Table(title=f"One-shot prediction in batches of {result['batch']}: ours", caption_justify="left")
    for column in ("labels", "images/s", "peak memory GB"):
        batches.add_column(column, justify="right")
    for k in COUNTS:
        ours, theirs = result["rows"][f"ours@{k}"], result["rows"][f"published@{k}"]
        ratios = [f"{result[name]:.1f}×" if name in result else "" for name in (f"ratio@{k}", f"decode_ratio@{k}")]
        table.add_row(
            str(k),
            f"{ours['seconds']:.3f}",
            f"{theirs['seconds']:.2f}",
            ratios[0],
            f"{ours['decode_seconds']:.3f}",
            f"{theirs['decode_seconds']:.2f}",
            ratios[1],
        )
        batches.add_row(str(k), f"{ours['images_per_s']:,.2f}", f"{ours['peak_bytes'] / 1e9:.2f}")
    table.caption = caption(
        result,
        f"Top-100 takes {result['top100_over_top1']:.2f}× the time of top-1. Encoder and prefix included, except "
        f"under decoding: {result['steps']} steps after the first token; medians of {result['repeats']} rounds",
    )
    batches.caption = f"Memory is {_memory(result)}."
    return Group(table, batches)
