"""A model as it is kept: a directory with weights, configuration and tokenizer, here or on the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from huggingface_hub import ModelHubMixin
from transformers.initialization import no_init_weights

from nxtp.config import to_dataclass
from nxtp.errors import UserError
from nxtp.inference import model_directory as model_dir
from nxtp.inference.model_card import CARD, PAPER
from nxtp.inference.model_directory import CONFIG, HEAD, WEIGHTS, load_weights, write_model_dir
from nxtp.model.decoder import plain_config
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import LabelTokenizer
from nxtp.model.weights import write_module


class Pretrained(ModelHubMixin, library_name="nxtp", tags=["image-tagging"], paper_url=PAPER, model_card_template=CARD):
    """A model in evaluation mode with its tokenizer and configuration; what to do with it: :class:`nxtp.Recognizer`.

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
        self._narrowed = False

    @property
    def device(self) -> torch.device:
        return self.model.image_token.device

    @property
    def image_size(self) -> int:
        return self.config.encoder.image_size

    def to_int8(self) -> Self:
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
    ) -> Self:
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
