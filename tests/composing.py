"""Hydra's compositions at a third of their time: most tests wait for several."""

import os
import pickle

from hydra._internal import defaults_list
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import OmegaConf

_get_mode, _load, _parsed = Hydra.get_mode, OmegaConf.load, {}
_interpolation_map = defaults_list._create_interpolation_map


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


def interpolation_map(overrides, defaults, self_added):
    """Hydra creates the map at each file; it is read where a name in a defaults list refers to another."""
    if any(default.is_interpolation() for default in defaults):
        return _interpolation_map(overrides, defaults, self_added)
    return None


Hydra.get_mode, OmegaConf.load = get_mode, load
defaults_list._create_interpolation_map = interpolation_map
