"""The measured models and ways: what runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from nxtp.config import conf_dir, to_dataclass
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.flops import ModelFlops
from nxtp.model.layout import Layout, Objective, lay_out
from nxtp.model.model import Model, ModelConfig
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.paper.reference import PADDED_LENGTH, published_loss, published_one_shot
from nxtp.sampling.one_shot import Samples, one_shot
from nxtp.sweep import study  # noqa: F401  registers study:// with Hydra
from nxtp.train.optim import OptimConfig

COMPARED_IMAGES = 8  # at most, of a training step
DELIMITER, PROMPT_TOKENS = 4, 7  # BOS and the six tokens of the evaluation prompt in LLaMA's vocabulary


@dataclass(frozen=True)
class Size:
    """Dimensions of the measured model.

    ``full`` keeps the proportions of the published model (ViT-L/14 and six blocks of LLaMA-2 with its vocabulary,
    257 + 1 + 7 prefix positions) at about 100 M parameters, the encoder about a seventh of them as there.
    """

    image_size: int
    patch_size: int
    encoder_width: int
    encoder_layers: int
    width: int
    heads: int
    layers: int
    intermediate: int
    vocab: int
    pad_to: int
    trainable: TrainableConfig = field(default_factory=TrainableConfig)  # everything

    def config(self) -> ModelConfig:
        vision = {
            "layers": self.encoder_layers,
            "width": self.encoder_width,
            "head_width": min(64, self.encoder_width // 2),
            "patch_size": self.patch_size,
        }
        decoder = {
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "pad_token_id": None,
        }
        return ModelConfig(
            encoder=EncoderConfig(vision=vision, quick_gelu=True, image_size=self.image_size),
            decoder=DecoderConfig(config=decoder),
        )


@dataclass(frozen=True)
class Published:
    """The published recipe, ``experiment=g3m``, with random weights: 1.78 B parameters, and what trains of them."""

    image_size: int = 224
    vocab: int = 32002
    pad_to: int = PADDED_LENGTH

    def config(self) -> ModelConfig:
        config = to_dataclass(ModelConfig, self._composed().model, "model")
        config.encoder.pretrained = config.decoder.source = None
        return config

    @property
    def trainable(self) -> TrainableConfig:
        return to_dataclass(OptimConfig, self._composed().optim, "optim").trainable

    @staticmethod
    def _composed():
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", ["experiment=g3m"])


SIZES = {
    "full": Size(224, 14, 384, 8, 768, 12, 6, 2048, 32000, PADDED_LENGTH),
    "tiny": Size(32, 8, 32, 2, 32, 4, 2, 64, 400, 80),
    "g3m": Published(),
}


def random_labels(batch: int, vocab: int, seed: int) -> list[list[list[int]]]:
    """6 to 10 labels an image of 1 to 3 tokens each, without the delimiter: what nouns of captions look like."""
    generator = np.random.default_rng(seed)
    return [
        [generator.integers(5, vocab, generator.integers(1, 4)).tolist() for _ in range(generator.integers(6, 11))]
        for _ in range(batch)
    ]


class Worker:
    """A seeded model on a device, built in float32, in which the two ways are compared, and measured in ``precision``.

    Args:
        way: ours or published.
        device: cpu or cuda.
        precision: 32-true, bf16-mixed (float32 weights, autocast) or bf16-true.
    """

    def __init__(
        self,
        way: str,
        size: Size | Published,
        batch: int,
        seed: int,
        device: str = "cpu",
        precision: str = "32-true",
    ):
        self.published_way = way == "published"
        self.device, self.precision = torch.device(device), precision
        torch.manual_seed(seed)
        with self.device:
            self.model = Model(size.config())
        choose_trainable(self.model, size.trainable)
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, 3, size.image_size, size.image_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self.device)
        self.prompt = np.random.default_rng(seed).integers(5, size.vocab, PROMPT_TOKENS).tolist()
        self.narrowed = False

    def narrow(self) -> None:
        """From here on ``precision`` holds."""
        self.narrowed = True
        if self.precision == "bf16-true":
            self.model.to(torch.bfloat16)

    def autocast(self) -> torch.autocast:
        mixed = self.narrowed and self.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Trainer(Worker):
    """Forward, backward and AdamW step of one way on one batch."""

    def __init__(self, way: str, size: Size | Published, batch: int, seed: int, **options: str):
        super().__init__(way, size, batch, seed, **options)
        self.model.train()
        self.labels = random_labels(batch, size.vocab, seed)
        self.pad_to = size.pad_to
        self.optimizer: torch.optim.Optimizer | None = None

    def layout(self, objective: str, images: int | None = None) -> Layout:
        return lay_out(
            self.labels[:images],
            prompt=self.prompt,
            delimiter=DELIMITER,
            num_image_tokens=self.model.num_image_tokens,
            objective=objective,
        )

    def loss(self, objective: str, images: int | None = None) -> torch.Tensor:
        """Of the first ``images``, all by default."""
        pixels = self.images[:images]
        with self.autocast():
            if self.published_way:
                labels = self.labels[:images]
                return published_loss(
                    self.model, pixels, labels, prompt=self.prompt, delimiter=DELIMITER, pad_to=self.pad_to
                )
            return self.model(pixels, self.layout(objective, images).to(self.device)).mean

    def flops(self, objective: str) -> float:
        """Model FLOPs of a step: what its real tokens ask for, the same for both ways."""
        return ModelFlops(self.model).of(self.layout(objective)).total

    def result(self) -> dict[str, np.ndarray]:
        """Loss and the gradients of parameters from the first to the last layer, at the initial weights, in float32."""
        loss = self.loss(Objective.PUBLISHED, COMPARED_IMAGES)
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
            torch.cuda.empty_cache()  # the other way's process needs the room
        return {"loss": loss.detach().cpu().numpy()} | gradients

    def measure(self, objective: str) -> float:
        """Seconds of one training step."""
        if self.optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)
        start = self.clock()
        self.optimizer.zero_grad()
        self.loss(objective).backward()
        self.optimizer.step()
        return self.clock() - start


class Predictor(Worker):
    """One-shot prediction, one way."""

    def __init__(self, way: str, size: Size | Published, batch: int, seed: int, **options: str):
        super().__init__(way, size, batch, seed, **options)
        self.model.eval()
        self.sample: Callable[..., Samples] = published_one_shot if self.published_way else one_shot

    def measure(self, top_k: int, tokens: int, images: int = 1) -> tuple[float, dict[str, np.ndarray]]:
        """Seconds from uint8 images to sampled labels (the median of up to five runs in a second), and the labels."""
        seconds: list[float] = []
        while not seconds or (len(seconds) < 5 and sum(seconds) < 1):
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
