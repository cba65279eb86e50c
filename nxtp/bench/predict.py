"""`nxtp bench predict`: one-shot prediction of our implementation and of the reference implementation."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from rich.console import Group

from nxtp.bench.models import Predictor
from nxtp.bench.processes import WAYS, assert_equal, children
from nxtp.bench.reporting import build_table, caption, machine_description, memory_caption, ratio

COUNTS = (1, 20, 100)  # labels per image


def measure_predict(
    *, repeats: int, steps: int, batch_size: int, device: str, precision: str, **options: Any
) -> dict[str, Any]:
    """Seconds per image of both ways for 1, 20 and 100 labels, and our images per second in batches.

    Args:
        steps: decoding steps after the first token; with random weights hardly any label ends earlier.
        batch_size: for our throughput only; the published way computes K sequences per image without a cache.
        device, precision, options: of :class:`nxtp.bench.models.Worker`.

    Returns:
        ``ratio@20``, ``ratio@100``: published / ours, encoder and prefix included. ``decode_ratio@…``: after the
        first token, i.e. less the time of the same call with one token per label. ``top100_over_top1``: ours.

    Raises:
        UserError: the two ways differ.
    """
    tokens = steps + 1
    whole: dict[tuple[str, int], list[float]] = defaultdict(list)
    decode: dict[tuple[str, int], list[float]] = defaultdict(list)
    batches: dict[int, list[float]] = defaultdict(list)
    peaks: dict[int, int] = {}
    differences: list[float] = []
    exact = precision == "32-true"
    options |= {"batch_size": batch_size, "device": device, "precision": precision}
    with children(Predictor, **options) as (ours, published):

        def both(top_k: int, tokens: int, compare: bool) -> dict[str, float]:
            """Each way's seconds."""
            results = [child.call("measure", top_k=top_k, tokens=tokens) for child in (ours, published)]
            if compare:
                differences.append(assert_equal(results[0][1], results[1][1], f"top-{top_k}"))
            return {way: seconds for way, (seconds, _) in zip(WAYS, results, strict=True)}

        if not exact:
            for k in COUNTS:
                both(k, tokens, compare=True)
            for child in (ours, published):
                child.call("use_precision")
        for k in COUNTS[:-1]:
            both(k, tokens, compare=exact)  # warm-up
        for _ in range(repeats):
            for k in COUNTS:
                first, every = both(k, 1, compare=exact), both(k, tokens, compare=exact)
                for way in WAYS:
                    whole[way, k].append(every[way])
                    decode[way, k].append(max(every[way] - first[way], 1e-6))
        for _ in range(repeats):
            for k in COUNTS:
                batches[k].append(ours.call("measure", top_k=k, tokens=tokens, images=batch_size)[0])
                peaks[k] = ours.peak
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
        rows[f"ours@{k}"] |= {"images_per_s": batch_size / median(batches[k]), "peak_bytes": peaks[k]}
    result |= {"difference": max(differences), "rows": rows, "parameters": ours.parameters}
    result |= {"steps": steps, "repeats": repeats, "machine": machine_description(device)}
    return options | result


def predict_table(result: dict[str, Any]) -> Group:
    """Both ways on one image; ours in batches."""
    single, batched = [], []
    for k in COUNTS:
        cells = []
        for key, name in (("seconds", f"ratio@{k}"), ("decode_seconds", f"decode_ratio@{k}")):
            ours, published = (result["rows"][f"{way}@{k}"][key] for way in WAYS)
            cells += [f"{ours:.3f}", f"{published:.2f}", f"{result[name]:.1f}×" if name in result else ""]
        single.append((str(k), *cells))
        row = result["rows"][f"ours@{k}"]
        batched.append((str(k), f"{row['images_per_s']:,.2f}", f"{row['peak_bytes'] / 1e9:.2f}"))
    text = (
        f"Top-100 takes {result['top100_over_top1']:.2f}× the time of top-1. Encoder and prefix included, except "
        f"under decoding: {result['steps']} steps after the first token; medians of {result['repeats']} rounds"
    )
    columns = ("labels", "ours s", "published s", "ratio", "decoding: ours s", "published s", "ratio")
    title = "One-shot prediction of one image against the reference implementation"
    batches = f"Ours in batches of {result['batch_size']}"
    memory = f"Peak {memory_caption(result['machine'])}"
    return Group(
        build_table(title, columns, single, caption(result, text)),
        build_table(batches, ("labels", "images/s", "peak memory GB"), batched, memory),
    )
