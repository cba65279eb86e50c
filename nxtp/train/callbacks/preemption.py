"""When a run saves itself: every so many steps; and after a scheduler's warning or Ctrl-C, which it then follows."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from nxtp.errors import at_least

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Preempted(Exception):
    """The run has saved itself and stops. ``exit_code`` is the shell's convention for the signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class KeepLast(Checkpoint):
    """Saves the run's state every so many steps.

    Where a validation follows the step it waits for its end: what is restored later has been validated, and the best
    weights are known to it, as in a run that was never stopped.
    """

    def __init__(self, path: str | Path, every_n_train_steps: int):
        at_least("callbacks.last.every_n_train_steps", every_n_train_steps, 1)
        self.path, self.every = Path(path), every_n_train_steps
        self._saved, self._waits = 0, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        if trainer.global_step == self._saved or trainer.global_step % self.every:
            return
        self._waits = _validation_follows(trainer, n)
        if not self._waits:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._waits and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved, self._waits = trainer.global_step, False
        trainer.save_checkpoint(self.path, weights_only=False)


def _validation_follows(trainer: L.Trainer, batch: int) -> bool:
    """Whether Lightning validates after this batch of the epoch."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or not sum(trainer.num_val_batches or [1]):
        return False
    if trainer.check_val_every_n_epoch is not None and (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch:
        return False
    return trainer.is_last_batch if math.isinf(every) else (batch + 1) % every == 0


class PreemptionHandler(L.Callback):
    """Saves the last checkpoint and raises :class:`Preempted`, on all ranks after the same step.

    A handler only notes the signal; the module tells it to all ranks with the step's loss. A second one of the same
    kind does what it would have done without this class. A handler that was there before (submitit's, which puts the
    job back into the queue) is called once all is saved.

    Args:
        path: the checkpoint to write.
    """

    def __init__(self, path: Path):
        self.path = path
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        def note(number: int, frame: Any) -> None:
            module.stop_signal = number
            signal.signal(number, self._before[number])

        for number in SIGNALS:  # in place of Lightning's, which act at once, on each rank at another moment
            signal.signal(number, note)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if module.stop_agreed and module.between_steps:
            self._leave(trainer, module)

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        # within a step gradients would be lost: then the next training batch tells
        if trainer.state.fn == TrainerFn.FITTING and module.between_steps and module.agree_to_stop():
            module.end_validation()
            self._leave(trainer, module)

    def _leave(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        raise Preempted(module.stop_signal or signal.SIGTERM)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def hand_on(number: int) -> None:
    """Let the handler that was there before have the signal; without one nothing happens."""
    handler = signal.getsignal(number)
    if callable(handler) and number != signal.SIGINT:
        handler(number, None)
