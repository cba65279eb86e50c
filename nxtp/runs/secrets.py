"""Secrets do not belong into a configuration: it is written to the run's directory, to its record and to trackers."""

from __future__ import annotations

import os
from typing import Any

from nxtp.errors import UserError

_KEYS = ("api_key", "apikey", "password", "secret", "access_token", "auth_token")
_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def refuse_secrets(config: Any) -> None:
    """Look through a resolved configuration (nested dicts and lists) and the overrides that made it.

    Raises:
        UserError: a key that names a secret and has a value, or a text that holds the value of a secret environment
            variable. The message names the place, never the value.
    """
    held = {name: os.environ[name] for name in _VARIABLES if len(os.environ.get(name, "")) >= 8}
    _look(config, "", held)


def _look(node: Any, where: str, held: dict[str, str]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            path = f"{where}.{key}" if where else str(key)
            if str(key).lower() in _KEYS and value:
                _refuse(path)
            _look(key, where, held)
            _look(value, path, held)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            _look(value, f"{where}[{index}]", held)
    elif isinstance(node, str):
        for name, secret in held.items():
            if secret in node:
                _refuse(where or "a key", f" (the value of {name})")


def _refuse(where: str, what: str = "") -> None:
    raise UserError(
        f"{where} holds a secret{what}, and a configuration is written to files: remove it. "
        "Set WANDB_API_KEY or HF_TOKEN in the environment, or use `wandb login`."
    )


def has_key() -> bool:
    """Whether a W&B key is at hand: in the environment, W&B's settings or .netrc. It is not asked for, nor checked."""
    import wandb

    if os.environ.get("WANDB_MODE") == "offline":  # the client would only say that it cannot tell
        return False
    return wandb.login(prompt=False, verify=False)

