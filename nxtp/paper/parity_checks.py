"""What `nxtp parity` compares: one function a row, ours beside the recorded numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nxtp.model.layout import Layout, Objective, lay_out
from nxtp.paper.parity_fixture import RANKED, Recording
from nxtp.paper.release_names import our_name, to_halves
from nxtp.sampling.autoregressive import BeamConfig, GreedyConfig, beam, greedy
from nxtp.sampling.one_shot import Samples, one_shot
from nxtp.sampling.ranking import RANKINGS, Labels, RankingConfig, rank


class Skip(Exception):
    """A comparison that this recording does not allow; the message says why."""


class Miss(Exception):
    """A comparison that fails without a number; the message says how."""


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
    def attention(self) -> list[Tensor]:
        """Of every block, over the prefix: [B, H, P, P]."""
        with torch.inference_mode():
            return self.model.prefix_attention(self.images, self.recording.prompt)

    def text(self, sampler: str, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities [B, max_new_tokens] of a running text, written the published way."""
        common = {"prompt": self.recording.prompt, "delimiter": self.recording.delimiter}
        if sampler == "beam":
            config = BeamConfig(max_new_tokens, num_beams=self.recording.meta.get("beams", 3), published=True)
            return beam(self.model, self.images, config, **common)
        penalty = self.recording.meta.get("repetition_penalty", 1.2) if sampler == "greedy_penalty" else 1.0
        config = GreedyConfig(max_new_tokens, repetition_penalty=penalty, published=True)
        return greedy(self.model, self.images, config, **common)

    def ranked(self, name: str) -> list[Labels]:
        """Labels with scores by one ranking, spelled as recorded."""
        found = re.search(r"w\{i % (\d+)\}", self.recording.spelling)
        if found is None:
            raise Skip(f"the spelling in {RANKED} is not known: {self.recording.spelling!r}")
        names = int(found[1])

        def spell(ids: Sequence[int]) -> str:
            return "".join(f"w{i % names}" for i in ids)

        config = RankingConfig(name, published=True)
        return rank(self.samples, spell, config, self.recording.meta["k"], model=self.model, images=self.images)

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


def _training_targets(ours: Ours, expected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Every supervised token at its own position, -1 elsewhere."""
    layout = ours.layout
    targets_BT = torch.full_like(layout.segments_BT, -1)
    targets_BT.view(-1)[layout.sources[layout.pairs_S] + 1] = layout.targets_S
    return targets_BT, expected["train_targets"]


def _attention(ours: Ours, theirs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    if block >= len(ours.attention):
        raise Skip(f"the model has {len(ours.attention)} blocks")
    return ours.attention[block], theirs


def _ranked(ours: Ours, name: str) -> tuple[Tensor, Tensor]:
    if name not in RANKINGS:
        raise Skip("not a ranking that is known")
    mine, theirs = ours.ranked(name), ours.recording.ranked[name]
    for image, (ranked, recorded) in enumerate(zip(mine, theirs, strict=True)):
        labels = [label for label, _ in ranked]
        if labels != recorded["labels"]:
            raise Miss(f"image {image}: ours {', '.join(labels)}; recorded {', '.join(recorded['labels'])}")
    scores = torch.tensor([score for ranked in mine for _, score in ranked])
    recorded = torch.tensor([score for image in theirs for score in image["scores"]])
    rounding = 5.1e-6  # they are recorded with five digits
    return torch.where((scores - recorded).abs() <= rounding, recorded, scores), recorded


def checks(recording: Recording) -> Iterator[Check]:
    """All rows, in order; a new kind of recorded result is one more entry."""
    expected = recording.expected
    training = ("prompt_ids", "train_tokens")
    prompt = ("prompt_ids",)
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
    yield Check("one-shot tokens", (*prompt, "one_shot_tokens"), _one_shot_tokens)
    yield Check("one-shot probabilities", (*prompt, "one_shot_tokens", "one_shot_token_probs"), _one_shot_probs)
    yield Check("training targets", (*training, "train_targets"), _training_targets)
    yield Check("training logits", (*training, "train_logits"), _training_logits)
    yield Check("training loss", (*training, "train_loss"), lambda ours, theirs: (ours.loss, theirs["train_loss"]))
    for name in _numbered(expected, "attention_layer"):
        block = name.removeprefix("attention_layer")
        yield Check(
            f"attention of block {block}",
            (*prompt, name),
            lambda ours, theirs, name=name, block=block: _attention(ours, theirs[name], int(block)),
        )
    for sampler, title in (("greedy", "greedy"), ("greedy_penalty", "greedy, penalty"), ("beam", "beam search")):
        tokens, probs = f"{sampler}_tokens", f"{sampler}_token_probs"
        yield Check(
            f"{title}: tokens",
            (*prompt, tokens),
            lambda ours, theirs, sampler=sampler, tokens=tokens: _text_tokens(ours, theirs[tokens], sampler),
        )
        if sampler != "beam":
            yield Check(
                f"{title}: probabilities",
                (*prompt, probs),
                lambda ours, theirs, sampler=sampler, probs=probs: (
                    ours.text(sampler, theirs[probs].shape[1])[1],
                    theirs[probs],
                ),
            )
    for name in recording.ranked or ["*"]:
        needs = (*prompt,) if recording.ranked else (RANKED,)
        yield Check(f"ranking {name}", needs, lambda ours, theirs, name=name: _ranked(ours, name))
    gradients = sorted(name for name in expected if name.startswith("grad/")) or ["grad/*"]
    for name in gradients:
        yield Check(name, (*training, name), lambda ours, theirs, name=name: _gradient(ours, theirs[name], name))


def not_compared(recording: Recording, every: Sequence[Check]) -> list[str]:
    """Recorded tensors that no row looks at."""
    used = {name for check in every for name in check.needs} | {"images"}
    return sorted(recording.expected.keys() - used)


def _numbered(expected: dict[str, Tensor], prefix: str) -> list[str]:
    found = [name for name in expected if re.fullmatch(rf"{prefix}\d+", name)]
    return sorted(found, key=lambda name: int(name.removeprefix(prefix))) or [f"{prefix}*"]


def _text_tokens(ours: Ours, theirs: Tensor, sampler: str) -> tuple[Tensor, Tensor]:
    if sampler != "beam":
        return ours.text(sampler, theirs.shape[1])[0], theirs
    # One more is recorded: the end of text, which is appended and not predicted.
    return ours.text("beam", theirs.shape[1] - 1)[0], theirs[:, :-1]


def _gradient(ours: Ours, theirs: Tensor, name: str) -> tuple[Tensor, Tensor]:
    released = name.removeprefix("grad/")
    if released.endswith(("attention.wq.weight", "attention.wk.weight")):
        theirs = to_halves(theirs, ours.recording.meta["decoder"]["n_heads"])
    return ours.gradient(released), theirs
