"""What the tests' fork server does once, so that each forked command starts with it: libraries, tables, a grammar."""

# ruff: noqa: F401
import gc

import composing
import lightning
import open_clip
import s3fs  # by Lightning, where it is installed
import transformers.models.llama.modeling_llama
from helpers import TINY_OVERRIDES

import nxtp.cli
import nxtp.data.datamodule
import nxtp.eval.command
import nxtp.eval.metrics
import nxtp.inference.recognizer
import nxtp.inference.streaming
import nxtp.sweep.sweep
import nxtp.train.command
from nxtp.config import composed, to_dataclass
from nxtp.data.labels.nouns import noun_backend
from nxtp.model.meta import meta_model
from nxtp.model.model import ModelConfig

recipe = composed("train", ["name=x", *TINY_OVERRIDES])  # Hydra's plugins and its grammar
meta_model(to_dataclass(ModelConfig, recipe.model, "model"), None)  # a tower is looked at once
noun_backend()("Two dogs leaped over fences.")
gc.freeze()  # forks leave these pages as they are
