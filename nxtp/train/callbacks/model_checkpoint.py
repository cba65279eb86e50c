"""Keeps the best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import callbacks


class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's, which forgets the best weights of a run whose directory was moved, and overwrites them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        old, new = str(state_dict.get("dirpath")), str(self.dirpath)

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {moved(key): score for key, score in value.items()}
            return value.replace(old, new, 1) if isinstance(value, str) else value

        if not Path(old).exists():
            state_dict = {name: moved(value) for name, value in state_dict.items()}
        super().load_state_dict(state_dict)
