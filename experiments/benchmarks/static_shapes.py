"""Do fixed shapes and a compiled step make one-shot sampling faster?

    python experiments/benchmarks/static_shapes.py                       no: the table below
    python experiments/benchmarks/static_shapes.py --ends 0 --tokens 4   no label ends: 1.04×, 1.07×, 1.06×

``torch.compile`` without recompilation and CUDA graphs need fixed shapes: keys and values preallocated for the prefix
and K branches at every step, one graph for all steps, and every branch computed until the last one of the batch ends.
2026-11-25, one thread of an AMD EPYC with other work beside it, torch 2.15; 106 M parameters, float32:

    labels   tokens: mean, longest   as it is s   static s   compiled s   ratio   compiled, first call s
         1                  3.0, 3         1.31       1.33         1.31   1.05×                       37
        20                 3.4, 10         2.40       3.84         3.00   0.79×                       35
       100                 3.6, 14         4.55       12.3         9.33   0.40×                       53

Ratio: as it is / compiled. No GPU has run this yet.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor
from transformers import StaticCache

from nxtp.bench.command import number, of_a_model
from nxtp.bench.models import DELIMITER, Predictor
from nxtp.bench.predict import COUNTS
from nxtp.bench.processes import assert_equal
from nxtp.bench.reporting import build_table, caption, machine_description, ratio, show
from nxtp.model.model import Model
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS, first_tokens, likeliest_

WAYS = ("as it is", "static", "compiled")


def static_step(
    model: Model, tokens_BK: Tensor, step: Tensor, prefix: int, max_tokens: int, cache: StaticCache
) -> tuple[Tensor, Tensor]:
    """Probability and id of each branch's likeliest token; ``step`` (1, 2, …) is a tensor: one graph for all."""
    branches = tokens_BK.shape[1]
    branch = torch.arange(branches, device=tokens_BK.device)[:, None]
    key = torch.arange(branches * (max_tokens - 1), device=tokens_BK.device)[None]
    own = (key % branches == branch) & (key < step * branches)  # branch_mask of the attention rule, and no later key
    mask = torch.cat([own.new_ones(branches, prefix), own], dim=1)[None, None]
    decoder = model.decoder
    positions = (prefix - 1 + step).expand(1, branches)
    return likeliest_(decoder.logits(decoder(decoder.embed(tokens_BK), positions, mask, cache)))


class StaticOneShot:
    """:func:`nxtp.sampling.one_shot.one_shot` in fixed shapes.

    Args:
        compiled: the step is compiled, once for each number of images and labels. On CUDA it becomes a CUDA graph,
            for which the cache keeps its place in memory from call to call.
    """

    def __init__(self, compiled: bool, device: torch.device):
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.step = torch.compile(static_step, dynamic=False, mode=mode) if compiled else static_step
        self.caches: dict[tuple, StaticCache] = {}  # by shape and dtype

    @torch.inference_mode()
    def __call__(self, model: Model, images: Tensor, *, prompt, delimiter, top_k, max_tokens, never_first) -> Samples:
        logits_BV, prefilled = model.prefill(images, prompt)
        prefix = model.num_image_tokens + 1 + len(prompt)
        probs_BK, tokens_BK = first_tokens(logits_BV, top_k, never_first)
        shape = *tokens_BK.shape, max_tokens, prefilled.layers[0].keys.dtype
        if shape not in self.caches:
            length = prefix + shape[1] * (max_tokens - 1)
            self.caches[shape] = StaticCache(model.decoder.lm.config, max_cache_len=length)
        cache = self.caches[shape]
        for index, layer in enumerate(prefilled.layers):
            cache.layers[index].cumulative_length.zero_()  # what the last call left there stays masked
            cache.update(layer.keys, layer.values, index)

        tokens_BKL = torch.full((*tokens_BK.shape, max_tokens + 1), delimiter, device=tokens_BK.device)
        probs_BKL = torch.ones(tokens_BKL.shape, device=tokens_BK.device)
        tokens_BKL[..., 0], probs_BKL[..., 0] = tokens_BK, probs_BK
        running_BK = tokens_BK != delimiter
        for step in range(1, max_tokens):
            if not running_BK.any():
                break
            torch.compiler.cudagraph_mark_step_begin()
            number = torch.tensor(step, device=tokens_BK.device)
            probs_BK, tokens_BK = self.step(model, tokens_BK, number, prefix, max_tokens, cache)
            tokens_BK = tokens_BK.where(running_BK, delimiter)
            tokens_BKL[..., step], probs_BKL[..., step] = tokens_BK, probs_BK.where(running_BK, 1.0)
            running_BK = running_BK & (tokens_BK != delimiter)
        return Samples.grown(tokens_BKL, probs_BKL, delimiter)


def measure(
    *, batch_size: int, tokens: int, ends: float, repeats: int, device: str, precision: str, **options: Any
) -> dict[str, Any]:
    """Seconds of each way for a batch of images, from uint8 to labels of ``tokens`` tokens at most.

    Args:
        ends: scales the delimiter's output weights, so that with random weights some labels end at every step; with
            0 none ends.
        device, precision, options: of :class:`nxtp.bench.models.Worker`.

    Returns:
        ``rows``, by "way@labels": ``seconds``; ``ratio`` (as it is / that way, median over the rounds) and
        ``first_seconds`` (of the first call in float32, compilation included). ``lengths``, by labels: tokens of the
        mean and of the longest label.

    Raises:
        UserError: the ways differ.
    """
    options |= {"batch_size": batch_size, "device": device, "precision": precision}
    worker = Predictor("ours", **options)
    with torch.no_grad():
        worker.model.decoder.lm.lm_head.weight[DELIMITER] *= ends
    samplers = {way: StaticOneShot(way == "compiled", worker.device) for way in WAYS[1:]}
    samplers = {WAYS[0]: worker.sample} | samplers

    def run(way: str, k: int) -> tuple[float, Samples]:
        worker.sample = samplers[way]
        start = worker.clock()
        samples = worker.run(k, tokens, batch_size)
        return worker.clock() - start, samples

    rows: dict[str, dict[str, float]] = {}
    differences, lengths = [], {}
    for k in COUNTS:
        results = {}
        for way in WAYS:
            seconds, samples = run(way, k)
            rows[f"{way}@{k}"] = {"first_seconds": seconds}
            results[way] = {
                "tokens": samples.tokens_BKL.cpu().numpy(),
                "probabilities": samples.probs_BKL.cpu().numpy(),
            }
        differences += [assert_equal(results[way], results[WAYS[0]], f"{way}, top-{k}") for way in WAYS[1:]]
        lengths[k] = [float(samples.lengths_BK.float().mean()), int(samples.lengths_BK.max())]
    worker.use_precision()
    for k in COUNTS:
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(repeats + 1):
            for way in WAYS:
                seconds, _ = run(way, k)
                if repeat > 0:  # the first compiles in this precision
                    times[way].append(seconds)
        for way in WAYS:
            rows[f"{way}@{k}"] |= {"seconds": median(times[way]), "ratio": ratio(times[WAYS[0]], times[way])}
    return options | {
        "rows": rows,
        "lengths": lengths,
        "difference": max(differences),
        "parameters": worker.num_parameters(),
        "tokens": tokens,
        "repeats": repeats,
        "machine": machine_description(device),
    }


def table(result: dict[str, Any]) -> Table:
    rows = []
    for k, (mean, longest) in result["lengths"].items():
        of_ways = [result["rows"][f"{way}@{k}"] for way in WAYS]
        seconds = (f"{row['seconds']:.3f}" for row in of_ways)
        gain = f"{of_ways[-1]['ratio']:.2f}×", f"{of_ways[-1]['first_seconds']:.0f}"
        rows.append((str(k), f"{mean:.1f}", str(longest), *seconds, *gain))
    text = (
        f"Encoder and prefix included; labels of {result['tokens']} tokens at most; medians of {result['repeats']} "
        "rounds. Ratio: as it is / compiled; its first call compiles"
    )
    columns = ("labels", "their tokens: mean", "longest", *(f"{way} s" for way in WAYS), "ratio", "first call s")
    title = f"One-shot prediction in fixed shapes, {result['batch_size']} images"
    return build_table(title, columns, rows, caption(result, text))


@click.command()
@of_a_model
@number("--batch-size", 1, "Images per call.")
@click.option(
    "--tokens", type=click.IntRange(2), default=MAX_LABEL_TOKENS, show_default=True, help="Per label, at most."
)
@click.option(
    "--ends",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="The delimiter's weight; 0: no label ends.",
)
def static_shapes(**options: Any) -> None:
    """One-shot prediction as it is, and in fixed shapes, plain and compiled."""
    show(measure, table, **options)


if __name__ == "__main__":
    static_shapes()
