"""What next-token prediction is compared with, and itself: two linear heads and a small contrastive model.

    python experiments/baselines/train.py softmax --classes NAMES experiment=laptop name=baselines/laptop seed=1,2,3
    nxtp report runs/baselines/laptop

After the method come the overrides of `nxtp train`, of several values each as in `nxtp train -m`: encoder, images and
their order, steps, optimizer, schedule, learning rate and clipping are those of a run with the same overrides. All
score the same names, a line each in NAMES.

    ours          nxtp's model, layout and loss; a name's score is its probability (nxtp/sampling/closed_vocabulary.py)
    sigmoid       mean image token → linear layer; binary cross-entropy of every name
    softmax       mean image token → linear layer; cross-entropy, shared equally by an image's labels
    contrastive   open_clip's text transformer (2 blocks of width 192) and loss, both at random; an image's text is
                  "a photo of " and its labels, a name's score the cosine with "a photo of NAME"
"""

from __future__ import annotations

import math
import time
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

from nxtp.config import composed
from nxtp.data.dataset import Batch
from nxtp.errors import UserError
from nxtp.eval.metrics import ExactMatch
from nxtp.model.encoder import Encoder
from nxtp.runs.record import PREDICTIONS_FILE, RunRecord, read_record
from nxtp.sampling.closed_vocabulary import Vocabulary, class_log_probs
from nxtp.sweep.sweep import Sweep, parse, run_name
from nxtp.train.callbacks.predictions import WritePredictions
from nxtp.train.command import build, filter_lightning_messages
from nxtp.train.module import RecognitionModule
from nxtp.train.optim import create_optimizer, create_schedule, parameter_groups, with_encoder_lr

METHODS = ("ours", "sigmoid", "softmax", "contrastive")
WIDTH, BLOCKS, CONTEXT = 192, 2, 32  # of the text tower: as wide and deep as the decoder of model=small
SECTIONS = ("model", "data", "objective", "optim", "trainer", "validation")


class NextToken(nn.Module):
    """nxtp's own model."""

    def __init__(self, module: RecognitionModule, names: list[str]):
        super().__init__()
        module.configure_model()
        self.model, self.prompt = module.model, module.tokenizer.prompt_ids
        self.encoder = self.model.encoder
        self.vocabulary = Vocabulary(names, module.tokenizer)

    def scores(self, images: Tensor) -> Tensor:
        return class_log_probs(self.model, images, self.vocabulary, prompt=self.prompt)

    def loss(self, batch: Batch) -> Tensor:
        return self.model(batch.images, batch.layout).mean


class Linear(nn.Module):
    """The mean image token → a score per name."""

    def __init__(self, encoder: Encoder, names: list[str], softmax: bool):
        super().__init__()
        self.encoder, self.head, self.softmax = encoder, nn.Linear(encoder.width, len(names)), softmax
        self.numbers = {name: number for number, name in enumerate(names)}

    def scores(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).mean(dim=1))

    def loss(self, batch: Batch) -> Tensor:
        scores_BC = self.scores(batch.images)
        true_BC = torch.zeros_like(scores_BC)
        for row, names in zip(true_BC, batch.labels, strict=True):
            row[[self.numbers[name] for name in names if name in self.numbers]] = 1
        if not self.softmax:
            return F.binary_cross_entropy_with_logits(scores_BC, true_BC)
        return F.cross_entropy(scores_BC, true_BC / true_BC.sum(dim=1, keepdim=True).clamp(min=1))


class Contrastive(nn.Module):
    """The mean image token beside a text tower."""

    def __init__(self, encoder: Encoder, names: list[str]):
        super().__init__()
        self.encoder, self.image = encoder, nn.Linear(encoder.width, WIDTH, bias=False)
        self.text = TextTransformer(CONTEXT, width=WIDTH, heads=WIDTH // 32, layers=BLOCKS, output_dim=WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # as open_clip starts
        self.names, self.tokens, self.pairs = names, SimpleTokenizer(context_length=CONTEXT), ClipLoss()

    def images(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(self.encoder(images).mean(dim=1)), dim=-1)

    def texts(self, labels: list[list[str]]) -> Tensor:
        tokens = self.tokens([f"a photo of {', '.join(names)}" for names in labels])
        return F.normalize(self.text(tokens.to(self.log_scale.device)), dim=-1)

    def scores(self, images: Tensor) -> Tensor:
        return self.images(images) @ self.texts([[name] for name in self.names]).T

    def loss(self, batch: Batch) -> Tensor:
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        return self.pairs(self.images(batch.images), self.texts(batch.labels), scale)


class Baseline(L.LightningModule):
    """A method, trained as nxtp's own module trains a model, and validated on the same names as the others."""

    def __init__(self, module: RecognitionModule, method: str, names: list[str]):
        super().__init__()
        self.optim, self.names, self.val_names = module.optim_config, names, module.val_names
        if method == "ours":
            self.method: nn.Module = NextToken(module, names)
        else:
            trained = self.optim.trainable.encoder
            if trained not in ("all", "none"):
                raise UserError(f"optim.trainable.encoder is '{trained}': baselines train all or none of it.")
            encoder = Encoder(module.model_config.encoder).requires_grad_(trained == "all").train()
            contrastive = method == "contrastive"
            self.method = Contrastive(encoder, names) if contrastive else Linear(encoder, names, method == "softmax")
        self.top_k = min(module.validation.top_k, len(names))
        self.metrics = nn.ModuleList(ExactMatch(top_k=self.top_k) for _ in self.val_names)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.method.loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict:
        best = self.method.scores(batch.images).topk(self.top_k)
        ranked = [[self.names[number] for number in row] for row in best.indices.tolist()]
        self.metrics[dataloader_idx].update(ranked, batch.labels)
        rows = zip(ranked, best.values.tolist(), strict=True)
        return {"predictions": [list(zip(said, scores, strict=True)) for said, scores in rows]}

    def on_validation_epoch_end(self) -> None:
        for name, metric in zip(self.val_names, self.metrics, strict=True):
            self.log_dict({f"{name}/{key}": value for key, value in metric.compute().items()})
            metric.reset()

    def configure_optimizers(self) -> dict:
        groups = with_encoder_lr(parameter_groups(self, self.optim.weight_decay), self.method.encoder, self.optim)
        optimizer = create_optimizer(groups, self.optim)
        schedule = create_schedule(optimizer, self.optim, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@click.command()
@click.argument("method", type=click.Choice(METHODS))
@click.option("--classes", type=click.File(), required=True, help="The names that are scored, a line each.")
@click.argument("overrides", nargs=-1)
def main(method, classes, overrides):
    """Train METHOD as `nxtp train -m OVERRIDES` would train a model: runs/<name>/<what differs>/run.json.

    Runs that have finished are skipped, and those of other settings refused.
    """
    filter_lightning_messages()
    names = [line.strip() for line in classes if line.strip()]
    fixed = [override for override in overrides if not parse([override])[0].is_sweep_override()]
    try:
        sweep = Sweep.of_command("train", ["--multirun", *overrides])
        for point in sweep.points:
            cfg, out = composed("train", [*fixed, *point]), sweep.directory / run_name([f"method={method}", *point])
            config = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in SECTIONS}
            config |= {"method": method, "rates": "one" if cfg.optim.encoder_lr is None else "two"}
            earlier = read_record(out)
            if earlier is None:
                train(cfg, config, names, out)
            elif (earlier["config"], earlier["seed"]) != (config, cfg.seed):
                raise UserError(f"{out} is a run of other settings: choose another name.")
    except UserError as error:
        raise click.ClickException(str(error)) from error


def train(cfg: DictConfig, config: dict, names: list[str], out: Path) -> Baseline:
    """Train and validate, and write run.json, with ``config``, and predictions.jsonl to ``out``."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data, own = build(cfg, out)
    module = Baseline(own, config["method"], names)
    record = RunRecord(out.name, config, [], cfg.seed, sweep=cfg.name)
    record.parameters = {"model": sum(p.numel() for p in module.parameters())}
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, limit_val_batches=0)
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    record.step = record.steps = trainer.global_step
    record.samples_seen, record.status = trainer.global_step * data.config.batch_size, "finished"
    out.mkdir(parents=True, exist_ok=True)
    trainer = instantiate(cfg.trainer, logger=False, callbacks=[WritePredictions(out / PREDICTIONS_FILE)])
    trainer.validate(module, data, verbose=False)
    record.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    record.metrics["train/images_per_s"] = record.samples_seen / seconds
    record.write(out)
    shown = {name: round(value, 3) for name, value in record.metrics.items()}
    click.echo(f"{out}: {record.step} steps in {record.wall_time_s:.0f} s, {shown}")
    return module


if __name__ == "__main__":
    main()
