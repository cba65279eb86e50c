"""Labels from ONNX graphs, without torch: one-shot sampling as :mod:`nxtp.sampling.one_shot` does it, in numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from nxtp.data.images import load_image
from nxtp.data.labels.cleaning import normalise
from nxtp.deploy.onnx.pixels import to_pixels
from nxtp.errors import UserError
from nxtp.inference.calibration import Calibration
from nxtp.model.hub import reason

FORMAT = 2
DECODER_INPUTS = ("image_tokens", "tokens", "positions", "mask", "rows", "keys", "values")
CONFIG, ENCODER, DECODER, TOKENIZER = "config.json", "encoder.onnx", "decoder.onnx", "tokenizer.json"
# Where a tokenizer cleans up its spaces: what it writes for what, in transformers' order.
_UNSPACED = {text: text[1:] for text in (" .", " ?", " !", " ,")} | {" ' ": "'"}
_UNSPACED |= {text: text[1:] for text in (" n't", " 'm", " 's", " 've", " 're")}

ImageLike = str | Path | bytes | Image.Image
Labels = list[tuple[str, float]]


@dataclass(frozen=True)
class Config:
    """What the runner needs to know about a model."""

    image_size: int  # pixels per side
    num_image_tokens: int  # N
    prompt: list[int]  # BOS and prompt ids
    delimiter: int  # the id that ends a label
    never_first: list[int]  # ids that cannot start a label
    max_label_tokens: int  # where a label without a delimiter is cut
    cleans_spaces: bool  # whether the tokenizer removes spaces before punctuation
    blocks: int
    heads: int  # of the keys
    head_width: int
    width: int  # D
    weights: str  # float32, or int8
    provenance: dict[str, Any]  # where the weights come from
    interpolation: str = "bicubic"  # this and the next: as in EncoderConfig; format 1 has no others
    resize_mode: str = "shortest"
    calibration: list[float] | None = None  # temperature and offset of one-shot sampling
    format: int = FORMAT


class OnnxRecognizer:
    """Images in, ranked labels out: those of :class:`nxtp.Recognizer`, to 1e-4.

    >>> recognizer = OnnxRecognizer("models/demo-onnx")
    >>> recognizer.predict("photo.jpg", top_k=5)
    [('hamburger', 0.74), ('avocado', 0.14), …]

    Args:
        directory: written by `nxtp export DIR --format onnx --out OUT`.
        threads: of onnxruntime; 0: one per core.
        providers: onnxruntime's, in order of preference.

    Raises:
        UserError: no such directory, or another format; names the file.
    """

    def __init__(self, directory: str | Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)):
        import onnxruntime  # here, so that the exporter can say that it is not installed

        directory = Path(directory)
        self.config = read_config(directory)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
            self.encoder, self.decoder = (
                onnxruntime.InferenceSession(directory / name, options, providers=list(providers))
                for name in (ENCODER, DECODER)
            )
        except Exception as error:  # both libraries raise classes of their own
            raise UserError(f"'{directory}' cannot be loaded: {reason(error)}.") from error

    def predict(self, images: ImageLike | Sequence[ImageLike], top_k: int = 10, batch_size: int = 8):
        """Ranked labels with their probabilities, as :meth:`nxtp.Recognizer.predict` returns them.

        Args:
            images: one image or a list: a path, encoded bytes, or a PIL image.
            batch_size: images per call of the graphs. The result does not depend on it.

        Raises:
            ImageError: an image that cannot be read; names it.
            ValueError: ``top_k`` below 1.
        """
        single = not isinstance(images, list | tuple)
        every: Any = [images] if single else images
        labels: list[Labels] = []
        for start in range(0, len(every), batch_size):
            pixels = [self.transform(image) for image in every[start : start + batch_size]]
            labels += self.predict_pixels(np.stack(pixels), top_k)
        return labels[0] if single else labels

    def transform(self, image: ImageLike) -> np.ndarray:
        """One image → the model's input pixels, uint8 [3, S, S]."""
        size, interpolation, resize_mode = self.config.image_size, self.config.interpolation, self.config.resize_mode
        return to_pixels(load_image(image, near=size), size, interpolation, resize_mode)

    def predict_pixels(self, pixels: np.ndarray, top_k: int = 10) -> list[Labels]:
        """Labels of uint8 [B, 3, S, S]."""
        if top_k < 1:
            raise ValueError(f"top_k must be ≥ 1, got {top_k}")
        if len(pixels) == 0:
            return []
        tokens_BKL, probs_BKL = self._one_shot(pixels, top_k)
        return [self._ranked(*image, top_k) for image in zip(tokens_BKL, probs_BKL, strict=True)]

    def _one_shot(self, pixels: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [B, K, L], padded with the delimiter, and their probabilities float32."""
        config = self.config
        image_tokens = self._encode(pixels)
        batch, prefix = len(pixels), config.num_image_tokens + 1 + len(config.prompt)
        prompt = np.tile(np.array(config.prompt, dtype=np.int64), (batch, 1))
        empty = np.zeros((config.blocks, batch, config.heads, 0, config.head_width), dtype=np.float32)
        index = np.arange(prefix)
        both_images = (index[:, None] < config.num_image_tokens) & (index < config.num_image_tokens)
        rule = (index[:, None] >= index) | both_images
        logits, *cache = self._decode(image_tokens, prompt, index[None], rule[None, None], index[-1:], empty, empty)
        first_BV = _softmax(logits[:, 0])
        first_BV[:, config.never_first] = -1.0
        count = min(top_k, first_BV.shape[1] - len(set(config.never_first)))
        tokens = np.argsort(-first_BV, axis=1, kind="stable")[:, :count]

        tokens_BKL = np.full((batch, count, config.max_label_tokens + 1), config.delimiter)
        probs_BKL = np.ones(tokens_BKL.shape, dtype=np.float32)
        tokens_BKL[..., 0], probs_BKL[..., 0] = tokens, np.take_along_axis(first_BV, tokens, 1)
        no_image = np.zeros((batch, 0, config.width), dtype=np.float32)
        active_BA = np.tile(np.arange(count), (batch, 1))
        current_BA, running_BA = tokens, tokens != config.delimiter
        tree: list[tuple[np.ndarray, ...]] = []  # keys and values of each step's branches
        for step in range(1, config.max_label_tokens):
            needed = int(running_BA.sum(axis=1).max())
            if needed == 0:
                break
            if needed < active_BA.shape[1]:  # finished branches are dropped
                keep_BA = np.argsort(~running_BA, axis=1, kind="stable")[:, :needed]
                active_BA, current_BA, running_BA = (
                    np.take_along_axis(each, keep_BA, 1) for each in (active_BA, current_BA, running_BA)
                )
                where = keep_BA[None, :, None, :, None]
                tree = [tuple(np.take_along_axis(each, where, 3) for each in pair) for pair in tree]
            branches = active_BA.shape[1]
            own = np.tile(np.eye(branches, dtype=bool), (1, step))
            mask = np.concatenate([np.ones((branches, prefix), dtype=bool), own], axis=1)
            positions = np.full((1, branches), prefix + step - 1)
            cached = (np.concatenate(each, axis=3) for each in zip(cache, *tree, strict=True))
            rows = np.arange(branches)
            logits, *new = self._decode(no_image, current_BA, positions, mask[None, None], rows, *cached)
            tree.append(tuple(new))
            best_BA = logits.argmax(axis=-1)
            top = np.take_along_axis(logits, best_BA[..., None], -1)
            prob_BA = 1 / np.exp(logits - top).sum(axis=-1)
            current_BA = np.where(running_BA, best_BA, config.delimiter)
            np.put_along_axis(tokens_BKL[..., step], active_BA, current_BA, 1)
            np.put_along_axis(probs_BKL[..., step], active_BA, np.where(running_BA, prob_BA, 1), 1)
            running_BA &= current_BA != config.delimiter
        return tokens_BKL, probs_BKL

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """Image tokens and ``<|image|>``, [B, N + 1, D]."""
        return self.encoder.run(None, {"pixels": pixels})[0]

    def _decode(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Logits [B, R, V], and the keys and values of the call's tokens [blocks, B, H, T, width].

        Inputs as of :class:`nxtp.deploy.onnx.export.DecoderGraph`.
        """
        return self.decoder.run(None, dict(zip(DECODER_INPUTS, inputs, strict=True)))

    def _ranked(self, tokens_KL: np.ndarray, probs_KL: np.ndarray, top_k: int) -> Labels:
        """Labels of one image: equal texts are merged, empty ones dropped."""
        merged: dict[str, float] = {}
        lengths = (tokens_KL == self.config.delimiter).argmax(axis=1)
        for ids, length, probability in zip(tokens_KL, lengths, probs_KL.prod(axis=1).tolist(), strict=True):
            if text := normalise(self._text(ids[:length].tolist())):
                merged[text] = merged.get(text, 0.0) + probability
        ranked = sorted(merged.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        if self.config.calibration is None:
            return ranked
        temperature, offset = self.config.calibration
        return Calibration(temperature, offset)(ranked)

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for spaced, cleaned in _UNSPACED.items() if self.config.cleans_spaces else ():
            text = text.replace(spaced, cleaned)
        return text.strip()


def read_config(directory: Path) -> Config:
    """
    Raises:
        UserError: it is missing, damaged or of another format.
    """
    path = directory / CONFIG
    try:
        content = json.loads(path.read_bytes())
        known = {field.name for field in fields(Config)}
        found = Config(**{name: value for name, value in content.items() if name in known})
    except FileNotFoundError:
        advice = "write one with: nxtp export DIR --format onnx --out OUT"
        raise UserError(f"'{directory}' is not a directory of ONNX graphs: it has no {CONFIG}; {advice}.") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is not a configuration of ONNX graphs: {error}.") from error
    if found.format not in (1, FORMAT):
        raise UserError(f"'{path}' has format {found.format}; this nxtp reads up to {FORMAT}: export the model again.")
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
