"""What an evaluation depends on, as its record has it."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from nxtp.errors import UserError
from nxtp.inference.model_directory import weights_hash

RANKS = ("accelerator", "devices", "num_nodes")  # what evaluation uses of a trainer


def recorded_settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration, and which weights ``model_dir`` has now; None if it cannot be read."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    if config.get("trainer"):
        config["trainer"] = {key: config["trainer"][key] for key in RANKS}
    try:
        return config | {"weights": weights_hash(cfg.model_dir)}
    except (UserError, OSError):
        return config | {"weights": None}
