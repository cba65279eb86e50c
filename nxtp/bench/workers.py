"""The measured models and ways: what runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from nxtp.decoder import DecoderConfig
from nxtp.encoder import EncoderConfig
from nxtp.layout import Objective, lay_out
from nxtp.model import Model, ModelConfig
from nxtp.reference import PADDED_LENGTH, published_loss, published_one_shot
from nxtp.sampling import Samples, one_shot

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


SIZES = {
    "full": Size(224, 14, 384, 8, 768, 12, 6, 2048, 32000, PADDED_LENGTH),
    "tiny": Size(32, 8, 32, 2, 32, 4, 2, 64, 400, 80),
}


def random_labels(batch: int, vocab: int, seed: int) -> list[list[list[int]]]:
    """6 to 10 labels an image of 1 to 3 tokens each, without the delimiter: what nouns of captions look like."""
    generator = np.random.default_rng(seed)
    return [
        [generator.integers(5, vocab, generator.integers(1, 4)).tolist() for _ in range(generator.integers(6, 11))]
        for _ in range(batch)
    ]


class Trainer:
    """Forward, backward and AdamW step of one way on one batch; all parameters train."""

    def __init__(self, way: str, size: Size, batch: int, seed: int):
        self.published_way = way == "published"
        self.model = _seeded_model(size, seed).train()
        self.images = _images(batch, size, seed)
        self.labels = random_labels(batch, size.vocab, seed)
        self.prompt = _prompt(size, seed)
        self.pad_to = size.pad_to
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def loss(self, objective: str) -> torch.Tensor:
        if self.published_way:
            return published_loss(
                self.model, self.images, self.labels, prompt=self.prompt, delimiter=DELIMITER, pad_to=self.pad_to
            )
        layout = lay_out(
            self.labels,
            prompt=self.prompt,
            delimiter=DELIMITER,
            num_image_tokens=self.model.num_image_tokens,
            objective=objective,
        )
        return self.model(self.images, layout).mean

    def result(self) -> dict[str, np.ndarray]:
        """Loss and the gradients of parameters from the first to the last layer, at the initial weights."""
        self.optimizer.zero_grad()
        loss = self.loss(Objective.PUBLISHED)
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
        gradients = {f"gradient of {name}": parameter.grad.numpy() for name, parameter in parameters.items()}
        return {"loss": loss.detach().numpy()} | gradients

    def measure(self, objective: str) -> float:
        """Seconds of one training step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(objective).backward()
        self.optimizer.step()
        return time.perf_counter() - start


class Predictor:
    """One-shot prediction of one image, one way."""

    def __init__(self, way: str, size: Size, batch: int, seed: int):
        self.sample: Callable[..., Samples] = one_shot if way == "ours" else published_one_shot
        self.model = _seeded_model(size, seed).eval()
        self.images = _images(batch, size, seed)
        self.prompt = _prompt(size, seed)

    def measure(self, top_k: int, tokens: int) -> tuple[float, dict[str, np.ndarray]]:
        """Seconds from uint8 image to sampled labels (the median of up to five runs in a second), and the labels."""
        seconds: list[float] = []
        while not seconds or (len(seconds) < 5 and sum(seconds) < 1):
            start = time.perf_counter()
            samples = self._run(top_k, tokens)
            seconds.append(time.perf_counter() - start)
        return median(seconds), {"tokens": samples.tokens_BKL.numpy(), "probabilities": samples.probs_BKL.numpy()}

    def _run(self, top_k: int, tokens: int) -> Samples:
        return self.sample(
            self.model,
            self.images,
            prompt=self.prompt,
            delimiter=DELIMITER,
            top_k=top_k,
            max_tokens=tokens,
            never_first=[DELIMITER],
        )


def _seeded_model(size: Size, seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(size.config())


def _images(batch: int, size: Size, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size.image_size, size.image_size), dtype=torch.uint8, generator=generator)


def _prompt(size: Size, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, size.vocab, PROMPT_TOKENS).tolist()
