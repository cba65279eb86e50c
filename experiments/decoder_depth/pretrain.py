"""Train a small LLaMA-family language model on captions, for the laptop study of depth to truncate.

    python experiments/decoder_depth/pretrain.py data/shards/studies/train --out runs/captions_lm

Writes a Hugging Face model directory with its tokenizer: model.decoder.source=runs/captions_lm.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import track
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM

from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.urls import expand_shards
from nxtp.errors import UserError
from nxtp.model.tokenizer import LabelTokenizer, train_tokenizer

ROW = 128  # tokens


def token_stream(captions: list[str], tokenizer: LabelTokenizer) -> torch.Tensor:
    """int64 [rows, ROW]: captions one after another, a delimiter after each, without the last partial row."""
    texts = tokenizer.tokenizer(captions, add_special_tokens=False)["input_ids"]
    ids = [token for text in texts for token in (*text, tokenizer.delimiter_id)]
    return torch.tensor(ids[: len(ids) // ROW * ROW]).reshape(-1, ROW)


def pretrain(rows_RT: torch.Tensor, config: LlamaConfig, *, steps: int, batch_size: int, lr: float, seed: int):
    """The model trained on int64 [rows, ROW], and its loss (nats per token) over the last tenth of the steps."""
    torch.manual_seed(seed)
    lm = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    losses = []
    for _ in track(range(steps), description="captions"):
        chosen_BT = rows_RT[torch.randint(len(rows_RT), (batch_size,))]
        loss = lm(chosen_BT, labels=chosen_BT).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return lm, float(np.mean(losses[-max(1, steps // 10) :]))


@click.command(context_settings={"show_default": True})
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write the model to.")
@click.option("--blocks", type=click.IntRange(1), default=8)
@click.option("--width", type=click.IntRange(32), default=192, help="A multiple of 32.")
@click.option("--captions", type=click.IntRange(1), default=20_000, help="At most this many, the first ones.")
@click.option("--steps", type=click.IntRange(50), default=300)
@click.option("--batch-size", type=click.IntRange(1), default=16, help=f"Rows of {ROW} tokens.")
@click.option("--lr", default=1e-3)
@click.option("--seed", default=0)
def main(shards, out, blocks, width, captions, steps, batch_size, lr, seed):
    """Train a language model on the captions of SHARDS (3 minutes on two cores)."""
    try:
        texts = read_captions(shards, captions)
        tokenizer = train_tokenizer(texts, vocab_size=1024)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.tokenizer.eos_token_id,
    )
    lm, loss = pretrain(token_stream(texts, tokenizer), config, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    lm.save_pretrained(out)
    tokenizer.save(out)
    click.echo(f"{out}: {blocks} blocks of width {width}, loss {loss:.3f} nats per token")


def read_captions(source: Path, limit: int) -> list[str]:
    shards = IndexedShards(expand_shards(str(source)))
    raws = (shards.read(position) for position in range(min(limit, len(shards))))
    texts = [raw.caption for raw in raws if raw.caption]
    if not texts:
        raise UserError(f"No captions in '{source}'.")
    return texts


if __name__ == "__main__":
    main()
