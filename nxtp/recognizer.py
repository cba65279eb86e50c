"""Recognizer: a trained model as its users keep it — a directory with weights, configuration and tokenizer."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor

import nxtp
from nxtp.config import to_dataclass
from nxtp.errors import UserError
from nxtp.images import load_image
from nxtp.model import Model, ModelConfig
from nxtp.pixels import to_pixels
from nxtp.sampling import MAX_LABEL_TOKENS, one_shot, ranked_labels
from nxtp.tokens import FILES as TOKENIZER_FILES
from nxtp.tokens import LabelTokenizer

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
ImageLike = str | Path | bytes | Image.Image | Tensor | np.ndarray
Labels = list[tuple[str, float]]


class Recognizer:
    """Images in, ranked labels out.

    >>> recognizer = Recognizer.from_pretrained("runs/demo/model")
    >>> recognizer.predict("photo.jpg", top_k=5)
    [('coffee', 0.91), ('rocket', 0.88), …]

    ``provenance`` says where the weights come from: run, code, objective, noun backend, data.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: LabelTokenizer,
        config: ModelConfig,
        provenance: dict[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.provenance = provenance or {}

    @property
    def device(self) -> torch.device:
        return self.model.image_token.device

    @property
    def image_size(self) -> int:
        return self.config.encoder.image_size

    # Using it

    def predict(self, images: ImageLike | Sequence[ImageLike], top_k: int = 10, batch_size: int = 64):
        """Ranked labels with their probabilities.

        Args:
            images: one image or a list: a path, encoded bytes, a PIL image, or uint8 pixels ([H, W, 3] array
                or [3, H, W] tensor).
            top_k: labels an image, at most; fewer where several came out the same.
            batch_size: images computed together; the result does not depend on it.

        Returns:
            ``[(label, probability), …]``, most probable first, for one image; a list of those for a list.

        Raises:
            ImageError: an image that cannot be read; names it.
            ValueError: ``top_k`` below 1.
        """
        single = not isinstance(images, (list, tuple))
        every = [images] if single else list(images)
        result: list[Labels] = []
        for start in range(0, len(every), batch_size):
            pixels = torch.stack([self.transform(image) for image in every[start : start + batch_size]])
            result += self.predict_pixels(pixels, top_k)
        return result[0] if single else result

    def predict_pixels(self, images: Tensor, top_k: int = 10) -> list[Labels]:
        """Labels of uint8 [B, 3, S, S], S = ``image_size``, on any device."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: at least 1, please")
        if len(images) == 0:
            return []
        samples = one_shot(
            self.model,
            images.to(self.device),
            prompt=self.tokenizer.prompt_ids,
            delimiter=self.tokenizer.delimiter_id,
            top_k=top_k,
            max_tokens=MAX_LABEL_TOKENS,
            never_first=self.tokenizer.never_first,
        )
        return ranked_labels(samples, self.tokenizer, top_k)

    def transform(self, image: ImageLike) -> Tensor:
        """One image → the model's input pixels, uint8 [3, S, S]."""
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        return to_pixels(load_image(image, near=self.image_size), self.image_size)

    # Keeping it

    def save_pretrained(self, directory: str | Path, provenance: dict[str, Any] | None = None) -> Path:
        """Write a model directory: aside first, then in one rename, over what was there."""
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            save_model(self.model, str(aside / WEIGHTS))
            self.tokenizer.save(aside)
            content = {
                "format": FORMAT,
                "nxtp": nxtp.__version__,
                "model": asdict(_rebuildable(self.config, self.model)),
                "provenance": provenance if provenance is not None else self.provenance,
                "files": {name: _fingerprint(aside / name) for name in (WEIGHTS, *TOKENIZER_FILES)},
            }
            (aside / CONFIG).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
            aside.chmod(0o755)
            if directory.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
                directory.rename(old / directory.name)
                aside.rename(directory)
                shutil.rmtree(old)
            else:
                aside.rename(directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return directory

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        verify: bool = True,
    ) -> Recognizer:
        """Load a model directory, or download one by its hub name ("owner/name").

        Needs no training configuration and no network for a local directory; runs no code from it.

        Args:
            device: "auto" takes a GPU if there is one.
            verify: compare the files with the fingerprints in config.yaml.

        Raises:
            UserError: missing, altered or unknown content; names the file.
        """
        directory = _locate(source)
        content = _read_config(directory)
        if verify:
            _verify(directory, content.get("files") or {})
        config = to_dataclass(ModelConfig, content.get("model"), f"{directory / CONFIG}: model")
        tokenizer = LabelTokenizer.load(directory, config.prompt)
        model = Model(config, load_pretrained=False)
        _load_weights(model, directory / WEIGHTS)
        model.requires_grad_(False)
        if str(device) == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device=device, dtype=dtype), tokenizer, config, content.get("provenance"))


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive runs of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _rebuildable(config: ModelConfig, model: Model) -> ModelConfig:
    """The configuration that builds the same shapes without the sources the weights came from."""
    architecture = {"model_type": model.decoder.lm.config.model_type, **model.decoder.lm.config.to_diff_dict()}
    for name in ("_name_or_path", "architectures", "transformers_version", "dtype", "use_cache", "auto_map"):
        architecture.pop(name, None)
    architecture["vocab_size"] = model.decoder.vocab_size
    architecture["num_hidden_layers"] = len(model.decoder.blocks)
    return replace(
        config,
        encoder=replace(config.encoder, pretrained=None),
        decoder=replace(config.decoder, source=None, config=architecture, depth=None, blocks=None),
        tokenizer=None,
    )


def _locate(source: str | Path) -> Path:
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"No model directory '{source}'.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[WEIGHTS, CONFIG, *TOKENIZER_FILES]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{source}' is no directory, and could not be had from the hub: {reason}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"'{directory}' is not a model directory: it has no {CONFIG}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is damaged: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int) or "model" not in content:
        raise UserError(f"'{path}' is not a model's configuration: it lacks 'format' or 'model'.")
    if content["format"] > FORMAT:
        raise UserError(f"'{directory}' has format {content['format']}; this nxtp reads up to {FORMAT}: upgrade it.")
    return content


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(directory: Path, files: dict[str, Any]) -> None:
    for name in (WEIGHTS, *TOKENIZER_FILES):
        path = directory / name
        if not path.is_file():
            raise UserError(f"'{directory}' lacks {name}: copy or export the model again.")
        if name in files and _fingerprint(path) != files[name]:
            raise UserError(
                f"'{path}' is not the file that was saved (size or SHA-256 differ): copy or export the model again."
            )


def _load_weights(model: Model, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.decoder.lm.config.tie_word_embeddings
    if tied:  # safetensors keeps one of two tied tensors
        pair = ("decoder.lm.lm_head.weight", "decoder.lm.model.embed_tokens.weight")
        present = next((name for name in pair if name in state), None)
        for name in pair if present else ():
            state.setdefault(name, state[present])
            shapes.setdefault(name, shapes[present])
    missing, surplus = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    misshaped = sorted(name for name in own.keys() & shapes.keys() if own[name] != shapes[name])
    if missing or surplus or misshaped:
        found = {"missing": missing, "surplus": surplus, "of another shape": misshaped}
        told = "; ".join(
            f"{len(v)} {k} ({', '.join(v[:3])}{', …' if len(v) > 3 else ''})" for k, v in found.items() if v
        )
        raise UserError(f"'{path}' does not fit its config.yaml: {told}.")
    model.load_state_dict(state)
