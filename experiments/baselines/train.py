"""What next-token prediction is compared with: two linear heads and a small contrastive model.

    python experiments/baselines/train.py softmax --classes NAMES experiment=laptop name=baselines/softmax,seed=0 seed=0
    nxtp report runs/baselines

After the method come the overrides of `nxtp train`: encoder, images and their order, steps, optimizer, schedule,
learning rate and clipping are those of a run with the same overrides. All score the same names, a line each in NAMES.

    sigmoid       mean image token → linear layer; binary cross-entropy of every name
    softmax       mean image token → linear layer; cross-entropy, shared equally by an image's labels
    contrastive   open_clip's text transformer (2 blocks of width 192) and loss, both at random; an image's text is
                  "a photo of " and its labels, a name's score the cosine with "a photo of NAME"
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from open_clip import ClipLoss, SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from nxtp.config import composed, to_dataclass
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.dataset import Batch
from nxtp.data.transforms import ImageTransform
from nxtp.errors import UserError
from nxtp.eval.metrics import ExactMatch
from nxtp.model.encoder import Encoder
from nxtp.model.model import ModelConfig
from nxtp.model.tokenizer import train_tokenizer
from nxtp.runs.record import RunRecord
from nxtp.train.optim import OptimConfig, create_optimizer, create_schedule, parameter_groups

METHODS = ("sigmoid", "softmax", "contrastive")
WIDTH, BLOCKS, CONTEXT = 192, 2, 32  # of the text tower: as wide and deep as the decoder of model=small
SECTIONS = ("model", "data", "optim", "trainer", "validation")


class Linear(nn.Module):
    """The mean image token → a score per name."""

    def __init__(self, width: int, names: list[str], softmax: bool):
        super().__init__()
        self.head, self.softmax = nn.Linear(width, len(names)), softmax
        self.numbers = {name: number for number, name in enumerate(names)}

    def scores(self, means_BD: Tensor) -> Tensor:
        return self.head(means_BD)

    def loss(self, means_BD: Tensor, labels: list[list[str]]) -> Tensor:
        true_BC = torch.zeros(len(labels), len(self.numbers), device=means_BD.device)
        for row, names in zip(true_BC, labels, strict=True):
            row[[self.numbers[name] for name in names if name in self.numbers]] = 1
        if not self.softmax:
            return F.binary_cross_entropy_with_logits(self.head(means_BD), true_BC)
        return F.cross_entropy(self.head(means_BD), true_BC / true_BC.sum(dim=1, keepdim=True).clamp(min=1))


class Contrastive(nn.Module):
    """The mean image token beside a text tower."""

    def __init__(self, width: int, names: list[str]):
        super().__init__()
        self.image = nn.Linear(width, WIDTH, bias=False)
        self.text = TextTransformer(CONTEXT, width=WIDTH, heads=WIDTH // 32, layers=BLOCKS, output_dim=WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # as open_clip starts
        self.names, self.tokens, self.pairs = names, SimpleTokenizer(context_length=CONTEXT), ClipLoss()

    def texts(self, labels: list[list[str]], device: torch.device) -> Tensor:
        tokens = self.tokens([f"a photo of {', '.join(names)}" for names in labels])
        return F.normalize(self.text(tokens.to(device)), dim=-1)

    def scores(self, means_BD: Tensor) -> Tensor:
        texts_CD = self.texts([[name] for name in self.names], means_BD.device)
        return F.normalize(self.image(means_BD), dim=-1) @ texts_CD.T

    def loss(self, means_BD: Tensor, labels: list[list[str]]) -> Tensor:
        images_BD, texts_BD = F.normalize(self.image(means_BD), dim=-1), self.texts(labels, means_BD.device)
        return self.pairs(images_BD, texts_BD, self.log_scale.clamp(max=math.log(100)).exp())


class Baseline(L.LightningModule):
    """An encoder with a method's head, trained and validated as nxtp's own module trains and validates a model."""

    def __init__(self, cfg: DictConfig, method: str, names: list[str]):
        super().__init__()
        self.optim = to_dataclass(OptimConfig, cfg.optim, "optim")
        trained = self.optim.trainable.encoder
        if trained not in ("all", "none"):
            raise UserError(f"optim.trainable.encoder is '{trained}': baselines train all or none of it.")
        self.encoder = Encoder(to_dataclass(ModelConfig, cfg.model, "model").encoder)
        self.encoder.requires_grad_(trained == "all")
        width = self.encoder.width
        self.head = Contrastive(width, names) if method == "contrastive" else Linear(width, names, method == "softmax")
        self.names, self.top_k = names, min(int(cfg.validation.top_k), len(names))
        self.metrics = nn.ModuleList(ExactMatch(top_k=self.top_k) for _ in cfg.data.val)
        self.val_names = list(cfg.data.val)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.head.loss(self.encoder(batch.images).mean(dim=1), batch.labels)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        best = self.head.scores(self.encoder(batch.images).mean(dim=1)).topk(self.top_k).indices.tolist()
        self.metrics[dataloader_idx].update([[self.names[number] for number in row] for row in best], batch.labels)

    def on_validation_epoch_end(self) -> None:
        for name, metric in zip(self.val_names, self.metrics, strict=True):
            self.log_dict({f"{name}/{key}": value for key, value in metric.compute().items()})
            metric.reset()

    def configure_optimizers(self) -> dict:
        optimizer = create_optimizer(parameter_groups(self, self.optim.weight_decay), self.optim)
        schedule = create_schedule(optimizer, self.optim, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@click.command()
@click.argument("method", type=click.Choice(METHODS))
@click.option("--classes", type=click.File(), required=True, help="The names that are scored, a line each.")
@click.argument("overrides", nargs=-1)
def main(method, classes, overrides):
    """Train METHOD as `nxtp train OVERRIDES` would train a model, and write runs/<name>/run.json."""
    names = [line.strip() for line in classes if line.strip()]
    try:
        train(composed("train", overrides), method, names, list(overrides))
    except UserError as error:
        raise click.ClickException(str(error)) from error


def train(cfg: DictConfig, method: str, names: list[str], overrides: list[str]) -> RunRecord:
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    module = Baseline(cfg, method, names)
    data = WebDatasetDataModule(
        to_dataclass(DataConfig, cfg.data, "data"),
        train_tokenizer(names, vocab_size=2048),
        transform=ImageTransform.of(module.encoder.config),
        num_image_tokens=module.encoder.num_tokens,
    )
    config = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in SECTIONS}
    record = RunRecord(cfg.name, config | {"method": method}, overrides, cfg.seed)
    parts = {"encoder": module.encoder, "head": module.head}
    record.parameters = {part: sum(p.numel() for p in each.parameters()) for part, each in parts.items()}
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, val_check_interval=None)
    trainer.fit(module, data)
    trainer.validate(module, data)
    record.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    record.step = record.steps = trainer.global_step
    record.samples_seen, record.status = trainer.global_step * data.config.batch_size, "finished"
    out = Path("runs", cfg.name)
    out.mkdir(parents=True, exist_ok=True)
    record.write(out)
    shown = {name: round(value, 3) for name, value in record.metrics.items()}
    click.echo(f"{out}: {trainer.global_step} steps in {record.wall_time_s:.0f} s, {shown}")
    return record


if __name__ == "__main__":
    main()
