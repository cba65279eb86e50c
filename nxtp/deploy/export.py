"""`nxtp export`: a training checkpoint → a model directory; a model directory → ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from nxtp.errors import UserError, counted


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="The directory to write.")
@click.option(
    "--format", "kind", type=click.Choice(["model", "onnx"]), default="model", show_default=True,
    help="model: a model directory from a checkpoint; onnx: ONNX graphs from a model directory.",
)  # fmt: skip
@click.option("--int8", is_flag=True, help="With --format onnx: 8-bit weights.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
def export(source: Path, out: Path, kind: str, int8: bool, overwrite: bool) -> None:
    """Export SOURCE: a checkpoint (a file, or a directory of shards), or with --format onnx a model directory.

    \b
    nxtp export runs/demo/checkpoints/last.ckpt --out models/demo
    nxtp export models/demo --format onnx --out models/demo-onnx
    python -m nxtp.deploy.onnx models/demo-onnx photo.jpg
    """
    from rich.console import Console
    from rich.progress import track

    from nxtp.inference.model_directory import of_a_run

    console = Console(stderr=True)
    if int8 and kind != "onnx":
        raise UserError("--int8 needs --format onnx.")
    if out.exists() and not overwrite:
        raise UserError(f"'{out}' exists: choose another name, or use --overwrite.")
    is_model = (source / "model.safetensors").is_file()
    if kind == "model" and is_model:
        raise UserError(f"'{source}' is a model directory already: use --format onnx to export it.")
    if kind == "onnx" and source.exists() and not is_model:
        advice = of_a_run(source) or " first nxtp export a checkpoint to one with --out DIR."
        raise UserError(f"'{source}' is not a model directory:{advice}")
    if kind == "onnx":
        summary = _export_onnx(source, out, int8)
    else:
        progress = partial(track, description="Writing", console=console, transient=True)
        summary = counted(export_checkpoint(source, out, progress), "tensor")
    console.print(f"{out}: {summary}", highlight=False, markup=False, soft_wrap=True)


def _export_onnx(source: Path, out: Path, int8: bool) -> str:
    from nxtp.deploy.onnx.export import export_onnx, require_onnx
    from nxtp.inference.recognizer import Recognizer

    require_onnx()
    config = export_onnx(Recognizer.from_pretrained(source, device="cpu"), out, int8)
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"ONNX graphs with {config.weights} weights, {size / 1e6:,.1f} MB"


def export_checkpoint(checkpoint: Path, out: Path, track: Callable = iter) -> int:
    """Write the model directory ``out``, one tensor at a time; returns the number of tensors.

    Args:
        track: wraps the list of tensor names, to show progress.

    Raises:
        UserError: not a checkpoint of nxtp, or a damaged one.
    """
    from nxtp.config import to_dataclass
    from nxtp.distributed.checkpoints import StoredCheckpoint
    from nxtp.inference.model_directory import write_model_dir
    from nxtp.inference.pretrained import HEAD
    from nxtp.model.decoder import DecoderConfig
    from nxtp.model.lora import merged
    from nxtp.model.model import ModelConfig
    from nxtp.model.tokenizer import LabelTokenizer
    from nxtp.model.weights import write_safetensors

    stored = StoredCheckpoint(checkpoint)
    saved = stored.rest.get("recognizer")
    if not saved:
        raise UserError(f"'{checkpoint}' does not contain its model's configuration: nxtp train did not write it.")
    config = to_dataclass(ModelConfig, saved["config"], f"{checkpoint}: model")
    prefix = "state_dict/model."
    specs = {name.removeprefix(prefix): spec for name, spec in stored.specs.items() if name.startswith(prefix)}
    lora = to_dataclass(DecoderConfig, {"lora": saved.get("lora")}, f"{checkpoint}: decoder").lora
    specs, read = merged(specs, lambda name: stored.read(prefix + name), lora)
    if (config.decoder.config or {}).get("tie_word_embeddings"):
        specs.pop(HEAD, None)
    tokenizer = LabelTokenizer.of_files(saved["tokenizer"], config.prompt)
    weights = partial(write_safetensors, specs=specs, read=read, track=track)
    write_model_dir(out, weights, tokenizer, config, saved["provenance"])
    return len(specs)
