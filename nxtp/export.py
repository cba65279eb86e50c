"""`nxtp export`: a checkpoint, of one process or of many ranks → a model directory, one tensor at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), required=True, help="The model directory.")
@click.option("--overwrite", is_flag=True, help="Replace what stands there.")
def export(checkpoint: Path, to: Path, overwrite: bool) -> None:
    """Make a model directory of CHECKPOINT (a file, or a directory of shards) on one process.

    \b
    nxtp export runs/demo/checkpoints/last.ckpt --to models/demo
    """
    from rich.console import Console
    from rich.progress import track

    from nxtp.errors import UserError

    if to.exists() and not overwrite:
        raise UserError(f"'{to}' exists: choose another name, or say --overwrite.")
    console = Console(stderr=True)
    count = export_checkpoint(
        checkpoint, to, track=lambda names: track(names, description="Writing", console=console, transient=True)
    )
    console.print(f"{to}: {count} tensors", highlight=False, soft_wrap=True)


def export_checkpoint(checkpoint: Path, to: Path, track: Any = iter) -> int:
    """Write the model directory ``to``; the number of tensors. Holds one tensor in memory.

    Raises:
        UserError: no checkpoint of this project, or a damaged one.
    """
    from nxtp.checkpoint import CheckpointWeights
    from nxtp.config import to_dataclass
    from nxtp.errors import UserError
    from nxtp.model import ModelConfig
    from nxtp.model_dir import HEAD, write_model_dir
    from nxtp.tokens import FILES, LabelTokenizer
    from nxtp.weights import write_safetensors

    weights = CheckpointWeights(checkpoint)
    kept = weights.rest.get("recognizer")
    if not kept:
        raise UserError(f"'{checkpoint}' does not say which model it is of: it was not written by nxtp train.")
    config = to_dataclass(ModelConfig, kept["config"], f"{checkpoint}: model")
    prefix = "model."
    left_out = {prefix + HEAD} if (config.decoder.config or {}).get("tie_word_embeddings") else set()
    specs = {
        name.removeprefix(prefix): spec
        for name, spec in weights.specs.items()
        if name.startswith(prefix) and name not in left_out
    }
    with tempfile.TemporaryDirectory() as directory:
        for name in FILES:
            Path(directory, name).write_text(kept["tokenizer"][name])
        tokenizer = LabelTokenizer.load(directory, config.prompt)
    write_model_dir(
        to,
        lambda path: write_safetensors(path, specs, lambda name: weights.read(prefix + name), track),
        tokenizer,
        config,
        kept["provenance"],
    )
    return len(specs)
