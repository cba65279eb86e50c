"""`nxtp describe`: parameters by part, tokens and FLOPs of a configuration, on the meta device, in seconds."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from nxtp.config import compose_and_run, to_dataclass
from nxtp.model import ModelConfig
from nxtp.optim import OptimConfig
from nxtp.perf import count_parameters, meta_model, training_flops

LABELS, LABEL_TOKENS, PROMPT_TOKENS = 8, 2, 7  # a typical caption


def main(argv: Sequence[str]) -> int:
    compose_and_run(describe, "train", ["name=describe", *argv])
    return 0


def describe(cfg: DictConfig) -> None:
    """Print what the composed configuration would train."""
    model_config = to_dataclass(ModelConfig, cfg.model, "model")
    optim = to_dataclass(OptimConfig, cfg.optim, "optim")
    vocabulary = None if model_config.decoder.source else model_config.vocab_size
    model = meta_model(model_config, vocabulary, optim.trains)
    counts = count_parameters(model)

    table = Table(title="Parameters (millions)")
    for column in ("part", "all", "trained", "frozen"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in ("encoder", "projection", "image_token", "decoder", "total"):
        every, trained = counts[part], counts[f"{part}_trained"]
        cells = (f"{count / 1e6:,.2f}" for count in (every, trained, every - trained))
        table.add_row(part, *cells, style="bold" if part == "total" else None, end_section=part == "decoder")

    forward, backward = training_flops(model, prompt_tokens=PROMPT_TOKENS, labels=LABELS, label_tokens=LABEL_TOKENS)
    prefix = model.num_image_tokens + 1 + PROMPT_TOKENS
    console = Console()
    console.print(table)
    console.print(
        f"tokens an image  {prefix + LABELS * (LABEL_TOKENS + 1)}: {model.num_image_tokens} of the image, "
        f"1 + {PROMPT_TOKENS} of the prompt, {LABELS} labels of {LABEL_TOKENS} tokens and a delimiter\n"
        f"FLOPs an image   {forward / 1e9:,.2f} G forward, {backward / 1e9:,.2f} G backward",
        highlight=False,
    )
    if vocabulary is not None:
        console.print(
            f"vocabulary       up to {vocabulary} rows (the tokenizer is trained on the labels)", highlight=False
        )
