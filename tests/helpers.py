"""Small shards and small models for the tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from nxtp.decoder import DecoderConfig
from nxtp.encoder import EncoderConfig
from nxtp.model import ModelConfig
from nxtp.shards import write_manifest, write_shard

COLOURS = {"rose": (200, 40, 60), "lemon": (220, 200, 40), "leaf": (40, 160, 60), "ocean": (30, 80, 200)}


def jpeg(colour: tuple[int, int, int], size: int = 32, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(number: int, *, labels: bool = False) -> dict:
    """Sample ``number``: one colour, named in its caption (and in its labels where asked)."""
    name = list(COLOURS)[number % len(COLOURS)]
    content = {"__key__": f"{number:06d}", "jpg": jpeg(COLOURS[name], seed=number), "txt": f"a {name} and a stone"}
    if labels:
        content["json"] = {"labels": [name, "stone"]}
    return content


def write_shards(directory: Path, sizes: list[int], *, labels: bool = False) -> Path:
    """Shards of the given sizes with consecutive samples, and their manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    infos, first = [], 0
    for index, size in enumerate(sizes):
        samples = [sample(first + i, labels=labels) for i in range(size)]
        infos.append(write_shard(directory / f"part-{index:05d}.tar", samples))
        first += size
    write_manifest(directory, infos, made_by={"test": True})
    return directory


def tiny_config(image_size: int = 32, **decoder) -> ModelConfig:
    """A ViT of two blocks and width 32 with 16 image tokens, and LLaMA blocks of width 32."""
    fields = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "pad_token_id": None,
    }
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": image_size // 4, "mlp_ratio": 2.0}
    return ModelConfig(
        encoder=EncoderConfig(vision=vision, image_size=image_size),
        decoder=DecoderConfig(config=fields | decoder),
        vocab_size=400,
    )


# The same model as Hydra overrides, for commands run in a subprocess.
TINY_OVERRIDES = [
    "model/encoder=vit_tiny",
    "model.encoder.vision.layers=2",
    "model.encoder.vision.width=32",
    "model.encoder.vision.head_width=16",
    "model.encoder.vision.mlp_ratio=2.0",
    "model.encoder.image_size=32",
    "model.decoder.config.hidden_size=32",
    "model.decoder.config.intermediate_size=64",
    "model.decoder.config.num_attention_heads=4",
    "model.decoder.config.num_key_value_heads=4",
    "model.decoder.depth=2",
    "model.vocab_size=400",
]
