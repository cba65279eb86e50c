"""What the tests' fork server does once, so that each forked command starts with it: libraries, tables, a grammar."""

# ruff: noqa: F401
import gc

import composing
import lightning
import open_clip
import s3fs  # by Lightning, where it is installed
import transformers.models.llama.modeling_llama

import nxtp.cli
import nxtp.data.datamodule
import nxtp.eval.command
import nxtp.eval.metrics
import nxtp.inference.recognizer
import nxtp.inference.streaming
import nxtp.sweep.sweep
import nxtp.train.command
from nxtp.config import composed
from nxtp.data.labels.nouns import noun_backend

composed("train", ["name=x"])  # Hydra's plugins and its grammar
noun_backend()("Two dogs leaped over fences.")
gc.set_threshold(20_000, 20, 20)
gc.freeze()  # forks leave these pages as they are
