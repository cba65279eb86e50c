"""The closed vocabulary of `nxtp evaluate` and `nxtp calibrate`."""

from __future__ import annotations

from omegaconf import DictConfig

from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.sampling.closed_vocabulary import Vocabulary, read_classes
from nxtp.sampling.ranking import ranking_config
from nxtp.sampling.samplers import sampler_config


def closed_vocabulary(cfg: DictConfig, recognizer: Recognizer) -> Vocabulary | None:
    """The classes of ``cfg`` as token ids of the model; None without ``classes``.

    Raises:
        UserError: a sampler or ranking beside ``classes``, which has no effect; or a file that cannot be used.
    """
    if cfg.classes is None:
        return None
    if sampler_config(cfg.sampler) != sampler_config() or ranking_config(cfg.ranking) != ranking_config():
        raise UserError("classes=… gives every class its probability, without sampling: omit sampler and ranking.")
    return recognizer.prepare_classes(read_classes(cfg.classes))
