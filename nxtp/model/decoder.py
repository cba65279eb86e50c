"""Truncated language model: the chosen blocks of a LLaMA-family causal LM, with its norm and output layer."""

from __future__ import annotations

import inspect
import json
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nxtp.errors import UserError, nearest
from nxtp.model.hub import reason, require_source
from nxtp.model.lora import LoraConfig, add_adapters, is_adapter, start_adapters, without_adapters
from nxtp.model.weights import MODEL_FILE, ComputesBuffers, SafetensorsFiles, assign, mismatch

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Causal LMs whose blocks take embeddings, rotary positions and a ready mask, as LLaMA does.
FAMILY = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3_text"]

KEEP = ("first", "last", "ends", "even")


@dataclass
class DecoderConfig:
    """Which language model, and which of its blocks are kept.

    ``source``       a local directory or Hub name with weights; null builds from ``config`` with random weights
    ``config``       fields of the Hugging Face configuration; with a ``source`` they override its own. Fields with a
                     ``model_type`` describe a whole decoder: a random one, which a ``source`` replaces, or the
                     ``source`` itself if ``_name_or_path`` names it, so that its configuration is not fetched
    ``depth``        keep this many blocks (of a random model: its number of blocks); null keeps all
    ``keep``         which: first, last, ends (half from either end), or even (every n/depth-th from the first on)
    ``blocks``       keep exactly these blocks of the source, e.g. [0, 1, 2, 31]; instead of ``depth``
    ``lora``         adapters, which train in place of the blocks' weights; null: none
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    depth: int | None = None
    keep: str = "first"
    blocks: list[int] | None = None
    lora: LoraConfig | None = None


class Decoder(ComputesBuffers):
    """Embedding, blocks, final norm and output layer; takes embeddings, positions and a ready mask.

    A model with a source is built on the meta device and then filled from it; without one it starts at random.

    Args:
        load_pretrained: read the source's weights; otherwise the caller loads them.
        deferred: leave a model with a source on the meta device: its caller shards it and then calls :meth:`fill`.

    Raises:
        UserError: not a LLaMA-family model, blocks or linear layers that it does not have, missing weights.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int | None = None,
        load_pretrained: bool = True,
        deferred: bool = False,
    ):
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.config = config
        architecture, self.kept_blocks = resolve(config, vocab_size)
        from_source = config.source is not None
        with torch.device("meta") if from_source else nullcontext():
            self.lm = AutoModelForCausalLM.from_config(architecture)
        self.lm.tie_weights()  # from_config does not where weights are not initialised
        self.lm.config.use_cache = False
        taken = inspect.signature(type(self.lm.model).forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"  # before transformers 5.24
        if config.lora is not None:
            add_adapters(self.lm.model.layers, config.lora)
        # Tied parameters must not leave the meta device in shards: they would no longer be tied.
        if from_source and not (deferred and not architecture.tie_word_embeddings):
            self.fill(torch.get_default_device(), load_pretrained)

    @property
    def is_filled(self) -> bool:
        return not any(parameter.is_meta for parameter in self.parameters())

    def fill(self, device: torch.device, load_pretrained: bool = True) -> None:
        """Allocate a model on the meta device, sharded or not, and load its source's weights tensor by tensor."""
        self.to_empty(device=device)
        self.lm.tie_weights()
        if load_pretrained and device.type != "meta" and self.config.source is not None:
            fill_blocks(self.lm, self.config.source, self.kept_blocks)
            start_adapters(self.lm)

    def compute_buffers(self) -> None:
        """RoPE's frequencies (in bfloat16 a position of 300 would be 299 or 301) and Gemma's embedding scale."""
        model = self.lm.model
        with torch.device(model.norm.weight.device):
            model.rotary_emb = type(model.rotary_emb)(config=self.lm.config)
            if (scale := getattr(model.embed_tokens, "scalar_embed_scale", None)) is not None:
                model.embed_tokens.embed_scale = torch.tensor(scale, dtype=torch.float32)

    @property
    def width(self) -> int:
        return self.lm.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    @property
    def window(self) -> int | None:
        """Tokens that a block was trained to look back at most; here it looks back as far as the mask allows."""
        return getattr(self.lm.config, "sliding_window", None)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.lm.model.layers

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] → [..., D]; scaled where the language model scales its embeddings, unlike image tokens."""
        return self.lm.model.embed_tokens(tokens)

    def forward(
        self, embeddings_BTD: Tensor, positions_BT: Tensor, mask: Tensor, cache: DynamicCache | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            embeddings_BTD: [B, T, D].
            positions_BT: int64 [B or 1, T] rotary positions.
            mask: bool [B or 1, 1, T, cached + T], True = may attend. It must contain causality, too.
            cache: keys and values of earlier tokens; this call appends its own.

        Returns:
            [B, T, D].
        """
        cached: dict[str, Any] = {} if cache is None else {self._cache_name: cache, "use_cache": True}
        return self.lm.model(
            inputs_embeds=embeddings_BTD, position_ids=positions_BT, attention_mask=mask, **cached
        ).last_hidden_state

    def attention(self, embeddings_BTD: Tensor, positions_BT: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, T, D], and every block's attention weights [B, H, T, T]; arguments as in :meth:`forward`.

        Only the eager implementation returns them, and it needs an additive mask.
        """
        dtype = embeddings_BTD.dtype
        added = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        fast = self.lm.config._attn_implementation
        self.lm.set_attn_implementation("eager")
        try:
            out = self.lm.model(
                inputs_embeds=embeddings_BTD,
                position_ids=positions_BT,
                attention_mask=added,
                use_cache=False,
                output_attentions=True,
            )
            return out.last_hidden_state, list(out.attentions)
        finally:
            self.lm.set_attn_implementation(fast)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] → float32 [..., V]."""
        return self.lm.lm_head(hidden).float()


def resolve(config: DecoderConfig, vocab_size: int | None = None) -> tuple[PreTrainedConfig, list[int]]:
    """The Hugging Face configuration of the truncated model, and the source's blocks it keeps, in order."""
    from transformers import AutoConfig

    fields = dict(config.config or {})
    described = fields.pop("_name_or_path", None)
    if config.source is not None and "model_type" in fields and described != config.source:
        fields = {}  # of another decoder
    if vocab_size is not None and config.source is None:
        fields.setdefault("vocab_size", vocab_size)
    _require_family(fields.get("model_type", "llama"))
    if config.source is not None:
        require_source(config.source, "model.decoder.source")
    elif not fields:
        raise UserError("model.decoder needs 'source' (a directory or Hub name) or 'config' (to start at random).")
    elif config.blocks is not None:
        raise UserError("model.decoder.blocks chooses blocks of a source; without one set model.decoder.depth.")
    try:
        if config.source is not None and "model_type" not in fields:
            where = f"model.decoder.source: no usable model in '{config.source}'"
            full = AutoConfig.from_pretrained(config.source, trust_remote_code=False, **fields)
        else:
            where = "model.decoder.config"
            if config.source is None and config.depth is not None:
                fields["num_hidden_layers"] = max(config.depth, fields.get("num_hidden_layers", 0))
            full = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    except Exception as error:  # transformers raises many types
        raise UserError(f"{where}: {reason(error)}") from error
    _require_family(full.model_type)
    full.vocab_size = max(full.vocab_size, vocab_size or 0)  # a source may have more rows than its tokenizer

    count = full.num_hidden_layers
    if config.blocks is not None and config.depth is not None:
        raise UserError("model.decoder: set 'depth' or 'blocks', not both.")
    if config.blocks is not None:
        kept = list(config.blocks)
    elif (config.depth or 0) > count:
        raise UserError(f"model.decoder.depth is {config.depth}, but '{config.source}' has {count} blocks.")
    else:
        kept = choose_blocks(count, count if config.depth is None else config.depth, config.keep)
    if not kept or len(set(kept)) != len(kept) or not all(0 <= block < count for block in kept):
        have = f"'{config.source}' has blocks 0 to {count - 1}, and each can be used once"
        raise UserError(f"model.decoder.blocks is {kept}, but {have}.")
    full.num_hidden_layers = len(kept)
    for name, value in full.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == count:  # one entry per block, whatever it is called
            setattr(full, name, [value[block] for block in kept])
    kinds = set(getattr(full, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UserError(f"model.decoder: blocks with {', '.join(kinds)}; only attention can follow the mask.")
    full.dtype = torch.float32
    full._attn_implementation = "sdpa"
    return full, kept


def choose_blocks(count: int, depth: int, keep: str) -> list[int]:
    """The numbers of ``depth`` of ``count`` blocks, in order.

    Raises:
        UserError: an unknown way to keep them.

    >>> [choose_blocks(8, 4, keep) for keep in KEEP]
    [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 6, 7], [0, 2, 4, 6]]
    """
    front = {"first": depth, "last": 0, "ends": (depth + 1) // 2}
    if keep == "even":
        return [place * count // depth for place in range(depth)]
    if keep not in front:
        raise UserError(f"model.decoder.keep is '{keep}'.{nearest(keep, KEEP)} Known: {', '.join(KEEP)}.")
    return [*range(front[keep]), *range(count - depth + front[keep], count)]


def _require_family(model_type: str) -> None:
    if model_type not in FAMILY:
        known = f"{nearest(model_type, FAMILY)} Known: {', '.join(FAMILY)}."
        raise UserError(f"model.decoder: '{model_type}' is not a LLaMA-family model.{known}")


def fill_blocks(lm: nn.Module, source: str, kept: list[int]) -> None:
    """Read the kept blocks, embedding, norm and output layer of a safetensors checkpoint; nothing else is read.

    Block ``kept[i]`` becomes block i. Vocabulary rows that the source lacks are drawn at random.

    Raises:
        UserError: the source lacks weights, or has them in another shape.
    """
    weights = SafetensorsFiles(weight_files(source))
    own = {without_adapters(name): tensor for name, tensor in lm.state_dict().items() if not is_adapter(name)}
    stored = {name: re.sub(r"^(model\.layers\.)(\d+)", lambda m: f"{m[1]}{kept[int(m[2])]}", name) for name in own}
    if lm.config.tie_word_embeddings and stored[HEAD] not in weights.specs:
        stored[HEAD] = EMBEDDING

    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: weights.specs[stored[name]].shape for name in own if stored[name] in weights.specs}
    for name in (EMBEDDING, HEAD):  # fewer rows fit
        rows, width = expected.get(name, (0, 0))
        if len(shape := found.get(name, ())) == 2 and shape[0] < rows and shape[1] == width:
            found[name] = expected[name]
    if problems := mismatch(expected, found):
        raise UserError(f"model.decoder.source: the weights in '{source}' do not fit its configuration: {problems}.")
    for name, parameter in own.items():
        full = weights.read(stored[name])
        if full.shape[0] < parameter.shape[0]:
            rows, width = parameter.shape[0] - full.shape[0], parameter.shape[1]
            generator = torch.Generator().manual_seed(torch.initial_seed())  # the same whenever the model is filled
            new = torch.empty(rows, width, device="cpu").normal_(std=lm.config.initializer_range, generator=generator)
            full = torch.cat([full, new.to(full.dtype)])
        assign(parameter, full)


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's configuration as plain fields, without its origin: what :class:`DecoderConfig` takes."""
    fields = {"model_type": config.model_type, **config.to_diff_dict()}
    for name in ("_name_or_path", "architectures", "transformers_version", "dtype", "use_cache", "auto_map"):
        fields.pop(name, None)
    return fields | {"vocab_size": config.vocab_size, "num_hidden_layers": config.num_hidden_layers}


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a directory or Hub name.

    Raises:
        UserError: it has none.
    """
    from transformers.utils.hub import cached_file

    def find(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)

    names = [MODEL_FILE]
    if not find(MODEL_FILE):
        index = find(f"{MODEL_FILE}.index.json")
        if index is None:
            raise UserError(f"model.decoder.source: '{source}' has no {MODEL_FILE} and no index of shards.")
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(find(name) or name) for name in names]
