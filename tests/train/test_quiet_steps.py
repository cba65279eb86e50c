"""A training step that does not log reads nothing back from the device: each read would stop a GPU until it is idle."""

from collections import Counter

import lightning as L
import pytest
import torch
from helpers import tiny_config, write_shards
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.utils._python_dispatch import TorchDispatchMode

from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.dataset import Batch
from nxtp.data.transforms import ImageTransform
from nxtp.errors import UserError
from nxtp.model.layout import lay_out
from nxtp.model.tokenizer import train_tokenizer
from nxtp.train.callbacks.throughput import Progress, Throughput
from nxtp.train.module import RecognitionModule
from nxtp.train.optim import OptimConfig


class Reads(TorchDispatchMode):
    """Values read from tensors, by ``place()``."""

    def __init__(self, place):
        super().__init__()
        self.place, self.found = place, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero):
            self.found[self.place()] += 1
        return function(*args, **(kwargs or {}))


def trainer_and_parts(tmp_path, *callbacks, **options):
    shards = write_shards(tmp_path / "train", [40, 24])
    tokenizer = train_tokenizer(["rose", "lemon", "leaf", "ocean", "stone"], vocab_size=400)
    config = DataConfig(train=str(shards), batch_size=2, num_workers=0)
    data = WebDatasetDataModule(config, tokenizer, transform=ImageTransform(32), num_image_tokens=16)
    quiet = {"enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    trainer = L.Trainer(
        accelerator="cpu", gradient_clip_val=1.0, callbacks=list(callbacks), default_root_dir=tmp_path, **quiet,
        **{"max_epochs": 1, "logger": False} | options,
    )  # fmt: skip
    return trainer, RecognitionModule(tiny_config(), tokenizer, OptimConfig()), data


@pytest.mark.parametrize("accumulate", [1, 2])
def test_quiet_steps_read_nothing(tmp_path, accumulate):
    options = {"accumulate_grad_batches": accumulate, "max_steps": 6, "log_every_n_steps": 3}
    logger = CSVLogger(tmp_path)
    trainer, module, data = trainer_and_parts(tmp_path, Progress(), Throughput(), logger=logger, **options)
    with Reads(lambda: trainer.global_step) as reads:
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 6
    assert {step for step in reads.found if step > 0} == {3, 6}, reads.found


def test_lightnings_own_read_of_each_step_is_switched_off_by_its_name():
    """Of several ranks: :class:`nxtp.train.callbacks.preemption.PreemptionHandler` replaces it."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)


def test_a_batch_is_copied_without_waiting(monkeypatch):
    layout = lay_out([[(5, 6)]], prompt=[1, 2], delimiter=4, num_image_tokens=16)
    batch = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), layout, ["k"], ["s"], [["a"]], 1, Counter())
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: asked.append(options) or tensor)
    batch.to(torch.device("cuda"))
    assert len(asked) == 7
    assert all(options.get("non_blocking") for options in asked)
    asked.clear()
    batch.to(torch.device("mps"))
    assert not any(options.get("non_blocking") for options in asked), "not known to be safe there"


class Poison(L.Callback):
    """Makes the loss of a step NaN."""

    def __init__(self, step: int):
        self.step, self.keys = step, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.keys = batch.keys
            with torch.no_grad():
                module.model.image_token.fill_(float("nan"))


@pytest.mark.parametrize(("step", "max_steps"), [(3, 12), (7, 8)])
def test_a_loss_that_is_not_finite_names_its_own_samples(tmp_path, step, max_steps):
    """Asked one step later; after the last step, at the end."""
    poison = Poison(step)
    trainer, module, data = trainer_and_parts(tmp_path, poison, max_steps=max_steps, enable_progress_bar=False)
    with pytest.raises(UserError, match=rf"loss is nan at step {step}") as caught:
        trainer.fit(module, datamodule=data)
    assert all(key in str(caught.value) for key in poison.keys)


def test_no_checkpoint_of_a_loss_that_is_not_finite(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    trainer, module, data = trainer_and_parts(tmp_path, Poison(2), Save(), max_steps=5, enable_progress_bar=False)
    with pytest.raises(UserError, match="loss is nan at step 2"):
        trainer.fit(module, datamodule=data)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["1.ckpt", "2.ckpt"]
