"""The rows of `nxtp parity`: for each recorded result, what our model computes from the recorded inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nxtp.inference.pretrained import EMBEDDING
from nxtp.model.layout import PUBLISHED, Layout, lay_out
from nxtp.paper.parity_fixture import RANKED, Recording
from nxtp.paper.release_names import our_name
from nxtp.paper.rope_order import halves_from_pairs
from nxtp.sampling.autoregressive import BeamConfig, GreedyConfig, beam, greedy
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.one_shot import one_shot
from nxtp.sampling.ranking import RANKINGS, RankingConfig, rank


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
        self._texts: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    @property
    def tokens(self) -> dict[str, Any]:
        return {"prompt": self.recording.prompt, "delimiter": self.recording.delimiter}

    @cached_property
    def samples(self) -> Samples:
        top_k, steps = self.recording.meta["k"], self.recording.meta["max_update_iter"]
        return one_shot(self.model, self.images, **self.tokens, top_k=top_k, max_tokens=steps - 1)

    @cached_property
    @torch.inference_mode()
    def attention(self) -> list[Tensor]:
        """Of every block, over the prefix: [B, H, P, P]."""
        return self.model.prefix_attention(self.images, self.tokens["prompt"])

    def text(self, sampler: str, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities [B, max_new_tokens] of a running text, by the published rules."""
        if (sampler, max_new_tokens) not in self._texts:
            meta = self.recording.meta
            if sampler == "beam":
                config = BeamConfig(max_new_tokens=max_new_tokens, num_beams=meta.get("beams", 3), published=True)
                found = beam(self.model, self.images, config, **self.tokens)
            else:
                penalty = meta.get("repetition_penalty", 1.2) if sampler == "greedy_penalty" else 1.0
                greedy_config = GreedyConfig(max_new_tokens=max_new_tokens, repetition_penalty=penalty, published=True)
                found = greedy(self.model, self.images, greedy_config, **self.tokens)
            self._texts[sampler, max_new_tokens] = found
        return self._texts[sampler, max_new_tokens]

    @cached_property
    def layout(self) -> Layout:
        labels = recorded_labels(self.recording.expected, self.recording.delimiter)
        count = self.model.num_image_tokens
        return lay_out(labels, **self.tokens, num_image_tokens=count, objective=PUBLISHED)

    @cached_property
    def loss(self) -> Tensor:
        """Also leaves its gradients at the parameters."""
        loss = self.model(self.images, self.layout).mean
        self.model.zero_grad()
        loss.backward()
        return loss.detach()


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


Pair = tuple[Tensor, Tensor]  # ours and theirs, of equal shape


class Check(NamedTuple):
    """One row: the recorded tensors that it needs, the result last, and what turns that result into a pair."""

    name: str
    needs: tuple[str, ...]
    compare: Callable[[Ours, Tensor], Pair]


@torch.inference_mode()
def _image_tokens(ours: Ours, theirs: Tensor) -> Pair:
    """Class token and image tokens in the decoder's space, [B, 1 + N, D]."""
    return ours.model.projection(ours.model.encoder.forward_with_prefix(ours.images)), theirs


@torch.inference_mode()
def _first_logits(ours: Ours, theirs: Tensor) -> Pair:
    return ours.model.prefill(ours.images, ours.recording.prompt)[0], theirs


def _one_shot_tokens(ours: Ours, theirs: Tensor) -> Pair:
    compared = ~_ended(theirs, ours.recording.delimiter)
    return _as_wide(ours.samples.tokens_BKL, theirs, ours.recording.delimiter)[compared], theirs[compared]


def _one_shot_probs(ours: Ours, theirs: Tensor) -> Pair:
    # The token array may be wider: delimiters where the cap cut a label, without a probability.
    tokens = ours.recording.expected["one_shot_tokens"]
    compared = ~_ended(tokens, ours.recording.delimiter)[..., : theirs.shape[-1]]
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


@torch.inference_mode()
def _training_logits(ours: Ours, theirs: Tensor) -> Pair:
    real = ours.layout.segments_BT >= 0
    return ours.model.decoder.logits(ours.model.hidden(ours.images, ours.layout)[real]), theirs[real]


def _training_targets(ours: Ours, theirs: Tensor) -> Pair:
    """Every supervised token at its own position, -1 elsewhere."""
    layout = ours.layout
    targets_BT = torch.full_like(layout.segments_BT, -1)
    targets_BT.view(-1)[layout.sources[layout.pairs_S] + 1] = layout.targets_S
    return targets_BT, theirs


def _attention(ours: Ours, theirs: Tensor, block: str) -> Pair:
    if int(block) >= len(ours.attention):
        raise Skip(f"the model has {len(ours.attention)} blocks")
    return ours.attention[int(block)], theirs


def _text(ours: Ours, theirs: Tensor, sampler: str, index: int) -> Pair:
    if sampler == "beam":
        theirs = theirs[:, :-1]  # without the end of text, which is appended and not predicted
    return ours.text(sampler, theirs.shape[1])[index], theirs


def _ranked(ours: Ours, _: Tensor, name: str) -> Pair:
    """Labels with scores by one ranking, spelled as recorded."""
    recording = ours.recording
    if name not in RANKINGS:
        raise Skip("an unknown ranking")
    words = re.search(r"w\{i % (\d+)\}", recording.spelling)
    if words is None:
        raise Skip(f"unknown spelling in {RANKED}: {recording.spelling!r}")
    spell = lambda ids: "".join(f"w{i % int(words[1])}" for i in ids)  # noqa: E731
    config, theirs = RankingConfig(name, published=True), recording.ranked[name]
    mine = rank(ours.samples, spell, config, recording.meta["k"], model=ours.model, images=ours.images)
    for image, (ranked, recorded) in enumerate(zip(mine, theirs, strict=True)):
        labels = [label for label, _ in ranked]
        if labels != recorded["labels"]:
            raise Miss(f"image {image}: ours {', '.join(labels)}; recorded {', '.join(recorded['labels'])}")
    scores = torch.tensor([score for ranked in mine for _, score in ranked])
    rounded = torch.tensor([score for image in theirs for score in image["scores"]])
    rounding = 5.1e-6  # they are recorded with five digits
    return torch.where((scores - rounded).abs() <= rounding, rounded, scores), rounded


def _gradient(ours: Ours, theirs: Tensor, name: str) -> Pair:
    """Of the released parameter ``name``, its rows in our order."""
    _ = ours.loss
    parameters = dict(ours.model.named_parameters())
    own = "image_token" if name == "special_token_row" else our_name(name)
    if own not in parameters:
        raise Skip("our model has no such parameter")
    gradient = parameters[own].grad
    if own == EMBEDDING:
        gradient = gradient.clone()
        gradient[ours.recording.meta["ids"]["image_token"]] += ours.model.image_token.grad
    if name.endswith(("attention.wq.weight", "attention.wk.weight")):
        theirs = halves_from_pairs(theirs, ours.recording.meta["decoder"]["n_heads"])
    return gradient, theirs


def checks(recording: Recording) -> Iterator[Check]:
    """All rows, in order. To compare another kind of result, add an entry here."""
    expected = recording.expected
    prompt, training = ("prompt_ids",), ("prompt_ids", "train_tokens")
    yield Check("image tokens", ("image_tokens_with_cls",), _image_tokens)
    yield Check("first logits", (*prompt, "first_logits"), _first_logits)
    yield Check("one-shot tokens", (*prompt, "one_shot_tokens"), _one_shot_tokens)
    yield Check("one-shot probabilities", (*prompt, "one_shot_tokens", "one_shot_token_probs"), _one_shot_probs)
    yield Check("training targets", (*training, "train_targets"), _training_targets)
    yield Check("training logits", (*training, "train_logits"), _training_logits)
    yield Check("training loss", (*training, "train_loss"), lambda ours, theirs: (ours.loss, theirs))
    maps = [match[1] for name in expected if (match := re.fullmatch(r"attention_layer(\d+)", name))]
    for block in sorted(maps, key=int) or ["*"]:
        name = f"attention_layer{block}"
        yield Check(f"attention of block {block}", (*prompt, name), partial(_attention, block=block))
    for sampler, title in (("greedy", "greedy"), ("greedy_penalty", "greedy, penalty"), ("beam", "beam search")):
        yield Check(f"{title}: tokens", (*prompt, f"{sampler}_tokens"), partial(_text, sampler=sampler, index=0))
        if sampler != "beam":
            needs = (*prompt, f"{sampler}_token_probs")
            yield Check(f"{title}: probabilities", needs, partial(_text, sampler=sampler, index=1))
    for name in recording.ranked or ["*"]:
        yield Check(f"ranking {name}", prompt if recording.ranked else (RANKED,), partial(_ranked, name=name))
    for name in sorted(name for name in expected if name.startswith("grad/")) or ["grad/*"]:
        yield Check(name, (*training, name), partial(_gradient, name=name.removeprefix("grad/")))
