"""`nxtp bench closed`: the probability of a thousand given labels, beside a top-20 prediction of the same image."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table

from nxtp.bench.measure import caption, ratio
from nxtp.bench.processes import choose_device, machine_description
from nxtp.bench.workers import SIZES
from nxtp.errors import UserError
from nxtp.model.layout import lay_out
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.sampling.closed_vocabulary import Vocabulary, class_log_probs, name_log_probs, read_classes
from nxtp.sampling.one_shot import one_shot

TOP_K, VOCABULARY, COMPARED = 20, 2048, 8


def measure_closed(
    labels: str = "imagenet1k:first",
    size: str = "full",
    steps: int = 3,
    repeats: int = 3,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Seconds of one image for both.

    Weights are random; a vocabulary of 2,048 trained on the labels cuts them into tokens, the output layer is as wide
    as the model's.

    Args:
        labels: as of nxtp classify.
        steps: decoding steps of the prediction after the first token; random weights hardly ever end a label sooner.

    Returns:
        ``ratio``: closed vocabulary / prediction, encoder and prefix included.

    Raises:
        UserError: a label scored alone has another probability.
    """
    where = torch.device(choose_device(device))
    classes = read_classes(labels)
    tokenizer = train_tokenizer(
        [name for names in classes for name in names], vocab_size=min(VOCABULARY, SIZES[size].vocab)
    )
    known = Vocabulary(classes, tokenizer)
    torch.manual_seed(seed)
    with where:
        model = Model(SIZES[size].config()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 3, SIZES[size].image_size, SIZES[size].image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(where)
    prompt = tokenizer.prompt_ids
    difference = _compare(model, images, known, prompt)
    if precision == "bf16-true":
        model.to(torch.bfloat16)

    def predict() -> None:
        one_shot(model, images, prompt=prompt, delimiter=known.delimiter, top_k=TOP_K, max_tokens=steps + 1)

    def classify() -> None:
        class_log_probs(model, images, known, prompt=prompt)

    seconds: dict[str, list[float]] = {"predict": [], "classify": []}
    with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for turn in range(repeats + 1):
            for name, call in (("predict", predict), ("classify", classify)):
                begin = time.perf_counter()
                call()
                if where.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first is not counted
                    seconds[name].append(time.perf_counter() - begin)
    return {
        "ratio": ratio(seconds["classify"], seconds["predict"]),
        "difference": difference,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "labels": len(classes),
        "names": len(known.sequences),
        "tokens": sum(map(len, known.sequences)),
        "nodes": len(known.tree),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size": size,
        "steps": steps,
        "precision": precision,
        "repeats": repeats,
        "machine": machine_description(where.type),
    }


@torch.no_grad()
def _compare(model: Model, images: torch.Tensor, known: Vocabulary, prompt: list[int]) -> float:
    found = name_log_probs(model, images, known, prompt=prompt)[0]
    worst = 0.0
    for place in np.linspace(0, len(known.sequences) - 1, COMPARED, dtype=int).tolist():
        layout = lay_out(
            [[known.sequences[place]]],
            prompt=prompt,
            delimiter=known.delimiter,
            num_image_tokens=model.num_image_tokens,
        )
        alone = -model(images, layout.to(images.device)).total
        worst = max(worst, abs(float(alone - found[place])) / max(1.0, abs(float(alone))))
    if worst > 1e-4:
        raise UserError(f"Labels in one pass differ from labels alone by {worst:.1e}: nothing was measured.")
    return worst


def closed_table(result: dict[str, Any]) -> Table:
    table = Table(title="One image: a closed vocabulary beside a prediction", caption_justify="left")
    for column in ("", "seconds", "ratio"):
        table.add_column(column, justify="right")
    seconds = result["seconds"]
    table.add_row(f"top-{TOP_K} prediction", f"{seconds['predict']:.3f}", "1.0×")
    table.add_row(f"{result['labels']:,} labels", f"{seconds['classify']:.3f}", f"{result['ratio']:.1f}×")
    table.caption = caption(
        result,
        f"{result['names']:,} names of {result['tokens']:,} tokens are a tree of {result['nodes']:,} nodes. "
        f"Encoder and prefix included; medians of {result['repeats']} rounds",
    )
    return table
