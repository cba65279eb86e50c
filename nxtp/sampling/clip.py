"""A complete CLIP, image and text tower: it ranks labels by similarity, and embeds labels for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from nxtp.errors import UserError, nearest
from nxtp.model.hub import reason


class Clip:
    """An open_clip model in evaluation mode, float32, frozen.

    Args:
        source: ``ARCHITECTURE/TAG`` downloads (``ViT-L-14/openai``), ``ARCHITECTURE:FILE`` reads a local file. OpenAI's
            weights in a file need the architecture with QuickGELU: ``ViT-L-14-quickgelu:FILE``.

    Raises:
        UserError: an unknown architecture or tag, or an unusable file.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        import open_clip

        is_file = ":" in source
        name, _, weights = source.partition(":" if is_file else "/")
        if name not in open_clip.list_models():
            raise UserError(f"open_clip has no model '{name}'.{nearest(name, open_clip.list_models())}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if is_file and not Path(weights).is_file():
            raise UserError(f"No CLIP weights at '{weights}'.")
        if not is_file and weights not in tags:
            near = nearest(weights, tags)
            raise UserError(f"'{source}' names no weights of {name}: use {name}/TAG or {name}:FILE.{near}")
        try:
            self.model = open_clip.create_model(name, pretrained=weights, weights_only=True)
        except Exception as error:  # hubs and files raise many types
            raise UserError(f"No usable CLIP in '{source}': {reason(error)}") from error
        self.model.eval().requires_grad_(False).to(device)
        self.tokenizer = open_clip.get_tokenizer(name)
        settings = open_clip.get_model_preprocess_cfg(self.model)
        size = settings["size"]
        self.image_size = size if isinstance(size, int) else size[0]
        self.mean, self.std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """Length of the embeddings, D."""
        return self.embed_texts(["a"]).shape[1]

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """n texts → float32 [n, D], rows of length 1."""
        return normalize(self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] of any S → float32 [B, D], rows of length 1."""
        size = (self.image_size, self.image_size)
        pixels = images.to(self.device).float() / 255
        if pixels.shape[-2:] != size:
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        normalised = (pixels - self.mean.to(self.device)) / self.std.to(self.device)
        return normalize(self.model.encode_image(normalised).float(), dim=-1)


class ClipSimilarity:
    """Cosine of each image and each of its labels; embeds a distinct label once."""

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        self.clip = Clip(source, device)
        self._texts: dict[str, Tensor] = {"": torch.zeros(())}

    def __call__(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """
        Args:
            images: uint8 [B, 3, S, S].
            texts: labels of each image; '' scores 0.
        """
        new = list(dict.fromkeys(text for image in texts for text in image if text not in self._texts))
        if new:
            self._texts.update(zip(new, self.clip.embed_texts(new), strict=True))
        rows_BD = self.clip.embed_images(images)
        return [
            [float(row_D @ self._texts[text]) if text else 0.0 for text in image]
            for row_D, image in zip(rows_BD, texts, strict=True)
        ]
