"""`nxtp parity DIR`: our numbers against those that the published implementation computed.

The directory holds ``release_format.pth`` (all parameters of a small model, in the released naming), ``meta.json``
(its dimensions and token ids) and ``expected.safetensors`` (inputs and results). A row compares one result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nxtp.decoder import DecoderConfig
from nxtp.encoder import EncoderConfig
from nxtp.errors import UserError
from nxtp.layout import Layout, Objective, lay_out
from nxtp.model import Model, ModelConfig
from nxtp.release import convert, our_name, read_release, to_halves
from nxtp.sampling import Samples, one_shot

TOLERANCE = 1e-4  # max |ours - theirs| / max |theirs|, float32
_STYLE = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


@dataclass
class Row:
    """One comparison.

    ``shape``    of what was compared, None if nothing was
    ``error``    max |ours - theirs| / max |theirs|; for tokens the share that differs; None if skipped
    ``verdict``  pass, fail or skipped
    ``reason``   why it was skipped or what failed, else empty
    """

    name: str
    shape: tuple[int, ...] | None
    error: float | None
    verdict: str
    reason: str = ""


@dataclass
class Recording:
    """What lies in a parity directory.

    ``meta``        dimensions, token ids, ``k`` and ``max_update_iter``
    ``parameters``  by released name, without ``module.``
    ``expected``    inputs and results by name; images in float32 [B, 3, S, S]
    """

    directory: Path
    meta: dict[str, Any]
    parameters: dict[str, Tensor]
    expected: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> Recording:
        """
        Raises:
            UserError: no such directory, or one of its files is missing or not what it should be.
        """
        if not directory.is_dir():
            raise UserError(f"'{directory}' is not a directory.")
        for name in ("meta.json", "release_format.pth", "expected.safetensors"):
            if not (directory / name).is_file():
                raise UserError(f"'{directory}' holds no {name}: not a recording of the published implementation.")
        try:
            meta = json.loads((directory / "meta.json").read_text())
        except ValueError as error:
            raise UserError(f"'{directory / 'meta.json'}' is not JSON: {error}") from error
        try:
            expected = load_file(directory / "expected.safetensors")
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{directory / 'expected.safetensors'}' cannot be read: {error}") from error
        released = read_release(directory / "release_format.pth")
        parameters = {name.removeprefix("module."): tensor for name, tensor in released.items()}
        return cls(directory, meta, parameters, expected)

    @property
    def delimiter(self) -> int:
        return self.meta["ids"]["delimiter"]

    @property
    def prompt(self) -> list[int]:
        """BOS and prompt, without ``<|image|>`` in front."""
        return self.expected["prompt_ids"].tolist()[1:]

    def model(self) -> Model:
        """The recorded model in ours, in evaluation mode.

        Raises:
            UserError: a dimension or parameter is missing, unknown, or does not fit.
        """
        try:
            config = model_config(self.meta, self.parameters)
            heads, image_token = self.meta["decoder"]["n_heads"], self.meta["ids"]["image_token"]
            state = convert(self.parameters, heads=heads, image_token_id=image_token)
            model = Model(config, load_pretrained=False).eval()
            mismatch = model.load_state_dict(state, strict=False)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"'{self.directory / 'meta.json'}' does not describe the model: {error!r}") from error
        except RuntimeError as error:
            lines = " ".join(str(error).split())
            raise UserError(f"'{self.directory}': parameters and meta.json do not fit: {lines}") from error
        for names, what in (
            (mismatch.missing_keys, "lacks"),
            (mismatch.unexpected_keys, "has more than meta.json says:"),
        ):
            if names:
                raise UserError(f"'{self.directory / 'release_format.pth'}' {what} {', '.join(names)}.")
        return model


def model_config(meta: dict[str, Any], parameters: dict[str, Tensor]) -> ModelConfig:
    """The recorded model's configuration; the width of its encoder's MLP is taken from the parameters."""
    tower, language = meta["encoder"], meta["decoder"]
    activation = tower.get("activation", "quickgelu")
    if activation not in ("quickgelu", "gelu"):
        raise UserError(f"meta.json: the encoder's activation is '{activation}'; known are quickgelu and gelu.")
    mlp = parameters["vision_encoder.transformer.resblocks.0.mlp.c_fc.weight"]
    vision = {
        "layers": tower["layers"],
        "width": tower["width"],
        "patch_size": tower["patch_size"],
        "head_width": tower["width"] // tower["heads"],
        "mlp_ratio": mlp.shape[0] / tower["width"],
    }
    decoder = {
        "model_type": "llama",
        "hidden_size": language["dim"],
        "intermediate_size": language["intermediate_size"],
        "num_hidden_layers": language["n_layers"],
        "num_attention_heads": language["n_heads"],
        "num_key_value_heads": language["n_heads"],
        "rms_norm_eps": language["norm_eps"],
        "rope_theta": language["rope_theta"],
        "vocab_size": language["vocab_size"],
        "pad_token_id": None,
    }
    quick_gelu = activation == "quickgelu"
    return ModelConfig(
        encoder=EncoderConfig(vision=vision, quick_gelu=quick_gelu, image_size=tower["image_size"]),
        decoder=DecoderConfig(config=decoder),
    )


class Skip(Exception):
    """A comparison that this recording does not allow; the message says why."""


class Ours:
    """What our model computes from a recording's inputs, each result at most once."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.model = recording.model()
        self.images = recording.expected["images"]

    @cached_property
    def image_tokens(self) -> Tensor:
        """Class token and image tokens in the decoder's space, [B, 1 + N, D]."""
        with torch.inference_mode():
            return self.model.projection(self.model.encoder.forward_with_prefix(self.images))

    @cached_property
    def first_logits(self) -> Tensor:
        with torch.inference_mode():
            return self.model.prefill(self.images, self.recording.prompt)[0]

    @cached_property
    def samples(self) -> Samples:
        meta = self.recording.meta
        return one_shot(
            self.model,
            self.images,
            prompt=self.recording.prompt,
            delimiter=self.recording.delimiter,
            top_k=meta["k"],
            max_tokens=meta["max_update_iter"] - 1,
        )

    @cached_property
    def layout(self) -> Layout:
        labels = recorded_labels(self.recording.expected, self.recording.delimiter)
        return lay_out(
            labels,
            prompt=self.recording.prompt,
            delimiter=self.recording.delimiter,
            num_image_tokens=self.model.num_image_tokens,
            objective=Objective.PUBLISHED,
        )

    @cached_property
    def training_logits(self) -> Tensor:
        with torch.inference_mode():
            return self.model.decoder.logits(self.model.hidden(self.images, self.layout))

    @cached_property
    def loss(self) -> Tensor:
        """Also leaves its gradients at the parameters."""
        loss = self.model(self.images, self.layout).mean
        self.model.zero_grad()
        loss.backward()
        return loss.detach()

    def gradient(self, name: str) -> Tensor:
        """Of the released parameter ``name``, in the released order of rows. The loss must have been computed."""
        _ = self.loss
        if name == "special_token_row":
            return self.model.image_token.grad
        ours = our_name(name)
        parameters = dict(self.model.named_parameters())
        if ours not in parameters:
            raise Skip("our model has no such parameter")
        gradient = parameters[ours].grad
        if ours == "decoder.lm.model.embed_tokens.weight":
            gradient = gradient.clone()
            gradient[self.recording.meta["ids"]["image_token"]] += self.model.image_token.grad
        return gradient


def recorded_labels(expected: dict[str, Tensor], delimiter: int) -> list[list[list[int]]]:
    """``train_tokens`` [B, U], padded with -1 → for each image its labels.

    Raises:
        Skip: other prompts than ``prompt_ids``, or a last label without delimiter.
    """
    prompt = expected["prompt_ids"].tolist()
    result = []
    for row in expected["train_tokens"].tolist():
        text = [token for token in row if token >= 0]
        if text[: len(prompt)] != prompt:
            raise Skip("train_tokens start with another prompt than prompt_ids")
        labels: list[list[int]] = [[]]
        for token in text[len(prompt) :]:
            if token == delimiter:
                labels.append([])
            else:
                labels[-1].append(token)
        if labels.pop():
            raise Skip("a last label without a delimiter (the published mask is defective there)")
        result.append(labels)
    return result


@dataclass
class Check:
    """One row: the recorded tensors that it needs, and a function that gives (ours, theirs) of equal shape."""

    name: str
    needs: tuple[str, ...]
    compare: Callable[[Ours, dict[str, Tensor]], tuple[Tensor, Tensor]]


def _one_shot_tokens(ours: Ours, expected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    theirs, delimiter = expected["one_shot_tokens"], ours.recording.delimiter
    compared = ~_ended(theirs, delimiter)
    return _as_wide(ours.samples.tokens_BKL, theirs, delimiter)[compared], theirs[compared]


def _one_shot_probs(ours: Ours, expected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    # The token array may be wider: delimiters where the cap cut a label, without a probability.
    theirs, delimiter = expected["one_shot_token_probs"], ours.recording.delimiter
    compared = ~_ended(expected["one_shot_tokens"], delimiter)[..., : theirs.shape[-1]]
    return _as_wide(ours.samples.probs_BKL, theirs, 1.0)[compared], theirs[compared]


def _ended(tokens: Tensor, delimiter: int) -> Tensor:
    """True behind a label's first delimiter."""
    is_delimiter = (tokens == delimiter).int()
    return is_delimiter.cumsum(dim=-1) > is_delimiter


def _as_wide(ours: Tensor, theirs: Tensor, value: float) -> Tensor:
    """``ours`` [B, K, L] cut or filled to the shape of ``theirs``."""
    if ours.shape[:2] != theirs.shape[:2]:
        raise Skip(f"meta.json asks for {ours.shape[1]} labels, {theirs.shape[1]} are recorded")
    result = torch.full_like(theirs, value)
    width = min(ours.shape[-1], theirs.shape[-1])
    result[..., :width] = ours[..., :width]
    return result


def _training_logits(ours: Ours, expected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    real = ours.layout.segments_BT >= 0
    return ours.training_logits[real], expected["train_logits"][real]


def checks(expected: dict[str, Tensor]) -> Iterator[Check]:
    """All rows, in order; a new kind of recorded result is one more entry."""
    training = ("prompt_ids", "train_tokens")
    yield Check(
        "image tokens",
        ("image_tokens_with_cls",),
        lambda ours, theirs: (ours.image_tokens, theirs["image_tokens_with_cls"]),
    )
    yield Check(
        "first logits",
        ("prompt_ids", "first_logits"),
        lambda ours, theirs: (ours.first_logits, theirs["first_logits"]),
    )
    yield Check("one-shot tokens", ("prompt_ids", "one_shot_tokens"), _one_shot_tokens)
    yield Check("one-shot probabilities", ("prompt_ids", "one_shot_tokens", "one_shot_token_probs"), _one_shot_probs)
    yield Check("training logits", (*training, "train_logits"), _training_logits)
    yield Check("training loss", (*training, "train_loss"), lambda ours, theirs: (ours.loss, theirs["train_loss"]))
    gradients = sorted(name for name in expected if name.startswith("grad/")) or ["grad/*"]
    for name in gradients:
        yield Check(name, (*training, name), lambda ours, theirs, name=name: _gradient(ours, theirs[name], name))


def _gradient(ours: Ours, theirs: Tensor, name: str) -> tuple[Tensor, Tensor]:
    released = name.removeprefix("grad/")
    if released.endswith(("attention.wq.weight", "attention.wk.weight")):
        theirs = to_halves(theirs, ours.recording.meta["decoder"]["n_heads"])
    return ours.gradient(released), theirs


def run_parity(directory: Path) -> list[Row]:
    """Compare everything that the directory records.

    Raises:
        UserError: the directory is unusable.
    """
    recording = Recording.read(Path(directory))
    if "images" not in recording.expected:
        raise UserError(f"'{recording.directory / 'expected.safetensors'}' holds no images: nothing can be compared.")
    ours = Ours(recording)
    return [_row(check, ours, recording) for check in checks(recording.expected)]


def _row(check: Check, ours: Ours, recording: Recording) -> Row:
    missing = [name for name in check.needs if name not in recording.expected]
    if missing:
        return Row(check.name, None, None, "skipped", f"not recorded: {', '.join(missing)}")
    try:
        mine, theirs = check.compare(ours, recording.expected)
    except Skip as reason:
        return Row(check.name, None, None, "skipped", str(reason))
    shape = tuple(theirs.shape)
    if mine.shape != theirs.shape:
        return Row(check.name, shape, None, "fail", f"ours has shape {tuple(mine.shape)}")
    error = difference(mine, theirs)
    passed = error <= TOLERANCE  # NaN fails
    return Row(check.name, shape, error, "pass" if passed else "fail", "" if passed else f"more than {TOLERANCE:g}")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; of integers the share that differs."""
    if not theirs.is_floating_point():
        return (ours != theirs).float().mean().item()
    largest = theirs.abs().max()
    error = (ours - theirs).abs().max()
    return (error / largest if largest > 0 else error).item()


def print_table(rows: list[Row], console: Console | None = None) -> None:
    table = Table(title=f"Ours against the published implementation (tolerance {TOLERANCE:g} relative)")
    table.add_column("result", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("max error", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        shape = "" if row.shape is None else "×".join(map(str, row.shape)) or "scalar"
        error = "" if row.error is None else f"{row.error:.1e}"
        name = Text(row.name)
        if row.reason:
            name.append(f"\n{row.reason}", "dim")
        table.add_row(name, shape, error, Text(row.verdict, _STYLE[row.verdict]))
    (console or Console()).print(table)


def main(directory: Path) -> int:
    """Print the table; 1 if a row missed or nothing could be compared, else 0."""
    rows = run_parity(directory)
    print_table(rows)
    compared = [row for row in rows if row.verdict != "skipped"]
    return 0 if compared and all(row.verdict == "pass" for row in compared) else 1
