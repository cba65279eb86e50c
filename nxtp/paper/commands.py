"""`nxtp convert` (published checkpoints in and out) and `nxtp parity` (our results against recorded ones)."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nxtp.errors import UserError


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--llama", type=click.Path(path_type=Path), help="LLaMA: a Hugging Face directory or Meta's .pth file.")
@click.option("--clip", help="CLIP ViT-L/14: a weight file, or an open_clip tag such as openai.")
@click.option("--tokenizer", help="LLaMA's tokenizer: a directory or tokenizer.model; default: --llama's directory.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The model directory to write.")
@click.option("--to-release", type=click.Path(path_type=Path, dir_okay=False), help="The checkpoint to write.")
@click.option("--all", "everything", is_flag=True, help="With --to-release: frozen parameters too.")
@click.option("--overwrite", is_flag=True, help="Replace what exists at the target.")
def convert(source, llama, clip, tokenizer, out, to_release, everything, overwrite):
    """Convert published checkpoints, both ways.

    \b
    In:   nxtp convert CKPT.pth --llama Llama-2-7b-hf --clip openai --out DIR
    Out:  nxtp convert DIR --to-release CKPT.pth
    """
    target = out or to_release
    if (out is None) == (to_release is None):
        raise click.UsageError("Give --out DIR (to read a released checkpoint) or --to-release FILE (to write one).")
    if target.exists() and not overwrite:
        raise UserError(f"'{target}' exists: choose another name or add --overwrite.")

    from rich.console import Console
    from rich.progress import track

    from nxtp.paper.release import export_release, import_release

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if out is None:
        count = export_release(source, target, everything)
        console.print(f"{target}: {count} tensors in the published naming")
        return
    if llama is None or clip is None:
        absent = [option for option, value in (("--llama", llama), ("--clip", clip)) if value is None]
        raise click.UsageError(f"A released checkpoint has trained parameters only: give {' and '.join(absent)} too.")
    done = import_release(
        source,
        llama=llama,
        clip=clip,
        tokenizer=tokenizer or (llama if llama.is_dir() else llama.parent),
        to=out,
        track=lambda names: track(names, description="Writing", console=console, transient=True),
    )
    console.print(
        f"{out}: {done.from_release} tensors from the release, {done.from_clip} from CLIP, {done.from_llama} from "
        f"LLaMA, {done.bytes / 1e9:.2f} GB"
    )


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def parity(directory: Path) -> None:
    """Compare our results with the published implementation's, recorded in DIRECTORY; exit code 1 on a miss."""
    from nxtp.paper.parity import report, run_parity

    sys.exit(report(run_parity(directory)))
