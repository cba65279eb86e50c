"""`nxtp bench static`: one-shot sampling as it is, beside fixed shapes: one graph for all steps, plain and compiled.

Fixed shapes are what ``torch.compile`` without recompilation and CUDA graphs ask for: keys and values preallocated for
the prefix and K branches at every step, and every branch computed until the last one of the batch has ended.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import StaticCache

from nxtp.bench.measure import COUNTS, caption, ratio
from nxtp.bench.processes import assert_equal, choose_device, machine_description
from nxtp.bench.workers import DELIMITER, SIZES, Predictor
from nxtp.model.model import Model
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS, Samples, finished, first_tokens, likeliest_

WAYS = ("as it is", "static", "compiled")


def static_step(
    model: Model, tokens_BK: Tensor, step: Tensor, prefix: int, max_tokens: int, cache: StaticCache
) -> tuple[Tensor, Tensor]:
    """Probability and id of each branch's likeliest token; ``step`` (1, 2, …) is a tensor, which no graph fixes."""
    branches = tokens_BK.shape[1]
    branch = torch.arange(branches, device=tokens_BK.device)[:, None]
    key = torch.arange(branches * (max_tokens - 1), device=tokens_BK.device)[None]
    own = (key % branches == branch) & (
        key < step * branches
    )  # nxtp.model.layout.branch_mask, and no key of later steps
    mask = torch.cat([own.new_ones(branches, prefix), own], dim=1)[None, None]
    decoder = model.decoder
    positions = (prefix - 1 + step).expand(1, branches)
    return likeliest_(decoder.logits(decoder(decoder.embed(tokens_BK), positions, mask, cache)))


class StaticOneShot:
    """:func:`nxtp.sampling.one_shot.one_shot` in fixed shapes.

    Args:
        compiled: the step is compiled, once for each number of images and labels; on CUDA into a CUDA graph, for
            which the cache stays where it is from call to call.
    """

    def __init__(self, compiled: bool, device: torch.device):
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.step = torch.compile(static_step, dynamic=False, mode=mode) if compiled else static_step
        self.caches: dict[tuple[int, int, int], StaticCache] = {}

    @torch.inference_mode()
    def __call__(self, model: Model, images: Tensor, *, prompt, delimiter, top_k, max_tokens, never_first) -> Samples:
        logits_BV, prefilled = model.prefill(images, prompt)
        prefix = model.num_image_tokens + 1 + len(prompt)
        probs_BK, tokens_BK = first_tokens(logits_BV, top_k, never_first)
        shape = *tokens_BK.shape, max_tokens
        if shape not in self.caches:
            length = prefix + shape[1] * (max_tokens - 1)
            self.caches[shape] = StaticCache(model.decoder.lm.config, max_cache_len=length)
        cache = self.caches[shape]
        for index, layer in enumerate(prefilled.layers):
            cache.layers[index].cumulative_length.zero_()  # what is left of the last call stays masked
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
        return finished(tokens_BKL, probs_BKL, delimiter)


def measure_static(
    size: str = "full",
    repeats: int = 3,
    batch: int = 1,
    tokens: int = MAX_LABEL_TOKENS,
    ends: float = 30.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Seconds of each way for a batch of images, from uint8 to labels of ``tokens`` tokens at most.

    Args:
        ends: scales the delimiter's output weights, so that with random weights some labels end at every step; with
            0 none ends.
        precision: of the measured calls; results are compared in float32 first.

    Returns:
        ``rows``, by "way@labels": ``seconds``; ``ratio`` (as it is / that way, median over the rounds) and
        ``first_seconds`` (of the first call in float32, compilation included). ``lengths``, by labels: tokens of the
        mean and of the longest label.

    Raises:
        UserError: the ways disagree, or there is no such device.
    """
    device = choose_device(device)
    worker = Predictor("ours", SIZES[size], batch, seed, device=device, precision=precision)
    with torch.no_grad():
        worker.model.decoder.lm.lm_head.weight[DELIMITER] *= ends
    samplers = {way: StaticOneShot(way == "compiled", worker.device) for way in WAYS[1:]}
    samplers = {WAYS[0]: worker.sample} | samplers

    def run(way: str, k: int) -> tuple[float, Samples]:
        worker.sample = samplers[way]
        start = worker.clock()
        samples = worker.run(k, tokens, batch)
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
    worker.narrow()
    for k in COUNTS:
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(repeats + 1):
            for way in WAYS:
                seconds, _ = run(way, k)
                if repeat > 0:  # the first is compiled in this precision
                    times[way].append(seconds)
        for way in WAYS:
            rows[f"{way}@{k}"] |= {"seconds": median(times[way]), "ratio": ratio(times[WAYS[0]], times[way])}
    return {
        "rows": rows,
        "lengths": lengths,
        "difference": max(differences),
        "parameters": sum(parameter.numel() for parameter in worker.model.parameters()),
        "size": size,
        "batch": batch,
        "tokens": tokens,
        "precision": precision,
        "repeats": repeats,
        "machine": machine_description(device),
    }


def static_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"One-shot prediction in fixed shapes, {result['batch']} images", caption_justify="left")
    for column in ("labels", "their tokens: mean", "longest", *(f"{way} s" for way in WAYS), "ratio", "first call s"):
        table.add_column(column, justify="right")
    for k, (mean, longest) in result["lengths"].items():
        rows = [result["rows"][f"{way}@{k}"] for way in WAYS]
        seconds = [f"{row['seconds']:.3f}" for row in rows]
        last = rows[-1]
        table.add_row(
            str(k), f"{mean:.1f}", str(longest), *seconds, f"{last['ratio']:.2f}×", f"{last['first_seconds']:.0f}"
        )
    table.caption = caption(
        result,
        f"Encoder and prefix included; labels of {result['tokens']} tokens at most; medians of {result['repeats']} "
        "rounds. Ratio: as it is / compiled; its first call compiles",
    )
    return table
