"""Hydra's compositions at half their time: most tests wait for several."""

import os
import pickle

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import OmegaConf

_get_mode, _load, _parsed = Hydra.get_mode, OmegaConf.load, {}


def get_mode(self, config_name, overrides):
    """Hydra composes each command once more to learn its mode, also where the mode is given."""
    return RunMode.RUN if "hydra.mode=RUN" in overrides else _get_mode(self, config_name, overrides)


def load(file):
    """A file that has not changed since is not parsed again. Hydra opens it before; others give its path."""
    if not hasattr(file, "fileno"):
        return _load(file)
    state = os.fstat(file.fileno())
    key = (file.name, state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _parsed:
        _parsed[key] = pickle.dumps(_load(file))
    return pickle.loads(_parsed[key])


Hydra.get_mode, OmegaConf.load = get_mode, load
