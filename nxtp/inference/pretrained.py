"""Loading and saving a model: a directory here, or a repository on the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from huggingface_hub import ModelHubMixin
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.initialization import no_init_weights

from nxtp.config import to_dataclass
from nxtp.errors import UserError
from nxtp.inference import model_directory as model_dir
from nxtp.inference.calibration import Calibration, read_calibrations, write_calibrations
from nxtp.model import decoder
from nxtp.model.decoder import DecoderConfig, plain_config
from nxtp.model.lora import merged
from nxtp.model.meta import meta_model
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import LabelTokenizer
from nxtp.model.untrusted import in_one_line
from nxtp.model.weights import SafetensorsFiles, Spec, full_tensor, mismatch, write_safetensors

log = logging.getLogger("nxtp")

EMBEDDING, HEAD = (f"decoder.lm.{name}" for name in (decoder.EMBEDDING, decoder.HEAD))
_MAX_TENSORS = 3_000  # while a model is built: with its text tower, and the blocks that are cut
PAPER = "https://arxiv.org/abs/2312.02142"
CARD = """---
{{ card_data }}
---

# {{ name }}

Object recognition as next token prediction ([paper]({{ paper_url }})): images in, ranked labels out.

```python
from nxtp import Recognizer

recognizer = Recognizer.from_pretrained("{{ name }}")
recognizer.predict("photo.jpg", top_k=5)
```

`nxtp predict photo.jpg --model {{ name }} --top-k 5`

## Where the weights come from

```yaml
{{ provenance }}
```
"""


class Pretrained(  # type: ignore[call-arg]  # the mixin takes these; its types are not followed
    ModelHubMixin, library_name="nxtp", tags=["image-tagging"], paper_url=PAPER, model_card_template=CARD
):
    """A model in evaluation mode with its tokenizer and configuration.

    ``provenance``    where the weights come from: run, code, objective, noun backend, data
    ``calibrations``  sampler → its calibration, from calibration.json; without one probabilities are the model's own
    """

    def __init__(
        self, model: Model, tokenizer: LabelTokenizer, config: ModelConfig, provenance: dict[str, Any] | None = None
    ):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.provenance = provenance or {}
        self.calibrations: dict[str, Calibration] = {}
        self._calibrated_weights: str | None = None  # their SHA-256
        self._is_int8 = False

    @property
    def device(self) -> torch.device:
        return self.model.image_token.device

    @property
    def image_size(self) -> int:
        """Pixels per side of the model's input, S."""
        return self.config.encoder.image_size

    def to_int8(self) -> Self:
        """Quantise all matrices to 8 bits in place, one scale per row. The model cannot be saved any more.

        Raises:
            UserError: torchao is not installed.
        """
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError:
            raise UserError("int8 weights need torchao: pip install 'nxtp[8bit]'.") from None
        quantize_(self.model, Int8WeightOnlyConfig())
        self._is_int8 = True
        return self

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model directory with a model card; returns the commit's URL.

        Args:
            options: private, token, branch, create_pr, commit_message, … of ``ModelHubMixin.push_to_hub``.
        """
        provenance = yaml.safe_dump(self.provenance or {"run": "unknown"}, sort_keys=False, allow_unicode=True).strip()
        card = {"name": repo_id, "provenance": provenance} | options.pop("model_card_kwargs", {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def save_pretrained(
        self,
        directory: str | Path,
        writes: bool = True,
        *,
        config: None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write a model directory, or replace one, in one rename. Calibrations go along if the weights are theirs.

        Args:
            writes: False on ranks that only contribute their shards of the weights.
            config, model_card_kwargs: from :meth:`push_to_hub`; with the latter a model card is written too.

        Raises:
            UserError: the weights are int8, or the directory contains other files.
        """
        if self._is_int8:
            raise UserError("A model with int8 weights cannot be saved: save the model it was made from.")
        directory = Path(directory)
        state = self.model.state_dict()
        if self.model.decoder.lm.config.tie_word_embeddings:
            del state[HEAD]
        specs = {name: Spec.of(tensor) for name, tensor in state.items()}
        specs, read = merged(specs, lambda name: full_tensor(state[name]), self.config.decoder.lora)
        weights = partial(write_safetensors, specs=specs, read=read)
        if not writes:
            weights(None)
            return directory
        rebuilt = rebuildable(self.config, self.model)
        model_dir.write_model_dir(directory, weights, self.tokenizer, rebuilt, self.provenance)
        written = model_dir.weights_sum(model_dir.read_config(directory))
        if written == self._calibrated_weights:
            write_calibrations(directory, written, self.calibrations)
        elif self.calibrations:
            log.warning("'%s' has no calibration: it was of other weights. Run nxtp calibrate.", directory)
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

        A local directory needs no training configuration and no network. No code from it is run.

        Args:
            device: "auto" is a GPU if there is one.
            verify: compare the files with the SHA-256 sums in config.yaml.

        Raises:
            UserError: a file is missing, altered or does not fit; names the file. Or there is no such device.
        """
        device = usable_device(device)
        directory = model_dir.locate(source)
        content = model_dir.read_config(directory)
        files = content.get("files") or {}
        with in_one_line(directory):
            if verify:
                model_dir.check_sizes(directory, files)
            config = to_dataclass(ModelConfig, content["model"], f"{directory / model_dir.CONFIG}: model")
            config.encoder = config.encoder.filled({})  # a directory from before these settings existed
            weights = SafetensorsFiles([directory / model_dir.WEIGHTS])
            rows, stored = fit(config, weights, directory)  # before anything is allocated or a large file is read
            if verify:
                model_dir.verify(directory, files)
            tokenizer = model_dir.read_tokenizer(directory, config.prompt)
            if max(tokenizer.tokenizer.get_vocab().values()) >= rows:
                raise UserError(f"'{directory}': its tokenizer has tokens beyond the model's {rows:,}.")
            with no_init_weights():  # every number comes from the file
                model = Model(config, load_pretrained=False)
            load_weights(model, weights, stored, directory)
            calibrations = read_calibrations(directory, model_dir.weights_sum(content))
        model.requires_grad_(False)
        found = cls(model.to(device=device, dtype=dtype), tokenizer, config, content.get("provenance"))
        found.calibrations, found._calibrated_weights = calibrations, model_dir.weights_sum(content)
        return found


def usable_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto" is a GPU if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # the latter of a PyTorch without CUDA
        accelerator, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
        usable = ["auto", "cpu", *(f"{accelerator}:{i}" for i in range(count))]
        raise UserError(f"No device '{device}' on this machine: use one of {', '.join(usable)}.") from None


def rebuildable(config: ModelConfig, model: Model) -> ModelConfig:
    """The configuration that builds the same shapes without the sources of the weights."""
    architecture = {**plain_config(model.decoder.lm.config), "num_hidden_layers": len(model.decoder.blocks)}
    return replace(
        config,
        encoder=replace(model.encoder.config, pretrained=None),
        decoder=DecoderConfig(config=architecture),
        tokenizer=None,
    )


def fit(config: ModelConfig, weights: SafetensorsFiles, directory: Path) -> tuple[int, dict[str, str]]:
    """How many tokens a model has, and the stored name of each of its tensors. Nothing is allocated.

    Raises:
        UserError: the configuration needs other sources, builds no model, or one of other tensors than the stored.
    """
    where = f"'{directory / model_dir.CONFIG}'"
    lm = config.decoder
    if config.encoder.pretrained or lm.source or lm.blocks or lm.lora or lm.depth is not None or config.tokenizer:
        raise UserError(f"{where} names a source beside its own files, or blocks of one.")
    described = lm.config or {}
    if any((described.get(key) or 0) > len(weights.specs) for key in ("num_hidden_layers", "num_labels")):
        raise UserError(f"{where} describes more blocks than {directory / model_dir.WEIGHTS} has tensors.")
    with _bounded(min(_MAX_TENSORS, 1_000 + 4 * len(weights.specs))):
        model = meta_model(config, None)
        with torch.device("meta"), torch.no_grad():  # widths that are right one by one may not fit together
            mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
            model.decoder(torch.empty(1, 2, model.decoder.width), torch.zeros(1, 2, dtype=torch.long), mask)
    stored = {name: name for name in weights.specs}
    if model.decoder.lm.config.tie_word_embeddings:  # a file may contain one of two tied tensors
        present = next((name for name in (HEAD, EMBEDDING) if name in stored), None)
        for name in (HEAD, EMBEDDING) if present else ():
            stored.setdefault(name, str(present))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    difference = mismatch(expected, {name: weights.specs[stored[name]].shape for name in stored})
    if difference:
        raise UserError(f"'{directory / model_dir.WEIGHTS}' does not fit its config.yaml: {difference}.")
    return model.decoder.vocab_size, stored


@contextmanager
def _bounded(most: int) -> Iterator[None]:
    """End the construction of a model of more than ``most`` tensors."""
    count = 0

    def register(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError(f"Its config.yaml builds a model of more than {most:,} tensors: it is not the file's.")

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def load_weights(model: Model, weights: SafetensorsFiles, stored: dict[str, str], directory: Path) -> None:
    """Fill ``model``, one tensor at a time, each cast to its parameter's dtype.

    Raises:
        UserError: a number is not finite.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(weights.read(stored[name]))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise UserError(f"'{directory}': {name} has numbers that are not finite; its weights are damaged.")
