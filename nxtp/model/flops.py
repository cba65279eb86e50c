"""FLOPs by formula, peak FLOP/s of GPUs, peak memory. nxtp.train.callbacks.throughput logs them."""

from __future__ import annotations

import copy
import re
import resource
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nxtp.model.encoder import Encoder
from nxtp.model.layout import Layout, lay_out
from nxtp.model.model import Model

LABELS, LABEL_TOKENS, PROMPT_TOKENS = 8, 2, 7  # of a typical caption
TYPICAL = f"1 + {PROMPT_TOKENS} of the prompt, {LABELS} labels of {LABEL_TOKENS} tokens and a delimiter"


class Flops(NamedTuple):
    """Floating point operations of a forward and a backward pass; a multiplication and an addition count as two."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def times(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor)

    @staticmethod
    def sum(items: Iterable[Flops]) -> Flops:
        return Flops(*(sum(column) for column in zip((0, 0), *items, strict=True)))


class ModelFlops:
    """FLOPs of a model's matrix products as a function of a batch's shape; all other operations are small.

    A product of [m, k] and [k, n] is 2mkn forward. The backward pass adds as much for the weight's gradient, if the
    weight trains, and as much for the input's gradient, if something at or before the input trains. With B images,
    N image tokens, T positions per sequence, S supervised positions in the batch:

        encoder       B · (2·N·3p²·w + L·(2·(N+1)·(4w² + 2wm) + 4·(N+1)²·w))   ViT: patch p, width w, L blocks, MLP m
        projection    B · 2·N·w·D
        decoder       B·T · 2·mk of each linear layer, adapters too
        attention     B·T² · L · 4·H·h           L blocks, H heads of width h: scores and their sum over values, of all
                                                 T² pairs whatever the mask; backward twice that, without the
                                                 recomputation of fused kernels
        output layer  S · 2·D·V                  only supervised positions

    Other towers (convolutional, or from timm) are counted operator by operator, once, on the meta device.

    Args:
        model: on any device; ``requires_grad`` says what trains.
    """

    def __init__(self, model: Model):
        from open_clip.transformer import VisionTransformer

        config, count = model.decoder.lm.config, model.num_image_tokens
        width, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or width // heads

        vit = isinstance(model.encoder.visual, VisionTransformer)
        self.encoder = _vit(model.encoder) if vit else _counted(model.encoder)  # per image, as the next
        below = _trains(model.encoder)
        self.projection = _product(2 * count * model.encoder.width * width, _trains(model.projection), below)
        below = below or _trains(model.projection, model.image_token, model.decoder.lm.model.embed_tokens)
        linear, attention = [], []
        for block in model.decoder.blocks:
            trainable = _trains(block)
            below = below or trainable  # a block begins with its norm
            linear += [_product(2 * m.weight.numel(), m.weight.requires_grad, below) for m in _linear(block)]
            attention.append(_product(4 * heads * head, below, below))
        self.decoder, self.attention = Flops.sum(linear), Flops.sum(attention)  # per position; per pair
        below = below or _trains(model.decoder.lm.model.norm)
        self.output = _product(2 * width * config.vocab_size, _trains(model.decoder.lm.lm_head), below)  # per source

    def parts(self, images: int, length: float, sources: float) -> dict[str, Flops]:
        """FLOPs by part of ``images`` sequences of ``length`` positions, with ``sources`` supervised ones in all."""
        return {
            "encoder": self.encoder.times(images),
            "projection": self.projection.times(images),
            "decoder": self.decoder.times(images * length),
            "attention": self.attention.times(images * length**2),
            "output layer": self.output.times(sources),
        }

    def step(self, images: int, length: float, sources: float) -> Flops:
        return Flops.sum(self.parts(images, length, sources).values())

    def of(self, layout: Layout, *, padding: bool = False) -> Flops:
        """FLOPs of a step on a batch: of its real tokens (at their mean length), or with ``padding`` as executed.

        Reads shapes only, so it does not synchronise the GPU.
        """
        images, length = layout.segments_BT.shape
        if not images:
            return Flops(0, 0)
        return self.step(images, length if padding else layout.num_tokens / images, layout.sources.shape[0])


def typical_layout(model: Model, images: int = 1) -> Layout:
    """Images with a typical caption (:data:`TYPICAL`), objective ``matched``."""
    labels = [[(0,) * LABEL_TOKENS] * LABELS] * images
    return lay_out(labels, prompt=[0] * PROMPT_TOKENS, delimiter=0, num_image_tokens=model.num_image_tokens)


def training_flops(model: Model) -> Flops:
    """FLOPs of one image of :func:`typical_layout`."""
    return ModelFlops(model).of(typical_layout(model))


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _trains(*parts: nn.Module | nn.Parameter) -> bool:
    tensors = (p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else (part,)))
    return any(p.requires_grad for p in tensors)


def _product(flops: float, first: bool, second: bool) -> Flops:
    """``first``, ``second``: whether each factor (weight, input) needs its gradient."""
    return Flops(flops, flops * (first + second))


def _vit(encoder: Encoder) -> Flops:
    visual = encoder.visual
    patches, width = encoder.num_tokens, visual.conv1.out_channels
    tokens = patches + 1  # the class token
    below = _trains(visual.conv1)
    products = [_product(2 * patches * visual.conv1.weight[0].numel() * width, below, False)]
    below = below or _trains(visual.class_embedding, visual.positional_embedding, visual.ln_pre)
    for block in visual.transformer.resblocks:
        trainable = _trains(block)
        below = below or trainable  # a block begins with its norm
        weights = 4 * width**2 + 2 * width * block.mlp.c_fc.out_features
        products += [_product(2 * tokens * weights, trainable, below), _product(4 * tokens**2 * width, below, below)]
    return Flops.sum(products)


def _counted(encoder: Encoder) -> Flops:
    tower = copy.deepcopy(encoder).to("meta").eval()
    size = encoder.config.image_size
    with FlopCounterMode(display=False) as forward:
        tokens = tower(torch.zeros(1, 3, size, size, device="meta"))
    with FlopCounterMode(display=False) as backward:
        if tokens.requires_grad:
            tokens.sum().backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


# Dense peaks in TFLOP/s for float16, bfloat16 (both with float32 accumulation), TF32 and float32, from data sheets, by
# the device's name. Lightning's get_available_flops (2.6) does not know the H200, takes an L40S for an L4, gives an
# H100 NVL more than twice its peak, and ignores the tensor cores of RTX 4090, A40 and A6000.
_PEAKS = (
    (r"GB200", 2500, 2500, 1250, 80),
    (r"B200", 2250, 2250, 1125, 75),
    (r"GH200", 989.4, 989.4, 494.7, 66.9),
    (r"H[12]00 NVL", 835.5, 835.5, 417.7, 60),
    (r"H200", 989.4, 989.4, 494.7, 66.9),
    (r"H100 .*HBM2e|H100 PCIe", 756, 756, 378, 51.2),
    (r"H100 .*HBM3|H100 SXM", 989.4, 989.4, 494.7, 66.9),
    (r"A100", 312, 312, 156, 19.5),
    (r"L40S", 362, 362, 183, 91.6),
    (r"L40$", 181, 181, 90.5, 90.5),
    (r"L4$", 121, 121, 60, 30.3),
    (r"RTX 6000 Ada", 364.2, 364.2, 182.1, 91.1),
    (r"RTX 4090$", 165.2, 165.2, 82.6, 82.6),
    (r"RTX A6000$", 154.8, 154.8, 77.4, 38.7),
    (r"A40$", 149.7, 149.7, 74.8, 37.4),
    (r"A10$", 125, 125, 62.5, 31.2),
    (r"RTX 3090$", 71, 71, 35.6, 35.6),
    (r"V100-SXM", 125, None, None, 15.7),
    (r"V100-PCIE", 112, None, None, 14),
    (r"T4$", 65, None, None, 8.1),
    (r"MI300X", 1307.4, 1307.4, 653.7, 163.4),
)


def known_gpus() -> list[str]:
    """Names that :func:`peak_flops` takes, of those with bfloat16."""
    return [row[0].split("|")[-1].removesuffix("$").replace("[12]", "1") for row in _PEAKS if row[2]]


def peak_flops(device_name: str, dtype: torch.dtype | None) -> float | None:
    """Peak FLOP/s of the device's matrix units in ``dtype``, without sparsity; None if unknown.

    float32 means TF32 where ``torch.set_float32_matmul_precision`` allows it and the device has it.
    """
    row = next((row for row in _PEAKS if re.search(row[0], device_name)), None)
    if row is None or "MIG" in device_name:
        return None
    peaks = dict(zip((torch.float16, torch.bfloat16, "tf32", torch.float32), row[1:], strict=True))
    peak = peaks.get(dtype)
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        peak = peaks["tf32"] or peak
    return peak * 1e12 if peak else None


def compute_dtype(precision: str) -> torch.dtype | None:
    """The type of matrix products under a Lightning precision: ``bf16-mixed`` → bfloat16; None for other kinds."""
    return {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}.get(str(precision).split("-")[0])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
