"""`nxtp convert`: a released checkpoint → a model directory, and a model directory → a released checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

_DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--llama", type=click.Path(path_type=Path), help="LLaMA: a Hugging Face directory or Meta's .pth file.")
@click.option("--clip", help="CLIP ViT-L/14: a weight file, or an open_clip tag such as openai.")
@click.option("--tokenizer", help="LLaMA's tokenizer: a directory or tokenizer.model; --llama's directory by default.")
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), help="The model directory to be written.")
@click.option("--to-release", type=click.Path(path_type=Path, dir_okay=False), help="The checkpoint to be written.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="Store all weights in it; by default each keeps its own.")
@click.option("--all", "everything", is_flag=True, help="With --to-release: frozen parameters too.")
@click.option("--overwrite", is_flag=True, help="Replace what stands at the target.")
def convert(source, llama, clip, tokenizer, to, to_release, dtype, everything, overwrite):
    """Published checkpoints in and out.

    \b
    In:   nxtp convert CKPT.pth --llama Llama-2-7b-hf --clip openai --to DIR
    Out:  nxtp convert DIR --to-release CKPT.pth
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from nxtp.errors import UserError
    from nxtp.paper.release import export_release, import_release

    if (to is None) == (to_release is None):
        raise click.UsageError("Say --to DIR (a released checkpoint comes in) or --to-release FILE (a model goes out).")
    target = to or to_release
    if target.exists() and not overwrite:
        raise UserError(f"'{target}' exists: choose another name, or say --overwrite.")
    console = Console(stderr=True)
    if to_release is not None:
        count = export_release(source, to_release, everything)
        console.print(f"{to_release}: {count} tensors in the published naming", highlight=False, soft_wrap=True)
        return
    absent = [option for option, value in (("--llama", llama), ("--clip", clip)) if value is None]
    if absent:
        raise click.UsageError(f"A released checkpoint holds trained parameters only; give {' and '.join(absent)} too.")
    done = import_release(
        source,
        llama=llama,
        clip=clip,
        tokenizer=tokenizer or (llama if llama.is_dir() else llama.parent),
        to=to,
        dtype=getattr(torch, dtype) if dtype else None,
        track=lambda names: track(names, description="Writing", console=console, transient=True),
    )
    console.print(
        f"{to}: {done.from_release} tensors from the release, {done.from_clip} from CLIP, {done.from_llama} from "
        f"LLaMA, {done.bytes / 1e9:.2f} GB",
        highlight=False,
        soft_wrap=True,
    )
