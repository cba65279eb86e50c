"""A whole CLIP, image and text tower, for what compares images with labels: a ranking and an embedder of the metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from nxtp.errors import UserError, nearest


class Clip:
    """An open_clip model in evaluation mode, float32, frozen.

    Args:
        source: ``ARCHITECTURE/TAG`` downloads (``ViT-L-14/openai``), ``ARCHITECTURE:FILE`` reads a local file. OpenAI's
            weights in a file need the architecture that says so: ``ViT-L-14-quickgelu:FILE``.

    Raises:
        UserError: an unknown architecture or tag, or a file that cannot be used.
    """

    def __init__(self, source: str):
        name, mark, file = source.partition(":")
        tag = None
        if not mark:
            name, _, tag = source.partition("/")
        if name not in open_clip.list_models():
            raise UserError(f"open_clip has no model '{name}'.{nearest(name, open_clip.list_models())}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if mark and not Path(file).is_file():
            raise UserError(f"No CLIP weights at '{file}'.")
        if not mark and tag not in tags:
            raise UserError(
                f"'{source}' names no weights of {name}: say {name}/TAG or {name}:FILE.{nearest(tag, tags)}"
            )
        try:
            self.model = open_clip.create_model(name, pretrained=file or tag, weights_only=True)
        except Exception as error:  # hubs and files fail in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
            raise UserError(f"No usable CLIP in '{source}': {reason}") from error
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        settings = open_clip.get_model_preprocess_cfg(self.model)
        size = settings["size"]
        self.image_size = size if isinstance(size, int) else size[0]
        self.mean, self.std = settings["mean"], settings["std"]

    @property
    def width(self) -> int:
        """Length of the embeddings, D."""
        return self.embed_texts(["a"]).shape[1]

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """n texts → float32 [n, D], rows of length 1."""
        device = next(self.model.parameters()).device
        return normalize(self.model.encode_text(self.tokenizer(list(texts)).to(device)).float(), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] of any S → float32 [B, D], rows of length 1."""
        device = next(self.model.parameters()).device
        size = (self.image_size, self.image_size)
        pixels = images.to(device).float() / 255
        if pixels.shape[-2:] != size:
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))
        return normalize(self.model.encode_image((pixels - mean) / std).float(), dim=-1)


class ClipSimilarity:
    """Cosine of each image and each of its labels; a distinct label is embedded once."""

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        self.clip = Clip(source)
        self.clip.model.to(device)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """
        Args:
            images: uint8 [B, 3, S, S].
            texts: for each image its labels; '' scores 0.
        """
        new = [text for text in dict.fromkeys(t for image in texts for t in image) if text and text not in self._texts]
        if new:
            self._texts.update(zip(new, self.clip.embed_texts(new), strict=True))
        rows_BD = self.clip.embed_images(images)
        return [
            [float(row_D @ self._texts[text]) if text else 0.0 for text in image]
            for row_D, image in zip(rows_BD, texts, strict=True)
        ]
