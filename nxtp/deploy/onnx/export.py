"""A model → ONNX graphs (see :mod:`nxtp.deploy.onnx`)."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedTokenizerFast

from nxtp.deploy.onnx.runner import CONFIG, DECODER, DECODER_INPUTS, ENCODER, TOKENIZER, Config
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.model import Model
from nxtp.runs.atomic import atomic_directory
from nxtp.sampling.one_shot import MAX_LABEL_TOKENS, OneShotConfig
from nxtp.sampling.samplers import never_first, settings_of

NEEDED = ("onnx", "onnxscript", "onnxruntime")


class EncoderGraph(nn.Module):
    """Pixels uint8 [B, 3, S, S] → image tokens and ``<|image|>`` as the decoder reads them, [B, N + 1, D]."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.marked(self.model.encode(pixels))


class DecoderGraph(nn.Module):
    """Tokens after a cache → logits, and their keys and values. With image tokens and prompt it is the prefix pass.

    Args of a call:
        image_tokens: [B, N + 1, D] of the encoder; [B, 0, D] for a step.
        tokens: int64 [B, Q], after them.
        positions: int64 [1, T], T = N + 1 + Q (a step: Q).
        mask: bool [1, 1, T, cached + T], True = may attend.
        rows: int64 [R], the places whose logits are returned.
        keys, values: [blocks, B, H, cached, width], of the cache.

    Returns:
        logits float32 [B, R, V]; keys and values [blocks, B, H, T, width] of this call's tokens.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.decoder, self.pool, self.num_image_tokens = model.decoder, model.config.pool, model.num_image_tokens

    def forward(
        self, image_tokens: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, rows: Tensor, keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        cache = DynamicCache()
        for block in range(keys.shape[0]):
            cache.update(keys[block], values[block], block)
        embeddings = torch.cat([image_tokens, self.decoder.embed(tokens)], dim=1)
        if self.pool:  # the sum is 0 in a step, which has no image tokens
            embeddings[:, -1] += image_tokens[:, :-1].sum(dim=1) / self.num_image_tokens
        hidden = self.decoder(embeddings, positions, mask, cache)
        new = embeddings.shape[1]
        pairs = [(layer.keys[:, :, -new:], layer.values[:, :, -new:]) for layer in cache.layers]
        return self.decoder.logits(hidden[:, rows]), *(torch.stack(each) for each in zip(*pairs, strict=True))


def require_onnx() -> None:
    """
    Raises:
        UserError: a package that writes or quantises graphs is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'nxtp[onnx]'.")


def export_onnx(recognizer: Recognizer, out: Path, int8: bool = False) -> Config:
    """Write a directory of graphs, or replace one, in one rename.

    Args:
        recognizer: on the CPU, float32.
        int8: :func:`quantize` the weights.

    Raises:
        UserError: a package is missing, or the model's image tokens do not see each other both ways.
        ValueError: another dtype or device.
    """
    require_onnx()
    model = recognizer.model
    if model.image_token.dtype != torch.float32 or recognizer.device.type != "cpu":
        raise ValueError(f"the model must be float32 on cpu, got {model.image_token.dtype} on {recognizer.device}")
    if model.config.attention == "causal":
        raise UserError("Graphs of a model with model.attention=causal are not written: their runner has its own mask.")
    config = runner_config(recognizer, "int8" if int8 else "float32")
    with atomic_directory(out) as new:
        with _quiet(), torch.no_grad():
            _write(EncoderGraph(model), encoder_inputs(config), new / ENCODER)
            _write(DecoderGraph(model), decoder_inputs(config), new / DECODER)
            if int8:
                for name in (ENCODER, DECODER):
                    quantize(new / name)
        recognizer.tokenizer.tokenizer.backend_tokenizer.save(str(new / TOKENIZER))
        (new / CONFIG).write_text(json.dumps(asdict(config), indent=1, default=str))
    return config


def quantize(path: Path) -> None:
    """Replace a graph and its external data: matrices with 8-bit weights, 32 per scale; the rest stays float32."""
    import onnx
    import onnx_ir
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    # accuracy_level 4 rounds activations to 8 bits too: the fast kernels need it
    quantizer = MatMulNBitsQuantizer(onnx.load(path), bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    # Not onnx.save_model: it would take a file of this name in the working directory for the external data.
    onnx_ir.save(onnx_ir.from_proto(quantizer.model.model), path, external_data=f"{path.name}.data")


def cleans_spaces(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether decoding removes spaces before punctuation: transformers ignores the setting for some tokenizers."""
    ids = tokenizer("a , b .", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.backend_tokenizer.decode(ids))


def runner_config(recognizer: Recognizer, weights: str) -> Config:
    model, tokenizer = recognizer.model, recognizer.tokenizer
    name, settings = settings_of(OneShotConfig())
    known = recognizer.calibrations.get(name)
    lm = model.decoder.lm.config
    return Config(
        image_size=recognizer.image_size,
        num_image_tokens=model.num_image_tokens,
        prompt=list(tokenizer.prompt_ids),
        delimiter=tokenizer.delimiter_id,
        never_first=list(never_first(model, tokenizer)),
        max_label_tokens=MAX_LABEL_TOKENS,
        cleans_spaces=cleans_spaces(tokenizer.tokenizer),
        blocks=len(model.decoder.blocks),
        heads=getattr(lm, "num_key_value_heads", None) or lm.num_attention_heads,
        head_width=getattr(lm, "head_dim", None) or lm.hidden_size // lm.num_attention_heads,
        width=model.decoder.width,
        weights=weights,
        provenance=recognizer.provenance,
        interpolation=recognizer.pixels.interpolation,
        resize_mode=recognizer.pixels.resize_mode,
        calibration=[known.temperature, known.offset] if known and known.settings == settings else None,
    )


Inputs = dict[str, tuple[Tensor, dict[int, Dim]]]


def encoder_inputs(config: Config) -> Inputs:
    """As :func:`decoder_inputs`."""
    pixels = torch.zeros(2, 3, config.image_size, config.image_size, dtype=torch.uint8)
    return {"pixels": (pixels, {0: Dim.AUTO})}


def decoder_inputs(config: Config) -> Inputs:
    """An example of each input, in which no two variable sizes are equal, and its variable axes."""
    batch, prompt, cached = 2, 5, 7
    image = config.num_image_tokens + 1
    length = image + prompt
    keys = torch.zeros(config.blocks, batch, config.heads, cached, config.head_width)
    any_size = Dim.AUTO
    examples = (
        (torch.zeros(batch, image, config.width), {0: any_size, 1: any_size}),
        (torch.zeros(batch, prompt, dtype=torch.long), {0: any_size, 1: any_size}),
        (torch.arange(length)[None], {1: any_size}),
        (torch.ones(1, 1, length, cached + length, dtype=torch.bool), {2: any_size, 3: any_size}),
        (torch.arange(3), {0: any_size}),
        (keys, {1: any_size, 3: any_size}),
        (keys.clone(), {1: any_size, 3: any_size}),
    )
    return dict(zip(DECODER_INPUTS, examples, strict=True))


def _write(graph: nn.Module, inputs: Inputs, path: Path) -> None:
    outputs = ["image_tokens"] if isinstance(graph, EncoderGraph) else ["logits", "new_keys", "new_values"]
    torch.onnx.export(
        graph.eval(),
        tuple(example for example, _ in inputs.values()),
        path,
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes=tuple(axes for _, axes in inputs.values()),
        dynamo=True,
        external_data=True,
        verbose=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own warnings and log lines."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
