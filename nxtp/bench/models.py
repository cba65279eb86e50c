"""What is measured, in a process of its own: a seeded model that trains or predicts, our way or the published way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from omegaconf import DictConfig

from nxtp.config import composed, instantiated, to_dataclass
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.labels.from_samples import label_counts
from nxtp.data.mixture import open_set
from nxtp.data.transforms import ImageTransform
from nxtp.distributed.parallelize import ParallelConfig, parallelize
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.flops import ModelFlops
from nxtp.model.layout import PUBLISHED, PUBLISHED_LENGTH, Layout, Objective, lay_out
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import train_tokenizer
from nxtp.model.trainable import choose_trainable
from nxtp.paper.reference import published_loss, published_one_shot
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.one_shot import one_shot
from nxtp.train.callbacks.throughput import Throughput
from nxtp.train.command import filter_lightning_messages
from nxtp.train.module import RecognitionModule
from nxtp.train.optim import OptimConfig

COMPARED_IMAGES = 8  # at most, of a training step
DELIMITER, PROMPT_TOKENS = 4, 7  # BOS and the six tokens of the evaluation prompt in LLaMA's vocabulary
STEPS = {"cpu": 1, "cuda": 10}  # of training, per measurement
MEASURED_S = 1.0  # a short prediction is repeated within this time


@dataclass(frozen=True)
class Size:
    """A model with random weights, the length to which the published way pads, and the overrides of its recipe."""

    config: ModelConfig
    pad_to: int = PUBLISHED_LENGTH
    overrides: tuple[str, ...] = ()

    @cached_property
    def recipe(self) -> DictConfig:
        return composed("train", ["name=bench", *self.overrides])

    @property
    def optim(self) -> OptimConfig:
        return to_dataclass(OptimConfig, self.recipe.optim, "optim")


def full() -> Size:
    """The proportions of the published model (ViT-L/14, six blocks of LLaMA-2 and its vocabulary, a prefix of
    257 + 1 + 7 positions) at about 100 M parameters; the encoder has about a seventh of them, as there.
    """
    return Size(_config(224, {"layers": 8, "width": 384, "head_width": 64, "patch_size": 14}, 768, 12, 6, 2048, 32000))


def tiny() -> Size:
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    return Size(_config(32, vision, 32, 4, 2, 64, 512), pad_to=160, overrides=("data.num_workers=0",))


def _config(
    image_size: int, vision: dict[str, int], width: int, heads: int, layers: int, intermediate: int, vocab: int
) -> ModelConfig:
    decoder = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
    }
    encoder = EncoderConfig(vision=vision, quick_gelu=True, image_size=image_size)
    return ModelConfig(encoder=encoder, decoder=DecoderConfig(config=decoder))


def g3m() -> Size:
    """The published recipe, ``experiment=g3m``: 1.78 B parameters, of which the published parts train."""
    overrides = ("experiment=g3m",)
    config = to_dataclass(ModelConfig, composed("train", overrides).model, "model")
    config.encoder.pretrained = config.decoder.source = None
    return Size(config, overrides=overrides)


SIZES: dict[str, Callable[[], Size]] = {"full": full, "tiny": tiny, "g3m": g3m}


def random_images(image_size: int, batch: int, seed: int) -> torch.Tensor:
    """uint8 [batch, 3, image_size, image_size]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, image_size, image_size), dtype=torch.uint8, generator=generator)


class Worker:
    """A seeded model, built in float32. The two ways are compared in float32, then measured in ``precision``.

    Args:
        way: ours or published.
        size: a key of :data:`SIZES`.
        device: cpu or cuda.
        precision: 32-true, bf16-mixed (float32 weights, autocast) or bf16-true.
    """

    def __init__(
        self,
        way: str,
        *,
        size: str,
        batch_size: int,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "32-true",
    ):
        self.is_published = way == "published"
        self.device, self.precision = torch.device(device), precision
        torch.manual_seed(seed)
        self.size = SIZES[size]()
        with self.device:
            self.model = Model(self.size.config)
        self.vocab = self.model.decoder.vocab_size
        self.images = random_images(self.size.config.encoder.image_size, batch_size, seed).to(self.device)
        self.prompt = np.random.default_rng(seed).integers(5, self.vocab, PROMPT_TOKENS).tolist()
        self.autocasts = False

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def use_precision(self) -> None:
        """Compute in ``precision`` from here on."""
        self.autocasts = self.precision == "bf16-mixed"
        if self.precision == "bf16-true":
            self.model.to(torch.bfloat16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts)

    def clock(self) -> float:
        """Seconds, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Trainer(Worker):
    """Training steps on ``shards``: ours as `nxtp train` makes them, the published way on the first batch alone.

    Ours is Lightning's loop with the recipe's trainer, optimizer and loader, of which only the number of devices and
    steps differs. The published way is a bare loop, without a loader and without copies to the device.
    """

    def __init__(self, way: str, *, shards: str, batch_size: int, seed: int = 0, **options: Any):
        super().__init__(way, batch_size=batch_size, seed=seed, **options)
        filter_lightning_messages()
        choose_trainable(self.model, self.size.optim.trainable)
        workers, index = self.size.recipe.data.num_workers, f"{shards}.{way}"
        self.config = DataConfig(train=shards, batch_size=batch_size, num_workers=workers, index_dir=index, seed=seed)
        self.shards = open_set("train", shards, self.config)
        self.tokenizer = train_tokenizer(label_counts(self.shards.shards, self.config), vocab_size=self.vocab)
        self.prompt, self.delimiter = self.tokenizer.prompt_ids, self.tokenizer.delimiter_id
        batch = next(iter(self.data(PUBLISHED).loader("train", shards, training=True)))
        self.images = batch.images.to(self.device)
        self.labels = [self.tokenizer.encode_labels(labels) for labels in batch.labels]
        self.optimizer: torch.optim.Optimizer | None = None

    def data(self, objective: Objective) -> WebDatasetDataModule:
        return WebDatasetDataModule(
            self.config,
            self.tokenizer,
            transform=ImageTransform.of(self.model.encoder.config),
            num_image_tokens=self.model.num_image_tokens,
            objective=objective,
            sets={"train": self.shards},
        )

    def layout(self, images: int | None = None) -> Layout:
        return lay_out(
            self.labels[:images],
            prompt=self.prompt,
            delimiter=self.delimiter,
            num_image_tokens=self.model.num_image_tokens,
            objective=PUBLISHED,
        )

    def loss(self, images: int | None = None) -> torch.Tensor:
        """Of the first ``images``, by default of all."""
        pixels, labels = self.images[:images], self.labels[:images]
        with self.autocast():
            if self.is_published:
                options = {"prompt": self.prompt, "delimiter": self.delimiter, "pad_to": self.size.pad_to}
                return published_loss(self.model, pixels, labels, **options)
            return self.model(pixels, self.layout(images).to(self.device)).mean

    def result(self) -> dict[str, np.ndarray]:
        """Loss and the gradients of parameters from the first to the last layer, at the initial weights, in float32."""
        loss = self.loss(COMPARED_IMAGES)
        loss.backward()
        blocks, tower = self.model.decoder.blocks, self.model.encoder.visual.transformer.resblocks
        parameters = {
            "first encoder block": tower[0].mlp.c_fc.weight,
            "last encoder block": tower[-1].attn.in_proj_weight,
            "projection": self.model.projection.weight,
            "image token": self.model.image_token,
            "first decoder block": blocks[0].self_attn.q_proj.weight,
            "last decoder block": blocks[-1].mlp.down_proj.weight,
            "final norm": self.model.decoder.lm.model.norm.weight,
        }
        gradients = {f"gradient of {n}": p.grad.cpu().numpy() for n, p in parameters.items() if p.requires_grad}
        self.model.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the process of the other way
        return {"loss": loss.detach().cpu().numpy()} | gradients

    def measure(self, objective: Objective, profile: str | None = None, compiled: bool = False) -> dict[str, float]:
        """Images per second, model TFLOP/s of real tokens and, of ours, the share of the time that waits for data.

        Args:
            compiled: of ours, with ``parallel.compile``.
            profile: a directory for the table and the trace of PyTorch's profiler, which slows our steps down.
        """
        steps = STEPS[self.device.type]
        if self.is_published:
            return self._measure_published(steps)
        module = RecognitionModule(self.size.config, self.tokenizer, self.size.optim)
        module.model = parallelize(self.model, ParallelConfig(compile=compiled))
        profiler = profile and PyTorchProfiler(profile, "train", export_to_chrome=True)
        trainer = instantiated(
            self.size.recipe.trainer,
            "trainer",
            accelerator=self.device.type,
            devices=1,
            num_nodes=1,
            strategy="auto",
            precision=self.precision,
            accumulate_grad_batches=1,
            max_steps=2 * steps,  # the first half allocates the optimizer's state, and does not count
            max_epochs=-1,
            log_every_n_steps=steps,
            callbacks=[Throughput(ModelFlops(self.model))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            profiler=profiler or None,
        )
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            trainer.fit(module, datamodule=self.data(objective))
        return {
            name: float(trainer.callback_metrics[f"perf/{name}"]) for name in ("images_per_s", "tflops", "data_wait")
        }

    def _measure_published(self, steps: int) -> dict[str, float]:
        if self.optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)
            self._measure_published(1)  # allocates its state
        start = self.clock()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        seconds = (self.clock() - start) / steps
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        flops = ModelFlops(self.model).of(self.layout()).total
        return {"images_per_s": len(self.images) / seconds, "tflops": flops / seconds / 1e12}


class Predictor(Worker):
    """One-shot prediction, one way."""

    def __init__(self, way: str, **options: Any):
        super().__init__(way, **options)
        self.model.eval()
        self.sample: Callable[..., Samples] = published_one_shot if self.is_published else one_shot

    def measure(self, top_k: int, tokens: int, images: int = 1) -> tuple[float, dict[str, np.ndarray]]:
        """Seconds from uint8 images to sampled labels (the median of up to five runs in a second), and the labels."""
        seconds: list[float] = []
        while not seconds or (len(seconds) < 5 and sum(seconds) < MEASURED_S):
            start = self.clock()
            samples = self.run(top_k, tokens, images)
            seconds.append(self.clock() - start)
        arrays = {"tokens": samples.tokens_BKL, "probabilities": samples.probs_BKL}
        return median(seconds), {name: array.cpu().numpy() for name, array in arrays.items()}

    def run(self, top_k: int, tokens: int, images: int) -> Samples:
        with self.autocast():
            return self.sample(
                self.model,
                self.images[:images],
                prompt=self.prompt,
                delimiter=DELIMITER,
                top_k=top_k,
                max_tokens=tokens,
                never_first=[DELIMITER],
            )
