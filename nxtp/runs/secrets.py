"""No secret in a configuration: it is written to the run's directory, to its record and to trackers."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from nxtp.errors import UserError

_KEYS = ("api_key", "apikey", "password", "secret", "access_token", "auth_token")
_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def refuse_secrets(config: Any, where: str = "") -> None:
    """Search a resolved configuration (nested dicts and lists), which is at the dotted key ``where``.

    Raises:
        UserError: a key that names a secret has a value, or a text contains the value of a secret environment
            variable. The message names the place, never the value.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            path = f"{where}.{key}" if where else str(key)
            if str(key).lower() in _KEYS and value:
                _refuse(path)
            refuse_secrets(key, where)
            refuse_secrets(value, path)
    elif isinstance(config, (list, tuple)):
        for index, value in enumerate(config):
            refuse_secrets(value, f"{where}[{index}]")
    elif isinstance(config, str):
        for name in _VARIABLES:
            secret = os.environ.get(name, "")
            if len(secret) >= 8 and secret in config:
                _refuse(where or "a key", f" (the value of {name})")


def _refuse(where: str, what: str = "") -> None:
    raise UserError(
        f"{where} contains a secret{what}, and a configuration is written to files: remove it. "
        "Set WANDB_API_KEY or HF_TOKEN in the environment, or use `wandb login`."
    )


@cache
def has_key() -> bool:
    """Whether W&B has a key: in the environment, its settings or .netrc. Nothing is prompted for or sent.

    Asked once: after the start of a run the client always denies it.
    """
    import wandb

    if os.environ.get("WANDB_MODE") == "offline":  # the client would only log that it cannot tell
        return False
    return wandb.login(prompt=False, verify=False)
