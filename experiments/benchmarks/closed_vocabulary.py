"""How long does a closed vocabulary take, compared with a top-20 prediction of the same image?

    python experiments/benchmarks/closed_vocabulary.py

2026-11-25, two threads of an AMD EPYC, torch 2.15, nothing else running; 106 M parameters, float32. ImageNet's 1,000
first names have 2,537 tokens in a tree of 2,147 nodes:

                      seconds   ratio
    top-20 prediction    0.44    1.0×
    1,000 labels         3.2     7.3×

Labels scored alone give the same probabilities to 2e-7. The tokens are those of a vocabulary of 2,048 trained on the
names.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from rich.table import Table

from nxtp.bench.command import number, of_a_model
from nxtp.bench.models import SIZES, random_images
from nxtp.bench.reporting import build_table, caption, machine_description, ratio, show
from nxtp.errors import UserError
from nxtp.model.layout import lay_out
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.sampling.closed_vocabulary import Vocabulary, class_log_probs, name_log_probs, read_classes
from nxtp.sampling.one_shot import one_shot

TOP_K, VOCABULARY, COMPARED = 20, 2048, 8


def measure(
    *, classes: str, size: str, steps: int, repeats: int, seed: int, device: str, precision: str
) -> dict[str, Any]:
    """Seconds of one image for both, with random weights; the output layer is as wide as the model's.

    Args:
        classes: as of nxtp classify.
        steps: decoding steps of the prediction after the first token; random weights end hardly any label earlier.

    Returns:
        ``ratio``: closed vocabulary / prediction, encoder and prefix included.

    Raises:
        UserError: a label scored alone has another probability.
    """
    where = torch.device(device)
    labels = read_classes(classes)
    torch.manual_seed(seed)
    with where:
        model = Model(SIZES[size]().config).eval().requires_grad_(False)
    names = [name for names in labels for name in names]
    tokenizer = train_tokenizer(names, vocab_size=min(VOCABULARY, model.decoder.vocab_size))
    known = Vocabulary(labels, tokenizer)
    images = random_images(model.config.encoder.image_size, 1, seed).to(where)
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
                if turn:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - begin)
    return {
        "ratio": ratio(seconds["classify"], seconds["predict"]),
        "difference": difference,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "labels": len(labels),
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


def table(result: dict[str, Any]) -> Table:
    seconds = result["seconds"]
    rows = [
        (f"top-{TOP_K} prediction", f"{seconds['predict']:.3f}", "1.0×"),
        (f"{result['labels']:,} labels", f"{seconds['classify']:.3f}", f"{result['ratio']:.1f}×"),
    ]
    text = (
        f"{result['names']:,} names of {result['tokens']:,} tokens are a tree of {result['nodes']:,} nodes. "
        f"Encoder and prefix included; medians of {result['repeats']} rounds"
    )
    columns = ("", "seconds", "ratio")
    return build_table("One image: a closed vocabulary and a prediction", columns, rows, caption(result, text))


@click.command()
@of_a_model
@click.option("--classes", default="imagenet1k:first", show_default=True, help="As of nxtp classify.")
@number("--steps", 3, "Decoding steps of the prediction after a label's first token.")
def closed_vocabulary(**options: Any) -> None:
    """The probability of a thousand given labels, and a top-20 prediction of the same image."""
    show(measure, table, **options)


if __name__ == "__main__":
    closed_vocabulary()
