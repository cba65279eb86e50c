"""Released checkpoints in and out.

A published checkpoint is a pickle whose ``model`` maps ``module.<name>`` to tensors; it has the trained parameters
only. Names and RoPE order differ from ours (:mod:`nxtp.paper.release_names`, :mod:`nxtp.paper.rope_order`). Its
vocabulary has two rows behind the tokenizer's: ``<|image|>`` and a padding row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxtp.config import to_dataclass
from nxtp.errors import UserError
from nxtp.inference.model_directory import CONFIG, WEIGHTS, read_config, read_tokenizer, verify, write_model_dir
from nxtp.inference.pretrained import EMBEDDING, HEAD, fit
from nxtp.model.decoder import DecoderConfig
from nxtp.model.meta import meta_model
from nxtp.model.model import ModelConfig
from nxtp.model.tokenizer import PROMPT, LabelTokenizer
from nxtp.model.trainable import TrainableConfig
from nxtp.model.weights import SafetensorsFiles, Spec, mismatch, write_safetensors
from nxtp.paper.base_weights import Entry, count_blocks, published_entries, read_clip, read_llama
from nxtp.paper.release_names import LOGIT_SCALE, their_name
from nxtp.paper.rope_order import pairs_from_halves, rotated_heads
from nxtp.paper.weight_files import PickledFile
from nxtp.runs.atomic import atomic_file

APPENDED = 2  # vocabulary rows behind the tokenizer's: <|image|>, then the padding row
_BLOCK = re.compile(r"(.*\.(?:resblocks|layers)\.(\d+))\.")


@dataclass
class Converted:
    """Parameters by their source, and bytes written."""

    from_release: int
    from_clip: int
    from_llama: int
    bytes: int


def released_entries(released: PickledFile, heads: int, key_heads: int, image_token_id: int) -> dict[str, Entry]:
    """A released checkpoint's tensors under our names; row ``image_token_id`` of the vocabulary is ``image_token``.

    Raises:
        UserError: parameters that no release has; names all of them.
    """
    entries = published_entries(released, heads, key_heads)
    vocabulary = entries.get(EMBEDDING)
    if vocabulary is not None and image_token_id < vocabulary.spec.shape[0]:
        row = Spec(vocabulary.spec.shape[1:], vocabulary.spec.dtype)
        entries["image_token"] = Entry(row, lambda: vocabulary.read()[image_token_id].clone())
    return entries


def import_release(
    checkpoint: Path, *, llama: Path, clip: str, tokenizer: Path | str, to: Path, track: Callable = iter
) -> Converted:
    """A released checkpoint and the base weights that it was trained from → a model directory.

    Tensors are read and written one by one: memory must fit the largest one. Each keeps its type: nothing is rounded.

    Args:
        checkpoint: the released pickle; its decoder blocks give the model's depth.
        llama: a Hugging Face directory, or Meta's ``consolidated.00.pth`` (or its directory).
        clip: a weight file of the encoder, or an open_clip tag (``openai``) of ViT-L-14.
        tokenizer: a directory, a hub name, or LLaMA's ``tokenizer.model``.
        track: wraps the list of tensors, to show progress.

    Raises:
        UserError: an unreadable file, or parts that do not fit each other; names every such parameter.
    """
    released = PickledFile(checkpoint)
    labels = _load_tokenizer(tokenizer)
    lm, llama_entries = read_llama(llama)
    heads = lm["num_attention_heads"]
    entries = released_entries(released, heads, lm.get("num_key_value_heads") or heads, len(labels))
    depth = count_blocks(name for name in entries if name.startswith("decoder."))
    if not depth:
        raise UserError(f"'{checkpoint}' has no decoder block: not a released checkpoint.")
    if depth > (most := lm["num_hidden_layers"]):
        raise UserError(f"'{checkpoint}' has {depth} decoder blocks, '{llama}' only {most}: another LLaMA.")
    rows = (entries.get(EMBEDDING) or entries.get(HEAD) or llama_entries[EMBEDDING]).spec.shape[0]
    if rows != len(labels) + APPENDED:
        raise UserError(
            f"The checkpoint's vocabulary has {rows} rows; with the tokenizer '{tokenizer}' it should have "
            f"{len(labels)} + {APPENDED}: use the tokenizer that it was trained with."
        )
    encoder, clip_entries = read_clip(clip)
    decoder = DecoderConfig(config={**lm, "num_hidden_layers": depth, "vocab_size": rows})
    config = ModelConfig(encoder=encoder, decoder=decoder, prompt=PROMPT)
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config, None).state_dict().items()}
    rest = shapes.keys() - entries.keys()
    base = {name: entry for name, entry in {**clip_entries, **llama_entries}.items() if name in rest}
    _check_complete(shapes, entries, base, f"'{checkpoint}'", f"'{llama}' and '{clip}'")

    tensors = {**base, **entries}
    specs = {name: tensors[name].spec for name in shapes}
    provenance = _provenance(checkpoint, released, _trainable(shapes.keys(), entries.keys()))
    write = partial(write_safetensors, specs=specs, read=lambda name: tensors[name].read(), track=track)
    write_model_dir(to, write, labels, config, provenance)
    of_clip = sum(name.startswith("encoder.") for name in base)
    return Converted(len(entries), of_clip, len(base) - of_clip, sum(spec.bytes for spec in specs.values()))


def _check_complete(
    shapes: dict[str, tuple[int, ...]], entries: dict[str, Entry], base: dict[str, Entry], release: str, sources: str
) -> None:
    """Of the release: the new parameters, and the whole of every block of which it has a part. All else of the base.

    Raises:
        UserError: parameters are missing or of another shape; names them.
    """
    parts = {_part(name) for name in entries} | {"projection.weight", "image_token", EMBEDDING}
    needed = {name: shape for name, shape in shapes.items() if _part(name) in parts}
    rest = {name: shape for name, shape in shapes.items() if name not in entries}
    for expected, found, message in (
        (needed, entries, f"{release} does not fit {sources}"),
        (rest, base, f"{sources} do not complete {release}"),
    ):
        problems = mismatch(expected, {name: entry.spec.shape for name, entry in found.items()})
        if problems:
            raise UserError(f"{message}: {problems}.")


def _provenance(checkpoint: Path, released: PickledFile, trainable: dict[str, Any] | None) -> dict[str, Any]:
    provenance: dict[str, Any] = {
        "released": checkpoint.name,
        **{key: released.extra[key] for key in ("epoch", "global_step") if key in released.extra},
        "objective": "published",
        "nouns": "nltk_published",
        "trainable": trainable,
    }
    scale = next((name for name in released.specs if name.removeprefix("module.") == LOGIT_SCALE), None)
    return provenance if scale is None else provenance | {"logit_scale": released.read(scale).item()}


def _load_tokenizer(source: Path | str) -> LabelTokenizer:
    """The tokenizer of a release.

    Raises:
        UserError: it is missing, or the delimiter or the prompt's last word is not one token.
    """
    tokenizer = LabelTokenizer.load(source, PROMPT)
    before, _, word = PROMPT.rpartition(" ")
    if tokenizer.encode_prompt(before) != tokenizer.prompt_ids[:-1]:
        raise UserError(
            f"The tokenizer '{source}' splits '{word}', the prompt's last word, into several tokens; "
            "labels start behind that one token in a released checkpoint: use the tokenizer it was trained with."
        )
    return tokenizer


def _part(name: str) -> str:
    """The part that is trained as a whole or not at all: a block, or a parameter outside the blocks."""
    block = _BLOCK.match(name)
    return block[1] if block else name


def _trainable(names: Collection[str], released: Collection[str]) -> dict[str, Any] | None:
    """The released selection of parameters as a :class:`TrainableConfig`; None if it is not one of the last blocks."""

    def last_blocks(prefix: str) -> int | str | None:
        own = {name for name in names if name.startswith(prefix)}
        if own <= set(released):
            return "all"
        blocks = {name: int(match[2]) for name in own if (match := _BLOCK.match(name))}
        found = {number for name, number in blocks.items() if name in released}
        numbers = sorted(set(blocks.values()))
        return len(found) if found == set(numbers[len(numbers) - len(found) :]) else None

    encoder, decoder = last_blocks("encoder.visual."), last_blocks("decoder.lm.model.layers.")
    if encoder is None or decoder is None:
        return None
    return asdict(TrainableConfig(encoder=encoder, embedding=False, decoder=decoder, head=HEAD in released))


def export_release(directory: Path, to: Path, everything: bool = False) -> int:
    """A model directory → a pickle that the published code loads; returns the number of its parameters.

    Args:
        everything: all parameters instead of the trained ones (all, if the directory does not list these).

    Raises:
        UserError: a model whose architecture or vocabulary the published code does not have.
    """
    content = read_config(directory)
    verify(directory, content.get("files") or {})
    config = to_dataclass(ModelConfig, content["model"], f"{directory / CONFIG}: model")
    weights = SafetensorsFiles([directory / WEIGHTS])
    fit(config, weights, directory)
    provenance = content.get("provenance") or {}
    selection = provenance.get("trainable") or provenance.get("trains")  # the second in directories saved earlier
    if everything:
        selection = None
    meta = meta_model(config, None, to_dataclass(TrainableConfig, selection, "trainable") if selection else None)
    unknown = [name for name in meta.state_dict() if name != "image_token" and their_name(name) is None]
    lm = meta.decoder.lm.config
    unknown += ["model.pool=true"] * config.pool
    unknown += [f"model.attention={config.attention}"] * (config.attention != "independent")
    if unknown or lm.model_type != "llama":
        what = f"it has {', '.join(unknown[:3])}" if unknown else f"its decoder is a {lm.model_type}"
        raise UserError(f"'{directory}' cannot be loaded by the published code: {what}.")
    labels = read_tokenizer(directory, config.prompt)
    if meta.decoder.vocab_size != len(labels) + APPENDED or lm.tie_word_embeddings:
        raise UserError(
            f"'{directory}' has {meta.decoder.vocab_size} vocabulary rows, the published code needs {APPENDED} behind "
            f"the tokenizer's {len(labels)}, and an output layer of its own: train with "
            f"model.decoder.config.vocab_size={len(labels) + APPENDED} and tie_word_embeddings=false."
        )
    state: dict[str, Tensor] = {}
    for name, parameter in meta.named_parameters():
        if name == "image_token" or not (parameter.requires_grad or name == EMBEDDING):
            continue  # the row of <|image|> is in the embedding
        tensor = weights.read(name)
        heads = rotated_heads(name, lm.num_attention_heads, lm.num_key_value_heads)
        if heads is not None:
            tensor = pairs_from_halves(tensor, heads)
        elif name == EMBEDDING:
            tensor = tensor.clone()
            tensor[len(labels)] = weights.read("image_token")
        state[f"module.{their_name(name)}"] = tensor
    if "logit_scale" in provenance:
        state[f"module.{LOGIT_SCALE}"] = torch.tensor(provenance["logit_scale"])
    content = {"epoch": provenance.get("epoch", 0), "global_step": provenance.get("global_step", 0), "model": state}
    with atomic_file(to) as file:
        torch.save(content, file)
    return len(state)
