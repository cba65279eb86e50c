"""What does padding cost, and what would length-bucketed or packed batches save at most?

    python experiments/benchmarks/padding.py

At most 3 % of the FLOPs, so neither is built. By formula, 2026-11-25; shares of an epoch:

    model, captions                                        batch   padding   bucketing saves   packing saves at most
    published, prefix of 264; synthetic, 3.5 nouns each       16    2.40 %            2.09 %                  2.16 %
    the same                                                  64    3.21 %            2.80 %                  2.89 %
    the same, 7 nouns                                         64    2.81 %            2.45 %                  2.52 %
    experiment=scenes, prefix of 12; 4,000 of its captions    32   18.98 %            3.13 %                  3.22 %

The prefix is most of a sequence and the same for all. Where it is short, the encoder and the output layer, which have
no padding, are most of the work.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from rich.table import Table

from nxtp.bench.command import as_json, number, seed
from nxtp.bench.reporting import build_table, show
from nxtp.config import composed, to_dataclass
from nxtp.data.config import DataConfig
from nxtp.data.labels.from_samples import label_counts, labels_of
from nxtp.data.labels.nouns import noun_backend
from nxtp.data.mixture import open_set
from nxtp.data.shards.reader import SampleError
from nxtp.errors import UserError
from nxtp.model.flops import Flops, ModelFlops
from nxtp.model.layout import Layout, Objective, lay_out
from nxtp.model.meta import meta_model
from nxtp.model.model import ModelConfig
from nxtp.model.tokenizer import train_tokenizer
from nxtp.train.optim import OptimConfig

PROMPT_TOKENS, DELIMITER = 7, 4
POOL = 50  # batches among which samples are sorted by length
# Of synthetic captions, assumed after COCO's (ten words): at most nine nouns, each of one to three tokens of LLaMA's.
MOST_NOUNS, TOKENS_OF_NOUN = 9, (0.6, 0.28, 0.12)

Labels = list[list[list[int]]]  # per image and label, the token ids


def synthetic_labels(images: int, nouns: float, seed: int) -> Labels:
    """Labels of captions with ``nouns`` nouns on average: one, and a binomial number of others."""
    generator = np.random.default_rng(seed)
    counts = 1 + generator.binomial(MOST_NOUNS - 1, (nouns - 1) / (MOST_NOUNS - 1), images)
    sizes = generator.choice((1, 2, 3), int(counts.sum()), p=TOKENS_OF_NOUN)
    return [[[5] * size for size in image] for image in np.split(sizes, counts.cumsum()[:-1])]


def labels_of_shards(shards: str, images: int, vocab_size: int) -> Labels:
    """Labels of the first samples of real shards, in tokens of a vocabulary trained on all of them."""
    with TemporaryDirectory() as temporary:
        config = DataConfig(train=shards, index_dir=temporary)
        opened = open_set("train", shards, config).shards
        tokenizer = train_tokenizer(label_counts(opened, config), vocab_size=vocab_size)
        nouns, found = noun_backend(config.nouns), []
        for position in range(min(images, len(opened))):
            try:
                found.append(labels_of(opened.read(position), nouns)[: config.max_labels])
            except SampleError:
                continue
    return [ids for labels in found if (ids := [i for i in tokenizer.encode_labels(labels) if i])]


def batches(labels: Labels, batch: int, pool: int, seed: int) -> list[Labels]:
    """Whole batches in random order; with ``pool`` > 1 samples are sorted by length within ``pool`` batches."""
    order = np.random.default_rng(seed).permutation(len(labels))
    lengths = np.array([sum(map(len, image)) + len(image) for image in labels])
    pools = [order[i : i + pool * batch] for i in range(0, len(order), pool * batch)]
    order = np.concatenate([p[lengths[p].argsort(kind="stable")] for p in pools]) if pool > 1 else order
    return [[labels[i] for i in order[j : j + batch]] for j in range(0, len(order) - batch + 1, batch)]


def measure(
    *, shards: str | None, experiment: str, images: int, nouns: float, batch_size: int, seed: int
) -> dict[str, Any]:
    """Padding of one epoch's batches under the model and objective of an experiment.

    Returns:
        ``rows`` (as they come, bucketed) with ``padding``, a share of the decoder's positions, and ``cost``,
        executed training FLOPs over those of real tokens, less one; ``bucketing_saves`` and ``packing_saves``, shares
        of the executed FLOPs. That of packing is an upper bound: no padding, and packing itself costs nothing.

    Raises:
        UserError: fewer samples than one batch, an impossible number of nouns, unreadable shards.
    """
    if not 1 <= nouns <= MOST_NOUNS:
        raise UserError(f"--nouns must be from 1 to {MOST_NOUNS}, got {nouns:g}.")
    cfg = composed("train", [f"experiment={experiment}"])
    config = to_dataclass(ModelConfig, cfg.model, "model")
    config.encoder.pretrained = config.decoder.source = None
    model = meta_model(config, config.vocab_size or None, to_dataclass(OptimConfig, cfg.optim, "optim").trainable)
    labels = (
        labels_of_shards(shards, images, config.vocab_size or 8192) if shards else synthetic_labels(images, nouns, seed)
    )
    if len(labels) < batch_size:
        raise UserError(f"{len(labels)} samples with labels: fewer than one batch of {batch_size}.")
    formula = ModelFlops(model)

    def laid_out(image_labels: Labels) -> Layout:
        return lay_out(
            image_labels,
            prompt=[1] * PROMPT_TOKENS,
            delimiter=DELIMITER,
            num_image_tokens=model.num_image_tokens,
            objective=to_dataclass(Objective, cfg.objective, "objective"),
        )

    rows, executed = {}, {}
    for name, pool in (("as they come", 1), ("bucketed by length", POOL)):
        layouts = [laid_out(image_labels) for image_labels in batches(labels, batch_size, pool, seed)]
        positions = sum(layout.segments_BT.numel() for layout in layouts)
        count = len(layouts) * batch_size
        executed[name] = Flops.sum(formula.of(layout, padding=True) for layout in layouts).total / count
        real = Flops.sum(formula.of(layout) for layout in layouts).total / count
        rows[name] = {
            "length": positions / count,
            "padding": 1 - sum(layout.num_tokens for layout in layouts) / positions,
            "cost": executed[name] / real - 1,
        }
    plain = rows["as they come"]["cost"]
    return {
        "rows": rows,
        "bucketing_saves": 1 - executed["bucketed by length"] / executed["as they come"],
        "packing_saves": plain / (1 + plain),
        "prefix": model.num_image_tokens + 1 + PROMPT_TOKENS,
        "label_tokens": float(np.mean([sum(map(len, image)) + len(image) for image in labels])),
        "images": len(labels),
        "batch_size": batch_size,
        "experiment": experiment,
        "source": shards or f"synthetic captions of {nouns:g} nouns",
    }


def table(result: dict[str, Any]) -> Table:
    rows = [
        (name, f"{row['length']:.1f}", f"{row['padding']:.2%}", f"{row['cost']:.2%}")
        for name, row in result["rows"].items()
    ]
    caption = (
        f"Bucketing saves {result['bucketing_saves']:.2%} of the FLOPs, packing at most {result['packing_saves']:.2%}. "
        f"experiment={result['experiment']}, {result['images']:,} images ({result['source']}), batches of "
        f"{result['batch_size']}; a prefix of {result['prefix']} and on average {result['label_tokens']:.1f} positions "
        f"of labels; bucketed: sorted within {POOL} batches"
    )
    columns = ("", "positions per sequence", "padding", "FLOPs more than without")
    return build_table("Padding of training batches", columns, rows, caption)


@click.command()
@as_json
@seed
@click.option("--shards", help="With captions: a directory, glob or brace expression; default: synthetic captions.")
@click.option("--experiment", default="g3m", show_default=True, help="Its model, objective and trained parts.")
@number("--images", 20_000, "At most.")
@click.option("--nouns", type=float, default=3.5, show_default=True, help="Of a synthetic caption, on average.")
@number("--batch-size", 16, "Images per rank and step.")
def padding(**options: Any) -> None:
    """The share of padding, and what bucketed or packed batches could save."""
    show(measure, table, **options)


if __name__ == "__main__":
    padding()
