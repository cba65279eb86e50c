"""A wrong metric in a callback is found before the training, not at its first validation."""

import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import composed

from nxtp.errors import UserError
from nxtp.eval.metrics import ExactMatch, SemanticMatch
from nxtp.train.command import build_trainer, metric_names

STOPPING = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: %s, mode: %s}"


def trainer(tmp_path, *overrides) -> L.Trainer:
    cfg = composed(tmp_path, "+data.val.val=x", *overrides)
    return build_trainer(cfg, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["callbacks.best.monitor=val/recal@10"],
            r"val/recal@10 is no metric\. Did you mean 'val/recall@10'\? .* val/f1@10",
        ),
        (["callbacks.best.monitor=val/recall@10", "validation.top_k=5"], r"Did you mean 'val/recall@5'"),
        (
            [STOPPING % ("val_loss", "min")],
            r"^callbacks\.stop\.monitor=val_loss is no metric\. Did you mean 'val/loss'",
        ),
        (["callbacks.best.monitor=val/loss"], r"val/loss with mode=max selects the worst: set mode=min"),
        ([STOPPING % ("val/hit@1", "min")], r"set mode=max"),
    ],
)
def test_a_wrong_monitor_is_found_at_the_start(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, *overrides)


def test_what_is_measured_may_be_monitored(tmp_path, monkeypatch):
    best = ["callbacks.best.monitor=val/loss", "callbacks.best.mode=min"]
    made = trainer(tmp_path, *best, STOPPING % ("val/hit@1", "max"))
    assert [c.monitor for c in made.callbacks if getattr(c, "monitor", None)] == ["val/hit@1", "val/loss"]
    mine = SimpleNamespace(Mine=type("Mine", (L.Callback,), {"__module__": "mine"}))  # may log a metric of its own
    monkeypatch.setitem(sys.modules, "mine", mine)
    trainer(tmp_path, "+callbacks.mine={_target_: mine.Mine}", STOPPING % ("val/mine", "max"))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_known_metrics_are_those_that_are_measured(tmp_path, k):
    cfg = composed(tmp_path, "+data.val.val=x", "validation.semantic=packaged", f"validation.top_k={k}")
    embedder = SimpleNamespace(embed=lambda labels: torch.ones(len(labels), 2) / 2**0.5)
    measured = {"train/loss", "val/loss"}
    for prefix, metric in (("", ExactMatch(k)), ("semantic_", SemanticMatch(embedder, k))):
        metric.update([["a"]], [["a"]])
        measured |= {f"val/{prefix}{name}" for name in metric.compute()}
    assert set(metric_names(cfg)) == measured
