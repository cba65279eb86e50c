"""Parameters by part, tokens, FLOPs and memory per rank of a configuration, without data, in seconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from nxtp.cost.memory import memory, sections, step_of
from nxtp.errors import counted
from nxtp.model.flops import TYPICAL, training_flops, typical_layout
from nxtp.model.meta import count_parameters, meta_model
from nxtp.train.checks import check_settings

GPU_SIZES_GB = (16, 24, 40, 48, 80, 141)
RESERVED_GB = 2  # CUDA's context, buffers of NCCL and cuBLAS
NAMES = {"optimizer": "optimiser state", "working": "working memory"}


def description(cfg: DictConfig) -> dict[str, Any]:
    """What the composed configuration would train, as ``nxtp describe --json`` prints it.

    Raises:
        UserError: its settings contradict each other, or the memory of its strategy is not known.
    """
    check_settings(cfg)
    config, vocabulary, optim, parallel = sections(cfg)
    step = step_of(cfg)
    needed = memory(config, vocabulary, optim, step, parallel)
    model = meta_model(config, vocabulary, optim.trainable)
    forward, backward = training_flops(model)
    return {
        "parameters": count_parameters(model),
        "vocabulary": vocabulary,  # rows, at most: the tokenizer is trained on the labels; null: the decoder's own
        "tokens_per_image": typical_layout(model).num_tokens,
        "image_tokens": model.num_image_tokens,
        "flops_per_image": {"forward": forward, "backward": backward},
        "step": asdict(step),
        "memory_bytes": {"most": needed.most, "peak": needed.peak, "when": needed.when, "total": needed.total},
    }


def print_description(cfg: DictConfig, as_json: bool = False) -> None:
    found = description(cfg)
    if as_json:
        click.echo(json.dumps(found))
        return
    counts = found["parameters"]
    table = Table(title="Parameters (millions)")
    for column in ("part", "all", "trained", "frozen"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in ("encoder", "projection", "image_token", "decoder", "total"):
        every, trained = counts[part], counts[f"{part}_trained"]
        cells = (f"{count / 1e6:,.2f}" for count in (every, trained, every - trained))
        table.add_row(part, *cells, style="bold" if part == "total" else None, end_section=part == "decoder")

    flops = found["flops_per_image"]
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"tokens per image  {found['tokens_per_image']}: {found['image_tokens']} of the image, {TYPICAL}\n"
        f"FLOPs per image   {flops['forward'] / 1e9:,.2f} G forward, {flops['backward'] / 1e9:,.2f} G backward"
    )
    if found["vocabulary"] is not None:
        console.print(f"vocabulary        up to {found['vocabulary']} rows (the tokenizer is trained on the labels)")
    console.print(memory_table(found["memory_bytes"], found["step"]))
    if found["step"]["on_gpu"]:
        gigabytes = found["memory_bytes"]["total"] / 1e9 + RESERVED_GB
        fits = next((f"a GPU of {size} GB" for size in GPU_SIZES_GB if gigabytes <= size), "no known GPU")
        console.print(f"fits              {fits}, with {RESERVED_GB} GB for CUDA, NCCL and cuBLAS")


def memory_table(memory: dict[str, Any], step: dict[str, Any]) -> Table:
    """What a rank stores, and the peak of training and validation; both as in :func:`description`."""
    caption = (
        f"{counted(step['ranks'], 'rank')}, {step['strategy']}, {step['batch']} images each, {step['precision']}; "
        f"peak in {memory['when']}"
    )
    table = Table(title="Memory per rank (GB)", caption=caption)
    for column in ("part", "at most", "at the peak"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, size in memory["peak"].items():
        most = f"{memory['most'][part] / 1e9:,.2f}" if part in memory["most"] else ""
        table.add_row(NAMES.get(part, part), most, f"{size / 1e9:,.2f}", end_section=part == "working")
    table.add_row("total", "", f"{memory['total'] / 1e9:,.2f}", style="bold")
    return table
