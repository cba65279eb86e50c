"""`nxtp export`: a checkpoint, of one process or of many ranks → a model directory; a model directory → ONNX graphs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from nxtp.errors import UserError

_A_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", type=_A_DIRECTORY, help="The model directory to make of a checkpoint.")
@click.option("--onnx", type=_A_DIRECTORY, help="The directory of ONNX graphs to make of a model directory.")
@click.option("--int8", is_flag=True, help="With --onnx: weights as 8-bit numbers.")
@click.option("--overwrite", is_flag=True, help="Replace what stands there.")
def export(source: Path, to: Path | None, onnx: Path | None, int8: bool, overwrite: bool) -> None:
    """Make a model directory of a checkpoint SOURCE (a file, or a directory of shards), or ONNX graphs of a model.

    \b
    nxtp export runs/demo/checkpoints/last.ckpt --to models/demo
    nxtp export models/demo --onnx models/demo-onnx
    python -m nxtp.deploy.onnx models/demo-onnx photo.jpg
    """
    from rich.console import Console

    if (to is None) == (onnx is None):
        raise UserError("Say --to DIR for a model directory, or --onnx DIR for ONNX graphs.")
    if int8 and onnx is None:
        raise UserError("--int8 goes with --onnx.")
    target = to or onnx
    if target.exists() and not overwrite:
        raise UserError(f"'{target}' exists: choose another name, or say --overwrite.")
    made = _model_directory(source, target) if to else _graphs(source, target, int8)
    Console(stderr=True).print(f"{target}: {made}", highlight=False, markup=False, soft_wrap=True)


def _model_directory(checkpoint: Path, to: Path) -> str:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    count = export_checkpoint(
        checkpoint, to, track=lambda names: track(names, description="Writing", console=console, transient=True)
    )
    return f"{count} tensors"


def _graphs(source: Path, onnx: Path, int8: bool) -> str:
    from nxtp.deploy.onnx.export import export_onnx, require_onnx
    from nxtp.inference.recognizer import Recognizer

    require_onnx()
    config = export_onnx(Recognizer.from_pretrained(source, device="cpu"), onnx, int8)
    size = sum(path.stat().st_size for path in onnx.iterdir())
    return f"ONNX graphs with {config.weights} weights, {size / 1e6:,.1f} MB"


def export_checkpoint(checkpoint: Path, to: Path, track: Any = iter) -> int:
    """Write the model directory ``to``; the number of tensors. Holds one tensor in memory.

    Raises:
        UserError: no checkpoint of this project, or a damaged one.
    """
    from nxtp.config import to_dataclass
    from nxtp.inference.model_directory import HEAD, write_model_dir
    from nxtp.model.model import ModelConfig
    from nxtp.model.tokenizer import FILES, LabelTokenizer
    from nxtp.model.weights import write_safetensors
    from nxtp.distributed.checkpoints import StoredCheckpoint

    weights = StoredCheckpoint(checkpoint)
    kept = weights.rest.get("recognizer")
    if not kept:
        raise UserError(f"'{checkpoint}' does not say which model it is of: it was not written by nxtp train.")
    config = to_dataclass(ModelConfig, kept["config"], f"{checkpoint}: model")
    prefix = "state_dict/model."
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
