"""LoRA (Hu et al., 2021) through PEFT: adapters beside the linear layers of the decoder's blocks, merged on export."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nxtp.errors import UserError, at_least, nearest
from nxtp.model.weights import Spec, assign

_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."  # PEFT's names


@dataclass
class LoraConfig:
    """The adapters; a weight W becomes W + alpha / r · B A.

    ``r``        their rank
    ``alpha``    null: 2 r
    ``dropout``  of their input, in training
    ``target_modules``  the linear layers that have one, as [q_proj, v_proj]; null: all of a block
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        at_least("model.decoder.lora.r", self.r, 1)
        at_least("model.decoder.lora.alpha", self.alpha or 0, 0)
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.decoder.lora.dropout must be ≥ 0 and < 1, got {self.dropout}.")

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.r


def add_adapters(blocks: nn.ModuleList, config: LoraConfig) -> None:
    """Give the blocks' linear layers adapters that change nothing yet, on the blocks' device.

    Raises:
        UserError: PEFT is not installed; no block has such a linear layer.
    """
    known = [name.rpartition(".")[2] for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    known = list(dict.fromkeys(known))
    chosen = known if config.target_modules is None else list(config.target_modules)
    for name in chosen:
        if name not in known:
            raise UserError(
                f"model.decoder.lora.target_modules: no block has a linear layer '{name}'.{nearest(name, known)} "
                f"Known: {', '.join(known)}."
            )
    if not chosen:
        raise UserError("model.decoder.lora.target_modules is empty: name linear layers, or null for all.")
    try:
        import peft
    except ImportError:
        raise UserError("model.decoder.lora needs PEFT: pip install 'nxtp[lora]'.") from None
    alpha: Any = config.scale * config.r  # typed as an int, used as a number
    settings = peft.LoraConfig(r=config.r, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=chosen)
    peft.inject_adapter_in_model(settings, blocks)


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an adapter's."""
    return _A in name or _B in name


def without_adapters(name: str) -> str:
    """What a tensor beside an adapter is called without it."""
    return name.replace(_BASE, ".")


def start_adapters(module: nn.Module) -> None:
    """Draw the adapters as PEFT does, sharded or not: the same numbers however a model is filled."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            full = torch.zeros(parameter.shape, device="cpu")
            if _A in name:
                nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
            assign(parameter, full)


def merged(
    specs: Mapping[str, Spec], read: Callable[[str], Tensor], lora: LoraConfig | None
) -> tuple[dict[str, Spec], Callable[[str], Tensor]]:
    """Stored tensors with their adapters merged into the weights, each when it is read; without adapters as they are.

    Args:
        lora: None: there are no adapters.
    """
    if lora is None:
        return dict(specs), read
    own = {without_adapters(name): name for name in specs if not is_adapter(name)}

    def read_merged(name: str) -> Tensor:
        stored = own[name]
        weight, a, b = read(stored), stored.replace(_BASE, _A), stored.replace(_BASE, _B)
        if a == stored or a not in specs:  # beside no adapter; a bias
            return weight
        return (weight.float() + lora.scale * (read(b).float() @ read(a).float())).to(weight.dtype)

    return {name: specs[stored] for name, stored in own.items()}, read_merged
