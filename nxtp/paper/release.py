"""Published checkpoints in and out: their names, their RoPE order, the base weights that complete them.

The published release is a pickle whose ``model`` maps ``module.<name>`` to tensors; it holds the trained
parameters only. Its decoder rotates interleaved pairs of channels, Hugging Face's rotates halves, so the
rows of q and k are permuted head by head. Its vocabulary has two rows behind the tokenizer's: ``<|image|>``
and a padding row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxtp.config import to_dataclass
from nxtp.errors import UserError
from nxtp.inference import model_directory as model_dir
from nxtp.inference.model_directory import CONFIG, EMBEDDING, HEAD, WEIGHTS, mismatch, write_model_dir
from nxtp.model.decoder import DecoderConfig
from nxtp.model.flops import meta_model
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import PROMPT, LabelTokenizer
from nxtp.model.trainable import TrainableConfig
from nxtp.model.weights import PickledFile, SafetensorsFiles, Spec, write_safetensors
from nxtp.paper.base_weights import Entry, read_clip, read_llama
from nxtp.paper.release_names import LOGIT_SCALE, our_name, rotary_heads, their_name, to_halves, to_pairs
from nxtp.runs.atomic import atomic_file

APPENDED = 2  # vocabulary rows behind the tokenizer's: <|image|>, then the padding row


def read_release(path: Path) -> dict[str, Tensor]:
    """All of a released pickle's ``model``, in memory.

    Raises:
        UserError: not such a file, or a pickle that holds more than tensors and plain values.
    """
    weights = PickledFile(path, keys=("model",))
    return {name: weights.read(name) for name in weights.specs}


def convert(released: Mapping[str, Tensor], *, heads: int, image_token_id: int) -> dict[str, Tensor]:
    """Released parameters → a state dict of :class:`nxtp.model.model.Model` (the part of it that the release holds).

    Args:
        heads: attention heads of the decoder (as many for keys as for queries).
        image_token_id: the vocabulary row of ``<|image|>``; it becomes the parameter ``image_token``.
    """
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in released.items()}
    entries = _entries(specs, released.__getitem__, heads, heads, image_token_id)
    return {name: entry.read() for name, entry in entries.items()}


def _entries(
    specs: Mapping[str, Spec], read: Callable[[str], Tensor], heads: int, key_heads: int, image_token_id: int
) -> dict[str, Entry]:
    """Released tensors under our names, to be read one by one."""
    entries: dict[str, Entry] = {}
    for theirs, spec in specs.items():
        ours = our_name(theirs)
        if ours is None:
            continue
        count = rotary_heads(ours, heads, key_heads)
        if count is None:
            entries[ours] = Entry(spec, lambda name=theirs: read(name))
        else:
            entries[ours] = Entry(spec, lambda name=theirs, count=count: to_halves(read(name), count))
        if ours == EMBEDDING and image_token_id < spec.shape[0]:
            row = Spec(spec.shape[1:], spec.dtype)
            entries["image_token"] = Entry(row, lambda name=theirs: read(name)[image_token_id].clone())
    return entries


@dataclass
class Converted:
    """What a conversion made: parameters by where they come from, and bytes written."""

    from_release: int
    from_clip: int
    from_llama: int
    bytes: int


def import_release(
    checkpoint: Path,
    *,
    llama: Path,
    clip: str,
    tokenizer: Path | str,
    to: Path,
    dtype: torch.dtype | None = None,
    prompt: str = PROMPT,
    track: Callable = iter,
) -> Converted:
    """A released checkpoint and the base weights that it was trained from → a model directory.

    Tensors are read and written one by one; the largest one is all that is held in memory. Without ``dtype`` every
    tensor keeps its own, so that nothing is rounded.

    Args:
        checkpoint: the released pickle. Its decoder blocks say how deep the model is.
        llama: a Hugging Face directory, or Meta's ``consolidated.00.pth`` (or its directory).
        clip: a weight file of the encoder, or an open_clip tag (``openai``) of ViT-L-14.
        tokenizer: a directory, a hub name, or LLaMA's ``tokenizer.model``.
        track: wraps the list of tensors, to show progress.

    Raises:
        UserError: a file that cannot be read, or parts that do not fit each other; names every such parameter.
    """
    released = PickledFile(checkpoint, keys=("model",))
    unknown = [name for name in released.specs if not _is_known(name)]
    if unknown:
        raise UserError(f"'{checkpoint}' has {len(unknown)} surplus parameters: {', '.join(unknown)}.")
    labels = load_tokenizer(tokenizer, prompt)
    lm, llama_entries = read_llama(llama)
    depth = _depth(released.specs, checkpoint)
    if depth > lm["num_hidden_layers"]:
        raise UserError(
            f"'{checkpoint}' has {depth} decoder blocks, '{llama}' only {lm['num_hidden_layers']}: another LLaMA."
        )
    heads = lm["num_attention_heads"]
    entries = _entries(released.specs, released.read, heads, lm.get("num_key_value_heads") or heads, len(labels))
    rows = (entries.get(EMBEDDING) or entries.get(HEAD) or llama_entries[EMBEDDING]).spec.shape[0]
    if rows != len(labels) + APPENDED:
        raise UserError(
            f"The checkpoint's vocabulary has {rows} rows; with the tokenizer '{tokenizer}' it should have "
            f"{len(labels)} + {APPENDED}: use the tokenizer that it was trained with."
        )
    encoder, clip_entries = read_clip(clip)
    config = ModelConfig(
        encoder=encoder,
        decoder=DecoderConfig(config={**lm, "num_hidden_layers": depth, "vocab_size": rows}),
        prompt=prompt,
    )
    shapes = _shapes(meta_model(config, None))
    needed = _needed(shapes, entries)
    told = mismatch(
        {name: shape for name, shape in shapes.items() if name in needed},
        {name: entry.spec.shape for name, entry in entries.items()},
    )
    if told:
        raise UserError(f"'{checkpoint}' does not fit '{llama}' and '{clip}': {told}.")
    base = {n: e for n, e in {**clip_entries, **llama_entries}.items() if n in shapes and n not in entries}
    rest = {name: shape for name, shape in shapes.items() if name not in entries}
    told = mismatch(rest, {name: entry.spec.shape for name, entry in base.items()})
    if told:
        raise UserError(f"'{llama}' and '{clip}' do not complete '{checkpoint}': {told}.")

    every = {**base, **entries}
    specs = {name: Spec(every[name].spec.shape, dtype or every[name].spec.dtype) for name in shapes}
    provenance: dict[str, Any] = {
        "released": Path(checkpoint).name,
        **{key: released.extra[key] for key in ("epoch", "global_step") if key in released.extra},
        "objective": "published",
        "nouns": "nltk_published",
        "trains": _trains(shapes, entries),
    }
    scale = next((n for n in released.specs if n.removeprefix("module.") == LOGIT_SCALE), None)
    if scale is not None:
        provenance["logit_scale"] = released.read(scale).item()
    write_model_dir(
        Path(to),
        lambda path: write_safetensors(path, specs, lambda name: every[name].read().to(specs[name].dtype), track),
        labels,
        config,
        provenance,
    )
    return Converted(
        len(entries),
        sum(n.startswith("encoder.") for n in base),
        sum(n.startswith("decoder.") for n in base),
        sum(spec.bytes for spec in specs.values()),
    )


def load_tokenizer(source: Path | str, prompt: str) -> LabelTokenizer:
    """The tokenizer of a release: the delimiter and the prompt's last word must be one token each.

    Raises:
        UserError: they are not, or no tokenizer is there.
    """
    tokenizer = LabelTokenizer.load(source, prompt)
    before, _, word = prompt.rpartition(" ")
    if tokenizer.encode_prompt(before) != tokenizer.prompt_ids[:-1]:
        raise UserError(
            f"The tokenizer '{source}' splits '{word}', the prompt's last word, into several tokens; "
            "labels start behind that one token in a released checkpoint: use the tokenizer it was trained with."
        )
    return tokenizer


def _is_known(name: str) -> bool:
    try:
        our_name(name)
    except UserError:
        return False
    return True


def _depth(names: Mapping[str, Any], checkpoint: Path) -> int:
    found = [re.search(r"language_decoder\.layers\.(\d+)\.", name) for name in names]
    blocks = {int(match[1]) for match in found if match}
    if not blocks:
        raise UserError(f"'{checkpoint}' has no decoder block: not a released checkpoint.")
    return max(blocks) + 1


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _part(name: str) -> str:
    """What is trained together or not at all: one block, or one parameter outside the blocks."""
    block = re.match(r"(.*\.(?:resblocks|layers)\.\d+)\.", name)
    return block[1] if block else name


def _needed(shapes: Mapping[str, Any], entries: Mapping[str, Entry]) -> set[str]:
    """What a release must hold: the new parameters, and the whole of every block of which it holds a part."""
    parts = {_part(name) for name in entries}
    return {name for name in shapes if _part(name) in parts or name in ("projection.weight", "image_token", EMBEDDING)}


def _trains(shapes: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any] | None:
    """The published parts that train, as :class:`nxtp.model.trainable.TrainableConfig` says it; None for another selection."""

    def last_blocks(prefix: str, stem: str) -> Any:
        own = {name for name in shapes if name.startswith(prefix)}
        if own <= entries.keys():
            return "all"
        numbers = {int(m[1]) for name in own if (m := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))}
        held = {n for n in numbers if any(name.startswith(f"{stem}.{n}.") for name in entries)}
        return len(held) if held == set(sorted(numbers)[len(numbers) - len(held) :]) else None

    encoder = last_blocks("encoder.visual.", "encoder.visual.transformer.resblocks")
    decoder = last_blocks("decoder.lm.model.layers.", "decoder.lm.model.layers")
    if encoder is None or decoder is None:
        return None
    return asdict(TrainableConfig(encoder=encoder, embedding=False, decoder=decoder, head=HEAD in entries))


def export_release(directory: Path, to: Path, everything: bool = False) -> int:
    """A model directory → a pickle that the published code loads; returns the number of parameters in it.

    Args:
        everything: all parameters instead of those that were trained (the directory says which, else all).

    Raises:
        UserError: a model whose architecture or vocabulary the published code does not have.
    """
    content = model_dir.read_config(directory)
    model_dir.verify(directory, content.get("files") or {})
    config = to_dataclass(ModelConfig, content["model"], f"{directory / CONFIG}: model")
    provenance = content.get("provenance") or {}
    trainable = None if everything else provenance.get("trains")
    meta = meta_model(config, None, to_dataclass(TrainableConfig, trainable, "trains") if trainable else None)
    unknown = [name for name in meta.state_dict() if name != "image_token" and their_name(name) is None]
    lm = meta.decoder.lm.config
    if unknown or lm.model_type != "llama":
        what = f"it has {', '.join(unknown[:3])}" if unknown else f"its decoder is a {lm.model_type}"
        raise UserError(f"'{directory}' cannot be loaded by the published code: {what}.")
    labels = LabelTokenizer.load(directory, config.prompt)
    if meta.decoder.vocab_size != len(labels) + APPENDED or lm.tie_word_embeddings:
        raise UserError(
            f"'{directory}' has {meta.decoder.vocab_size} vocabulary rows, the published code needs {APPENDED} behind "
            f"the tokenizer's {len(labels)}, and an output layer of its own: train with "
            f"model.decoder.config.vocab_size={len(labels) + APPENDED} and tie_word_embeddings=false."
        )
    weights = SafetensorsFiles([directory / WEIGHTS])
    chosen = [n for n, p in meta.named_parameters() if p.requires_grad and n != "image_token"]
    if EMBEDDING not in chosen:
        chosen.append(EMBEDDING)  # holds the row of <|image|>
    state: dict[str, Tensor] = {}
    for name in chosen:
        tensor = weights.read(name)
        count = rotary_heads(name, lm.num_attention_heads, lm.num_key_value_heads)
        if count is not None:
            tensor = to_pairs(tensor, count)
        elif name == EMBEDDING:
            tensor = tensor.clone()
            tensor[len(labels)] = weights.read("image_token")
        state[f"module.{their_name(name)}"] = tensor
    if "logit_scale" in provenance:
        state[f"module.{LOGIT_SCALE}"] = torch.tensor(provenance["logit_scale"])
    content = {"epoch": provenance.get("epoch", 0), "global_step": provenance.get("global_step", 0), "model": state}
    with atomic_file(Path(to)) as file:
        torch.save(content, file)
    return len(state)
