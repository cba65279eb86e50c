"""`nxtp describe --plan`: hours, bytes sent and memory of a recipe on many GPUs, by formula.

    step = max(FLOPs / (peak · MFU), bytes sent / rate of the slowest link)        communication overlaps computation
    DDP    sends 2·(n-1)/n · the float32 gradients of trained weights              ring all-reduce
    FSDP   sends   (n-1)/n · (all weights in bfloat16, forward; again those of the blocks that the backward pass
                              reaches; the float32 gradients of trained weights)   all-gathers and reduce-scatter

MFU and the rates of the links are assumed; the table prints them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import click
import torch
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table

from nxtp.config import composed, to_dataclass
from nxtp.cost.memory import memory, sections, step_of
from nxtp.data.config import DataConfig, named_sources
from nxtp.errors import UserError, nearest
from nxtp.model.flops import Flops, ModelFlops, known_gpus, peak_flops, training_flops, typical_layout
from nxtp.model.layout import PUBLISHED_LENGTH
from nxtp.model.meta import meta_model
from nxtp.model.model import Model


@dataclass(frozen=True)
class Cluster:
    """GPUs by name (see :func:`nxtp.model.flops.peak_flops`); links of a node and between nodes in bytes/s per GPU."""

    gpu: str
    inside: float
    between: float
    gpus_per_node: int = 8

    def step_seconds(self, flops: float, sent: float, ranks: int, mfu: float) -> tuple[float, float, float]:
        """(computing, sending, the step) of one rank that computes ``flops`` and sends ``sent`` bytes."""
        peak = peak_flops(self.gpu, torch.bfloat16)
        assert peak is not None, self.gpu
        computing = flops / (peak * mfu)
        sending = sent / (self.inside if ranks <= self.gpus_per_node else self.between)
        return computing, sending, max(computing, sending)


# NVLink 3 and a 200 Gb/s adapter per GPU.
A100 = Cluster("A100", inside=300e9, between=25e9)

# The published runs, from their training logs: 16 images per GPU on 32 A100-80G, 3 epochs.
PUBLISHED_RANKS, PUBLISHED_IMAGES, PUBLISHED_EPOCHS = 32, 16, 3
PUBLISHED = {  # pairs, seconds per step (median), hours
    "g3m": (3_645_221, 0.905, 5.41),
    "g70m": (70_679_389, 0.904, 104.4),
}


def sent_bytes(model: Model, strategy: str, ranks: int, batches: int = 1) -> float:
    """Bytes that each rank sends per step of ``batches`` under bf16-mixed, without the few numbers of the loss."""
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = (ranks - 1) / ranks
    if strategy == "ddp":
        return 2 * share * gradients
    weights = 2 * sum(p.numel() for p in model.parameters())
    return share * (batches * (weights + 2 * _regathered(model)) + gradients)


def _regathered(model: Model) -> int:
    """Parameters gathered again for the backward pass: of the units that it reaches (from the first trained one on),
    and of one unit before them, which FSDP prefetches in vain.

    The units are blocks and an embedding of its own; other parameters stay gathered from forward to backward.
    """
    lm = model.decoder.lm
    embedding = [] if lm.config.tie_word_embeddings else [lm.model.embed_tokens]
    before = [*model.encoder.blocks(), *embedding]
    units = [*before, *model.decoder.blocks]
    inside = {id(p) for unit in units for p in unit.parameters()}
    outside = [p for p in model.encoder.parameters() if id(p) not in inside]
    inputs = [*outside, model.projection.weight, model.image_token, lm.model.embed_tokens.weight]
    trainable = [any(p.requires_grad for p in unit.parameters()) for unit in units]
    if any(p.requires_grad for p in inputs):
        trainable[len(before)] = True
    first = trainable.index(True) if True in trainable else len(units)
    return sum(p.numel() for unit in units[max(first - 1, 0) :] for p in unit.parameters())


def published_flops(model: Model) -> float:
    """FLOPs per image as the published code executes them: two branches of 512 positions, with logits of all."""
    parts = ModelFlops(model).parts(1, PUBLISHED_LENGTH, PUBLISHED_LENGTH)
    branch = Flops.sum(parts[name] for name in ("decoder", "attention", "output layer"))
    return (parts["encoder"].total + parts["projection"].total) + 2 * branch.total


def images_of(cfg: DictConfig) -> float:
    """Images of a whole run, from the recipe's ``expected_samples`` and ``trainer.max_epochs`` or ``max_steps``.

    Raises:
        UserError: no sources, or a source without ``expected_samples``; a run without an end, or of as many steps on
            any number of GPUs.
    """
    data = to_dataclass(DataConfig, cfg.data, "data")
    if data.train is None:
        raise UserError("data.train is not set: plan a recipe, as in nxtp describe --plan experiment=g70m.")
    each = 0.0
    for name, source in named_sources(data.train).items():
        if source.expected_samples is None:
            raise UserError(f"data.train.{name or 'train'} has no expected_samples: set it, or use --images.")
        each += source.expected_samples * source.repeat
    each = min(each, data.max_samples) if data.max_samples is not None else each * (data.fraction or 1.0)
    epochs, steps = cfg.trainer.get("max_epochs"), cfg.trainer.get("max_steps")
    limits = [each * epochs] if epochs not in (None, -1) else []
    if steps not in (None, -1):
        if not cfg.global_batch:
            text = f"trainer.max_steps={steps}: how many images these are depends on the number of GPUs"
            raise UserError(f"{text}. Set global_batch, trainer.max_steps=-1 with trainer.max_epochs, or use --images.")
        limits.append(steps * cfg.global_batch)
    if not limits:
        raise UserError("trainer.max_epochs and max_steps set no end: set one, or use --images.")
    return min(limits)


def plan(cfg: DictConfig, gpus: Sequence[int], *, mfu: float, images: int | None, cluster: Cluster) -> dict[str, Any]:
    """One row per number of GPUs and strategy, and what they have in common.

    Args:
        images: of the whole run; None: the recipe's.

    Raises:
        UserError: the recipe's ``global_batch`` cannot be divided among a number of GPUs, or its images are not known.
    """
    config, vocabulary, optim, parallel = sections(cfg)
    model = meta_model(config, vocabulary, optim.trainable)
    total = float(images) if images is not None else images_of(cfg)
    flops = training_flops(model).total
    needed = cache(lambda step: memory(config, vocabulary, optim, step, parallel).total)
    planned, rows = replace(step_of(cfg), precision="bf16-mixed", on_gpu=True), []
    for ranks in gpus:
        batch = int(cfg.data.batch_size)
        per_gpu, rest = divmod(cfg.global_batch or batch * ranks, ranks)
        batch = min(batch, per_gpu)
        if rest or batch == 0 or per_gpu % batch:
            among = f"{ranks} GPUs with data.batch_size={cfg.data.batch_size}"
            raise UserError(f"global_batch={cfg.global_batch} cannot be divided among {among}.")
        batches = per_gpu // batch
        for strategy in ("ddp", "fsdp"):
            click.echo(f"planning {strategy} on {ranks} GPUs …", err=True)
            sent = sent_bytes(model, strategy, ranks, batches)
            computing, sending, seconds = cluster.step_seconds(flops * per_gpu, sent, ranks, mfu)
            sharers = ranks if strategy == "fsdp" else 2  # DDP needs the same on any number of ranks
            step = replace(planned, strategy=strategy, ranks=sharers, batch=batch, accumulates=batches > 1)
            rows.append(
                {
                    "gpus": ranks,
                    "strategy": strategy,
                    "images_per_gpu": batch,
                    "batches": batches,
                    "global_batch": per_gpu * ranks,
                    "memory_gb": needed(step) / 1e9,
                    "tflop_per_step": flops * per_gpu / 1e12,
                    "sent_gb_per_step": sent / 1e9,
                    "computing_s": computing,
                    "sending_s": sending,
                    "step_s": seconds,
                    "hours": total / (per_gpu * ranks) * seconds / 3600,
                }
            )
    return {
        "images": total,
        "tokens": total * typical_layout(model).num_tokens,
        "flops": total * flops,
        "mfu": mfu,
        "gpu": cluster.gpu,
        "inside_gb_s": cluster.inside / 1e9,
        "between_gb_s": cluster.between / 1e9,
        "rows": rows,
    }


def check_published(model: Model) -> list[dict[str, Any]]:
    """The published runs as predicted. One number is fitted: the MFU, to the first run's step."""
    flops = published_flops(model) * PUBLISHED_IMAGES
    sent = sent_bytes(model, "ddp", PUBLISHED_RANKS)
    fitted = A100.step_seconds(flops, sent, PUBLISHED_RANKS, mfu=1)[0] / PUBLISHED["g3m"][1]
    rows = []
    for name, (pairs, seconds, hours) in PUBLISHED.items():
        _, sending, step = A100.step_seconds(flops, sent, PUBLISHED_RANKS, fitted)
        steps = pairs * PUBLISHED_EPOCHS / (PUBLISHED_RANKS * PUBLISHED_IMAGES)
        rows.append(
            {
                "name": name,
                "mfu": fitted,
                "tflop_per_image": published_flops(model) / 1e12,
                "sending_s": sending,
                "step_s": step,
                "published_step_s": seconds,
                "hours": steps * step / 3600,
                "published_hours": hours,
            }
        )
    return rows


def published_model() -> Model:
    """The paper's model on the meta device, with its trained parts."""
    config, vocabulary, optim, _ = sections(composed("train", ["experiment=g3m"]))
    return meta_model(config, vocabulary, optim.trainable)


def print_plan(
    cfg: DictConfig,
    recipe: str,
    *,
    as_json: bool,
    gpu: str,
    inside: float,
    between: float,
    gpus: Sequence[int],
    **options: Any,
) -> None:
    """Print the plan of a composed recipe and the check against the published runs; ``inside``, ``between`` in GB/s.

    Raises:
        UserError: the GPU's peak in bfloat16 is not known, or as :func:`plan`.
    """
    if peak_flops(gpu, torch.bfloat16) is None:
        names = known_gpus()
        raise UserError(f"--gpu: no peak in bfloat16 is known for '{gpu}'.{nearest(gpu, names)} {', '.join(names)}.")
    cluster = Cluster(gpu, inside=inside * 1e9, between=between * 1e9)
    result = {"recipe": recipe, **plan(cfg, gpus, cluster=cluster, **options)}
    result["published"] = check_published(published_model())
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console().print(plan_table(result))


def plan_table(result: dict[str, Any]) -> Group:
    """At most 80 columns wide; numbers are per GPU and step unless the title says otherwise."""
    columns = {
        "GPUs": "{gpus}",
        "": "{strategy}",
        "images": "{images_per_gpu} × {batches}",
        "of all": "{global_batch:,}",
        "memory": "{memory_gb:.1f}",
        "sent": "{sent_gb_per_step:.2f}",
        "compute": "{computing_s:.3f}",
        "send": "{sending_s:.3f}",
        "step": "{step_s:.3f}",
        "hours": "{hours:,.1f}",
    }
    title = (
        f"{result['recipe']}: {result['images'] / 1e6:,.1f} M images, {result['tokens'] / 1e9:,.1f} G tokens, "
        f"{result['flops'] / 1e18:,.1f} EFLOP\n{result['gpu']}, MFU {result['mfu']:.0%} (assumed); links of "
        f"{result['inside_gb_s']:g} GB/s in a node, {result['between_gb_s']:g} GB/s per GPU between nodes\n"
        "Per GPU and step: images × batches, GB at the peak, GB sent, seconds"
    )
    plans = _table(title, columns, result["rows"])
    columns = {
        "run": "{name}",
        "TFLOP": "{tflop_per_image:.2f}",
        "MFU": "{mfu:.1%}",
        "send": "{sending_s:.2f}",
        "step": "{step_s:.3f}",
        "published": "{published_step_s:.3f}",
        "hours": "{hours:,.2f}",
        "published ": "{published_hours:,.2f}",
    }
    title = (
        "The published runs: 32 A100-80G, 16 images each, TFLOP per image as executed\n"
        "Only the MFU is fitted, to the first step"
    )
    return Group(plans, _table(title, columns, result["published"]))


def _table(title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    for name in columns:
        table.add_column(name.strip(), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.format(**row) for cell in columns.values()))
    return table
