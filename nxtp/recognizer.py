"""Recognizer: a trained model as its users keep it — a directory with weights, configuration and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import ModelHubMixin
from PIL import Image
from torch import Tensor
from transformers.initialization import no_init_weights

from nxtp import model_dir
from nxtp.attention import label_attention, patch_attention
from nxtp.clip import ClipSimilarity
from nxtp.config import to_dataclass
from nxtp.decoder import plain_config
from nxtp.errors import UserError
from nxtp.hub import CARD, PAPER
from nxtp.images import load_image
from nxtp.model import Model, ModelConfig
from nxtp.model_dir import CONFIG, HEAD, WEIGHTS, load_weights, write_model_dir
from nxtp.pixels import to_pixels
from nxtp.ranking import RankingConfig, rank, ranking_config
from nxtp.running_text import RunningTextConfig
from nxtp.samplers import SamplerConfig, sample, sampler_config
from nxtp.stream import WORKERS, Answer, Source, answers, batches
from nxtp.tokens import LabelTokenizer
from nxtp.vocabulary import Classes, Vocabulary, class_log_probs
from nxtp.weights import write_module

log = logging.getLogger("nxtp")

ImageLike = str | Path | bytes | Image.Image | Tensor | np.ndarray
Labels = list[tuple[str, float]]


class Recognizer(ModelHubMixin, library_name="nxtp", tags=["image-tagging"], paper_url=PAPER, model_card_template=CARD):
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
        self._clips: dict[str, ClipSimilarity] = {}
        self._told = self._narrowed = False

    @property
    def device(self) -> torch.device:
        return self.model.image_token.device

    @property
    def image_size(self) -> int:
        return self.config.encoder.image_size

    # Using it

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        top_k: int = 10,
        batch_size: int = 64,
        sampler: str | Mapping[str, Any] | SamplerConfig = "one_shot",
        ranking: str | Mapping[str, Any] | RankingConfig = "prob",
        allowed: Classes | Vocabulary | None = None,
    ):
        """Ranked labels with their probabilities.

        Args:
            images: one image or a list: a path, encoded bytes, a PIL image, or uint8 pixels ([H, W, 3] array
                or [3, H, W] tensor).
            top_k: labels an image, at most; fewer where several came out the same.
            batch_size: images computed together; the result does not depend on it (but where tokens are drawn).
            sampler: one_shot, exact, greedy, beam, or ``{"name": …}`` with settings; see :mod:`nxtp.samplers`.
            ranking: prob, ppl, sim_mean, sim_max, clip, none, or ``{"name": …}`` with settings; see
                :class:`nxtp.ranking.RankingConfig`. Other rankings than prob give their own scores.
            allowed: the only labels that one-shot sampling may write; :meth:`classify` gives the probability of each.

        Returns:
            ``[(label, probability), …]``, most probable first, for one image; a list of those for a list.

        Raises:
            ImageError: an image that cannot be read; names it.
            UserError: an unknown sampler, ranking or setting.
            ValueError: ``top_k`` below 1.
        """
        only = None if allowed is None else self.vocabulary(allowed)
        return self._each(images, batch_size, lambda pixels: self.predict_pixels(pixels, top_k, sampler, ranking, only))

    def predict_batches(
        self,
        source: str | Path | Iterable[ImageLike | tuple[str, ImageLike]],
        top_k: int = 10,
        batch_size: int = 64,
        sampler: str | Mapping[str, Any] | SamplerConfig = "one_shot",
        ranking: str | Mapping[str, Any] | RankingConfig = "prob",
        allowed: Classes | Vocabulary | None = None,
        workers: int = WORKERS,
        cache_dir: str | None = None,
    ) -> Iterator[Answer]:
        """:meth:`predict` for any number of images, read and decoded beside the model, two batches in memory.

        Args:
            source: a directory of images, one of shards, a shard, a glob or brace expression or URL of shards; or any
                iterable of images or (name, image) pairs.
            top_k, sampler, ranking, allowed: as in :meth:`predict`.
            batch_size: images computed together.
            workers: threads that decode.
            cache_dir: where remote shards are kept.

        Returns:
            An iterator of :class:`nxtp.stream.Answer` in the source's order. An image that cannot be used has an
            ``error`` in place of ``labels``; the others are done.

        Raises:
            UserError: at once, where shards are missing, or a sampler, ranking or setting is unknown.
        """
        how = sampler_config(sampler), ranking_config(ranking)
        only = None if allowed is None else self.vocabulary(allowed)
        found = Source.of(source, cache_dir)

        def label(pixels: Tensor) -> list[Labels]:
            return self.predict_pixels(pixels, top_k, *how, only)

        return answers(found, label, self.transform, batch_size, workers)

    def classify_batches(
        self,
        source: str | Path | Iterable[ImageLike | tuple[str, ImageLike]],
        labels: Classes | Vocabulary,
        top_k: int | None = None,
        batch_size: int = 16,
        workers: int = WORKERS,
        cache_dir: str | None = None,
    ) -> Iterator[Answer]:
        """:meth:`classify` for any number of images, as :meth:`predict_batches`.

        Raises:
            UserError: at once, where shards are missing, or a label has no tokens.
        """
        known = self.vocabulary(labels)
        found = Source.of(source, cache_dir)

        def label(pixels: Tensor) -> list[Labels]:
            return self.classify_pixels(pixels, known, top_k)

        return answers(found, label, self.transform, batch_size, workers)

    @torch.inference_mode()
    def embed(
        self,
        images: ImageLike | Sequence[ImageLike],
        space: str = "encoder",
        pool: bool = True,
        batch_size: int = 64,
    ) -> Tensor:
        """Images as vectors, for search, clustering or probes.

        Args:
            images: as in :meth:`predict`.
            space: encoder, the image tower's tokens [N, D_encoder]; or decoder, these projected into the language
                model's embedding space [N, D].
            pool: the mean of an image's N tokens; False: each token, row by row of the grid.
            batch_size: images computed together.

        Returns:
            float32 on the CPU, not normalised: [D] of one image, [B, D] of a list; without pooling [N, D], [B, N, D].

        Raises:
            ImageError: an image that cannot be read; names it.
            ValueError: an unknown space.
        """
        if space not in ("encoder", "decoder"):
            raise ValueError(f"space is '{space}': encoder or decoder, please")
        tokens_of = self.model.encoder if space == "encoder" else self.model.encode

        def vectors(pixels: Tensor) -> list[Tensor]:
            tokens_BND = tokens_of(pixels.to(self.device)).float().cpu()
            return list(tokens_BND.mean(dim=1) if pool else tokens_BND)

        found = self._each(images, batch_size, vectors)
        if isinstance(found, Tensor):
            return found
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.stack(found or vectors(blank))[: len(found)]

    def classify(
        self,
        images: ImageLike | Sequence[ImageLike],
        labels: Classes | Vocabulary,
        top_k: int | None = None,
        batch_size: int = 16,
    ):
        """The given labels with the probability of each under the model, most probable first.

        Exact: what scoring each label alone gives (:mod:`nxtp.vocabulary`). The probabilities are those among all
        labels that the model could write, so they do not add up to 1.

        Args:
            images, batch_size: as in :meth:`predict`.
            labels: each a text, or several names of one thing: their probabilities are added, the first is given.
                :meth:`vocabulary` prepares them once for many calls.
            top_k: so many of them; None: all.

        Returns:
            ``[(label, probability), …]`` for one image; a list of those for a list.

        Raises:
            ImageError: an image that cannot be read; names it.
            UserError: no labels, or one without tokens.
        """
        known = self.vocabulary(labels)
        return self._each(images, batch_size, lambda pixels: self.classify_pixels(pixels, known, top_k))

    def vocabulary(self, labels: Classes | Vocabulary) -> Vocabulary:
        """Labels as this model's tokens, for many calls.

        Raises:
            UserError: no labels, or one without tokens.
        """
        return labels if isinstance(labels, Vocabulary) else Vocabulary(labels, self.tokenizer)

    def _each(self, images: ImageLike | Sequence[ImageLike], batch_size: int, of: Callable[[Tensor], list[Any]]):
        """``of`` batches of pixels; one result for one image, a list for a list."""
        single = not isinstance(images, (list, tuple))
        every = [images] if single else list(images)
        result: list[Any] = []
        for some in batches(every, batch_size):
            result += of(torch.stack([self.transform(image) for image in some]))
        return result[0] if single else result

    def classify_pixels(self, images: Tensor, labels: Vocabulary, top_k: int | None = None) -> list[Labels]:
        """Labels of uint8 [B, 3, S, S], S = ``image_size``, on any device."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}: at least 1, please")
        if len(images) == 0:
            return []
        log_probs_BC = class_log_probs(self.model, images.to(self.device), labels, prompt=self.tokenizer.prompt_ids)
        count = len(labels.classes) if top_k is None else min(top_k, len(labels.classes))
        best = log_probs_BC.sort(dim=1, descending=True, stable=True)
        names = [classes[0] for classes in labels.classes]
        rows = zip(best.values[:, :count].exp().tolist(), best.indices[:, :count].tolist(), strict=True)
        return [[(names[c], p) for p, c in zip(*row, strict=True)] for row in rows]

    def predict_pixels(
        self,
        images: Tensor,
        top_k: int = 10,
        sampler: str | Mapping[str, Any] | SamplerConfig = "one_shot",
        ranking: str | Mapping[str, Any] | RankingConfig = "prob",
        allowed: Vocabulary | None = None,
    ) -> list[Labels]:
        """Labels of uint8 [B, 3, S, S], S = ``image_size``, on any device."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: at least 1, please")
        if len(images) == 0:
            return []
        images = images.to(self.device)
        order = ranking_config(ranking)
        config = sampler_config(sampler)
        if isinstance(config, RunningTextConfig) and self.provenance.get("objective") == "matched" and not self._told:
            log.warning("Greedy and beam search write running text, which a model of objective 'matched' never saw.")
            self._told = True
        only = None if allowed is None else allowed.allowed
        samples = sample(self.model, images, config, tokenizer=self.tokenizer, top_k=top_k, allowed=only)
        if samples.complete_B is not None and not samples.complete_B.all():
            log.warning(
                "Exact search gave up on %d of %d images after max_expansions: their labels are the best it found.",
                int((~samples.complete_B).sum()),
                len(images),
            )
        clip = self._clip(order.clip) if order.name == "clip" else None
        return rank(samples, self.tokenizer.decode_label, order, top_k, model=self.model, images=images, clip=clip)

    def _clip(self, source: str) -> ClipSimilarity:
        if source not in self._clips:
            self._clips[source] = ClipSimilarity(source, self.device)
        return self._clips[source]

    def transform(self, image: ImageLike) -> Tensor:
        """One image → the model's input pixels, uint8 [3, S, S]."""
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).cpu().numpy()
        if isinstance(image, np.ndarray):
            image = Image.fromarray(np.ascontiguousarray(image))
        return to_pixels(load_image(image, near=self.image_size), self.image_size)

    def attention(self, image: ImageLike, label: str) -> Tensor:
        """Where the model looks when it reads a label of its own: float32 [blocks, heads, tokens, rows, columns].

        Of each decoder block and head each token's weights on the grid of patches; :func:`nxtp.attention.average` makes
        one map of them. Any label will do, given or predicted.

        Raises:
            ImageError: an image that cannot be read.
            UserError: a label without tokens, or a tower whose tokens are no square grid.
        """
        (ids,) = self.tokenizer.encode_labels([label])
        if not ids:
            raise UserError(f"The label '{label}' has no tokens.")
        where = {"prompt": self.tokenizer.prompt_ids, "delimiter": self.tokenizer.delimiter_id}
        return label_attention(self.model, self.transform(image).to(self.device), ids, **where)

    def patch_attention(self, image: ImageLike) -> Tensor:
        """Attention of image tokens onto each other in the decoder: float32 [blocks, heads, N, N], row onto column.

        Raises:
            ImageError: an image that cannot be read.
        """
        return patch_attention(self.model, self.transform(image).to(self.device), prompt=self.tokenizer.prompt_ids)

    # Keeping it

    def to_int8(self) -> Recognizer:
        """Hold matrices' weights as 8-bit numbers, a scale a row, from now on: for use only. The same recognizer.

        A quarter of the memory; products are still in floating point.

        Raises:
            UserError: torchao is not installed.
        """
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError:
            raise UserError("int8 weights need torchao: pip install 'nxtp[8bit]'.") from None
        quantize_(self.model, Int8WeightOnlyConfig())
        self._narrowed = True
        return self

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model directory and a card to the hub; the address of the commit.

        Args:
            repo_id: "owner/name".
            options: private, token, branch, create_pr, commit_message, … of ``ModelHubMixin.push_to_hub``.
        """
        told = yaml.safe_dump(self.provenance or {"run": "unknown"}, sort_keys=False, allow_unicode=True).strip()
        card = {"name": repo_id, "provenance": told} | options.pop("model_card_kwargs", {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def save_pretrained(
        self,
        directory: str | Path,
        provenance: dict[str, Any] | None = None,
        writes: bool = True,
        *,
        config: None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write a model directory: aside first, then in one rename, over what was there.

        Args:
            provenance: in place of the model's own.
            writes: False on the ranks that only give their parts of a sharded model.
            config, model_card_kwargs: what :meth:`push_to_hub` passes: with the latter a card is written too.

        Raises:
            UserError: weights are int8.
        """
        if self._narrowed:
            raise UserError("A model with int8 weights is for use only: save the one it was made of.")
        directory = Path(directory)
        left_out = [HEAD] if self.model.decoder.lm.config.tie_word_embeddings else []
        if not writes:
            write_module(None, self.model, left_out)
            return directory
        write_model_dir(
            directory,
            lambda path: write_module(path, self.model, left_out),
            self.tokenizer,
            rebuildable(self.config, self.model),
            provenance if provenance is not None else self.provenance,
        )
        if model_card_kwargs is not None:
            self.generate_model_card(**model_card_kwargs).save(directory / "README.md")
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
        directory = model_dir.locate(source)
        content = model_dir.read_config(directory)
        if verify:
            model_dir.verify(directory, content.get("files") or {})
        config = to_dataclass(ModelConfig, content.get("model"), f"{directory / CONFIG}: model")
        tokenizer = LabelTokenizer.load(directory, config.prompt)
        with no_init_weights():  # every number comes from the file
            model = Model(config, load_pretrained=False)
        load_weights(model, directory / WEIGHTS)
        model.requires_grad_(False)
        if str(device) == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device=device, dtype=dtype), tokenizer, config, content.get("provenance"))


def rebuildable(config: ModelConfig, model: Model) -> ModelConfig:
    """The configuration that builds the same shapes without the sources the weights came from."""
    architecture = {**plain_config(model.decoder.lm.config), "num_hidden_layers": len(model.decoder.blocks)}
    return replace(
        config,
        encoder=replace(config.encoder, pretrained=None),
        decoder=replace(config.decoder, source=None, config=architecture, depth=None, keep="first", blocks=None),
        tokenizer=None,
    )
