"""Hours, bytes on the network and memory of a recipe on many GPUs, by formula, before any of them is asked for.

    step = max(FLOPs / (peak · MFU), bytes sent / rate of the slowest link)        communication overlaps computation
    DDP    sends 2·(n-1)/n · the float32 gradients of what trains                  ring all-reduce
    FSDP   sends   (n-1)/n · (all weights in bfloat16, forward; the blocks that the backward pass reaches once more;
                              the float32 gradients of what trains)                all-gathers and reduce-scatter

Two numbers are assumed and shown: MFU, and the links' rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from nxtp.config import compose_and_run, conf_dir, to_dataclass
from nxtp.cost.memory import LABEL_TOKENS, LABELS, PROMPT_TOKENS, Step, memory
from nxtp.data.config import DataConfig, named_sources
from nxtp.distributed.parallelize import ParallelConfig, blocks_of
from nxtp.errors import UserError
from nxtp.model.flops import Flops, ModelFlops, meta_model, peak_flops, training_flops
from nxtp.model.layout import PUBLISHED_LENGTH
from nxtp.model.model import Model, ModelConfig
from nxtp.train.optim import OptimConfig


@dataclass(frozen=True)
class Cluster:
    """GPUs by name (see :func:`nxtp.model.flops.peak_flops`), so many a node; links in bytes/s a GPU, each way."""

    gpu: str
    inside: float
    between: float
    gpus_a_node: int = 8

    def link(self, ranks: int) -> float:
        return self.inside if ranks <= self.gpus_a_node else self.between

    def step_seconds(self, flops: float, sent: float, ranks: int, mfu: float) -> tuple[float, float, float]:
        """(computing, sending, the step) of one rank that computes ``flops`` and sends ``sent`` bytes."""
        computing = flops / (peak_flops(self.gpu, torch.bfloat16) * mfu)
        sending = sent / self.link(ranks)
        return computing, sending, max(computing, sending)


# NVLink 4 and a 400 Gb/s adapter a GPU; NVLink 3 and 200 Gb/s.
H100 = Cluster("H100 SXM", inside=450e9, between=50e9)
A100 = Cluster("A100", inside=300e9, between=25e9)

# The one published point (its training logs): 16 images a GPU on 32 A100-80G, 3 epochs.
PUBLISHED_RANKS, PUBLISHED_IMAGES, PUBLISHED_EPOCHS = 32, 16, 3
PUBLISHED = {  # pairs, seconds a step (median), hours
    "g3m": (3_645_221, 0.905, 5.41),
    "g70m": (70_679_389, 0.904, 104.4),
}


def sent_bytes(model: Model, strategy: str, ranks: int) -> float:
    """Bytes that each rank sends in a micro-batch under bf16-mixed, the loss's few numbers left out."""
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = (ranks - 1) / ranks
    if strategy == "ddp":
        return 2 * share * gradients
    weights = 2 * sum(p.numel() for p in model.parameters())
    return share * (weights + 2 * _regathered(model) + gradients)


def _regathered(model: Model) -> int:
    """Parameters gathered again for the backward pass: of the blocks that it reaches, which are the first with
    something to train and all behind it, and of one block before them, which FSDP fetches ahead in vain.

    What is in no block stays gathered from the forward to the backward pass.
    """
    blocks = blocks_of(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [p for p in model.encoder.parameters() if id(p) not in inside]
    inputs = [*outside, model.projection.weight, model.image_token, model.decoder.lm.model.embed_tokens.weight]
    trainable = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    if any(p.requires_grad for p in inputs):
        trainable[len(model.encoder.blocks())] = True
    first = trainable.index(True) if True in trainable else len(blocks)
    return sum(p.numel() for block in blocks[max(first - 1, 0) :] for p in block.parameters())


def published_flops(model: Model) -> float:
    """FLOPs an image as the published code executes them: two branches of 512 positions, all of them to logits."""
    parts = ModelFlops(model).parts(1, PUBLISHED_LENGTH, PUBLISHED_LENGTH)
    branch = Flops.sum(parts[name] for name in ("decoder", "attention", "output layer"))
    return (parts["encoder"].total + parts["projection"].total) + 2 * branch.total


def images_of(cfg: DictConfig) -> float:
    """Images of a whole run, epochs included, by the numbers of samples that the recipe expects.

    Raises:
        UserError: a source without such a number.
    """
    data = to_dataclass(DataConfig, cfg.data, "data")
    if data.train is None:
        raise UserError("data.train is not set: plan a recipe, as in nxtp bench plan experiment=g70m.")
    each = 0.0
    for name, source in named_sources(data.train).items():
        if source.expected_samples is None:
            raise UserError(f"data.train.{name or 'train'} does not say how many samples it has: give --images.")
        each += source.expected_samples * source.repeat
    each = min(each, data.max_samples) if data.max_samples is not None else each * (data.fraction or 1.0)
    return each * int(cfg.trainer.max_epochs)


def plan(
    cfg: DictConfig, gpus: Sequence[int], *, mfu: float, images: int | None, global_batch: int | None, cluster: Cluster
) -> dict[str, Any]:
    """One row for each number of GPUs and strategy, and what they have in common.

    Args:
        images: of the whole run; None takes the recipe's.
        global_batch: images a step over all GPUs; None keeps the recipe's images a GPU.
    """
    config = to_dataclass(ModelConfig, cfg.model, "model")
    optim = to_dataclass(OptimConfig, cfg.optim, "optim")
    parallel = to_dataclass(ParallelConfig, cfg.get("parallel"), "parallel")
    vocabulary = None if config.decoder.source else config.vocab_size
    model = meta_model(config, vocabulary, optim.trainable)
    total = float(images) if images is not None else images_of(cfg)
    flops = sum(training_flops(model, prompt_tokens=PROMPT_TOKENS, labels=LABELS, label_tokens=LABEL_TOKENS))
    needed = cache(lambda step: memory(config, vocabulary, optim, step, parallel).total)
    rows = []
    for ranks in gpus:
        batch = int(cfg.data.batch_size) if global_batch is None else global_batch // ranks
        if global_batch is not None and (batch == 0 or global_batch % ranks):
            raise UserError(f"--global-batch {global_batch} cannot be divided among {ranks} GPUs.")
        for strategy in ("ddp", "fsdp"):
            sent = sent_bytes(model, strategy, ranks)
            computing, sending, seconds = cluster.step_seconds(flops * batch, sent, ranks, mfu)
            sharers = ranks if strategy == "fsdp" else 2  # all of DDP's numbers of ranks are alike
            step = Step(strategy, sharers, batch=batch, precision="bf16-mixed", on_gpu=True)
            rows.append(
                {
                    "gpus": ranks,
                    "strategy": strategy,
                    "images_a_gpu": batch,
                    "global_batch": batch * ranks,
                    "memory_gb": needed(step) / 1e9,
                    "tflop_a_step": flops * batch / 1e12,
                    "sent_gb_a_step": sent / 1e9,
                    "computing_s": computing,
                    "sending_s": sending,
                    "step_s": seconds,
                    "hours": total / (batch * ranks) * seconds / 3600,
                }
            )
    tokens = model.num_image_tokens + 1 + PROMPT_TOKENS + LABELS * (LABEL_TOKENS + 1)
    return {
        "images": total,
        "tokens": total * tokens,
        "flops": total * flops,
        "mfu": mfu,
        "gpu": cluster.gpu,
        "inside_gb_s": cluster.inside / 1e9,
        "between_gb_s": cluster.between / 1e9,
        "rows": rows,
    }


def check_published(model: Model) -> list[dict[str, Any]]:
    """The published runs, predicted with the MFU that makes the first one's step come out: the one fitted number."""
    flops = published_flops(model) * PUBLISHED_IMAGES
    sent = sent_bytes(model, "ddp", PUBLISHED_RANKS)
    fitted = flops / (peak_flops(A100.gpu, torch.float16) * PUBLISHED["g3m"][1])
    rows = []
    for name, (pairs, seconds, hours) in PUBLISHED.items():
        _, sending, step = A100.step_seconds(flops, sent, PUBLISHED_RANKS, fitted)
        steps = pairs * PUBLISHED_EPOCHS / (PUBLISHED_RANKS * PUBLISHED_IMAGES)
        rows.append(
            {
                "name": name,
                "mfu": fitted,
                "tflop_an_image": published_flops(model) / 1e12,
                "sending_s": sending,
                "step_s": step,
                "published_step_s": seconds,
                "hours": steps * step / 3600,
                "published_hours": hours,
            }
        )
    return rows


def published_model() -> Model:
    """The paper's model and what of it trains, on the meta device."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", ["experiment=g3m"])
    trainable = to_dataclass(OptimConfig, cfg.optim, "optim").trainable
    return meta_model(to_dataclass(ModelConfig, cfg.model, "model"), None, trainable)


def measure_plan(overrides: Sequence[str], **options: Any) -> dict[str, Any]:
    """:func:`plan` of a configuration composed from ``overrides``, and ``published``: :func:`check_published`."""
    found: dict[str, Any] = {}
    compose_and_run(lambda cfg: found.update(plan(cfg, **options)), "train", ["name=plan", *overrides])
    return {"recipe": " ".join(overrides), **found, "published": check_published(published_model())}


def plan_table(result: dict[str, Any]) -> Group:
    """Narrow enough for 80 columns; per GPU and step where nothing else is said."""
    columns = {
        "GPUs": "{gpus}",
        "": "{strategy}",
        "images": "{images_a_gpu}",
        "of all": "{global_batch:,}",
        "memory": "{memory_gb:.1f}",
        "sent": "{sent_gb_a_step:.2f}",
        "compute": "{computing_s:.3f}",
        "send": "{sending_s:.3f}",
        "step": "{step_s:.3f}",
        "hours": "{hours:,.1f}",
    }
    title = (
        f"{result['recipe']}: {result['images'] / 1e6:,.1f} M images, {result['tokens'] / 1e9:,.1f} G tokens, "
        f"{result['flops'] / 1e18:,.1f} EFLOP\n{result['gpu']}, MFU {result['mfu']:.0%} (assumed); links of "
        f"{result['inside_gb_s']:g} GB/s in a node, {result['between_gb_s']:g} GB/s a GPU between nodes\n"
        "A GPU and step: images, GB at the peak, GB sent, seconds"
    )
    plans = _table(title, columns, result["rows"])
    columns = {
        "run": "{name}",
        "TFLOP": "{tflop_an_image:.2f}",
        "MFU": "{mfu:.1%}",
        "send": "{sending_s:.2f}",
        "step": "{step_s:.3f}",
        "published": "{published_step_s:.3f}",
        "hours": "{hours:,.2f}",
        "published ": "{published_hours:,.2f}",
    }
    title = (
        "The published runs: 32 A100-80G, 16 images each, TFLOP an image as executed\n"
        "MFU is fitted to the first step, nothing else is"
    )
    return Group(plans, _table(title, columns, result["published"]))


def _table(title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    for name in columns:
        table.add_column(name.strip(), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.format(**row) for cell in columns.values()))
    return table
