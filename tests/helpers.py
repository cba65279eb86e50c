"""Small shards and small models for the tests."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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


class Site(SimpleHTTPRequestHandler):
    """Serves a directory; ``stall`` names files of which only the beginning is ever sent."""

    stall: tuple[str, ...] = ()
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        self.asked.append(name)
        if name in self.stall:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            self.wfile.flush()
            time.sleep(20)
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def serving(root: Path, stall: tuple[str, ...] = ()) -> Iterator[tuple[str, type[Site]]]:
    """(address, handler) of a server of ``root`` on this machine."""
    handler = type("Handler", (Site,), {"asked": [], "stall": stall})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(root)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


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
