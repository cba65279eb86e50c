"""A wrong metric in a callback is found before the training, not at its first validation."""

import sys
from types import SimpleNamespace

import lightning as L
import pytest
from helpers import composed

from nxtp.errors import UserError
from nxtp.train.command import build_trainer

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
        ([STOPPING % ("val_loss", "min")], r"^EarlyStopping of callbacks: .*Did you mean 'val/loss'"),
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
