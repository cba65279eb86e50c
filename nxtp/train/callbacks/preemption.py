"""Saves a run's state every N steps, and when a signal (a scheduler's warning, Ctrl-C) stops the run."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nxtp.errors import at_least
from nxtp.runs.processes import SIGNALS
from nxtp.train.callbacks.averaging import swap_back
from nxtp.train.module import RecognitionModule

TWICE_S = 1.0  # a second signal of the same kind within these seconds counts as the first one, sent twice


class Preempted(Exception):
    """The run stops. ``exit_code``: 128 + the signal's number, as in a shell."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.exit_code = number, 128 + number


def preempted_by(error: BaseException) -> Preempted | None:
    """The signal that stopped the run, if one did; before the first step and after the last, Lightning handles it."""
    if isinstance(error, Preempted):
        return error
    if isinstance(error, SIGTERMException):
        return Preempted(signal.SIGTERM)
    is_ctrl_c = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
    return Preempted(signal.SIGINT) if is_ctrl_c else None


class LastCheckpoint(Checkpoint):
    """Saves the run's state every ``every_n_train_steps`` optimizer steps.

    If a validation follows the step, it saves after the validation: a run that resumes then knows its best weights, as
    if it had never been stopped.
    """

    def __init__(self, path: str | Path, every_n_train_steps: int):
        at_least("callbacks.last.every_n_train_steps", every_n_train_steps, 1)
        self.path, self.every = Path(path), every_n_train_steps
        self._saved, self._is_due = 0, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        if trainer.global_step == self._saved or trainer.global_step % self.every:
            return
        self._is_due = _validation_follows(trainer)
        if not self._is_due:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._is_due and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved, self._is_due = trainer.global_step, False
        trainer.save_checkpoint(self.path, weights_only=False)


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    loop = trainer.fit_loop
    return bool(sum(trainer.num_val_batches or [1])) and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


class PreemptionHandler(L.Callback):
    """After a signal to any rank, saves the checkpoint ``path`` and raises :class:`Preempted` on all ranks.

    The handler only stores the signal in the module, whose next step shares it with all ranks along with the loss. The
    run stops after the step that follows, or in a validation before it. A second signal of the same kind has the effect
    that it had before the training, unless it comes within :data:`TWICE_S`: a scheduler and a parent process may both
    send one. A previous handler (submitit's requeues the job) is called after the checkpoint is saved:
    :func:`call_handler`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._previous: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        self._came: dict[int, float] = {}  # when the first signal of a kind came

    def on_train_start(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        def store(number: int, frame: Any) -> None:
            module.stop_signal = number
            if time.monotonic() - self._came.setdefault(number, time.monotonic()) > TWICE_S:
                signal.signal(number, self._previous[number])
                signal.raise_signal(number)

        for number in SIGNALS:  # instead of Lightning's handlers, which stop each rank at another step
            signal.signal(number, store)
        # They also broadcast at every step and wait for the device, for what the module's own all-reduce shares.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: RecognitionModule, outputs: Any, batch: Any, n: int
    ) -> None:
        if module.stop_agreed and module.between_steps and not _validation_follows(trainer):
            self._stop(trainer, module)

    def on_validation_batch_start(self, trainer: L.Trainer, module: RecognitionModule, *_: Any) -> None:
        # Between accumulated batches gradients would be lost: the run stops after the step.
        if trainer.state.fn == TrainerFn.FITTING and module.between_steps and module.agree_to_stop():
            # To Lightning, a validation that stopped within a batch, the first: a resumed run repeats all of it.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.increment_started()
            progress.reset_on_run()
            module.end_validation()
            swap_back(trainer, module)
            self._stop(trainer, module)

    def _stop(self, trainer: L.Trainer, module: RecognitionModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        module.final_counts = module.counts()
        trainer.strategy.checkpoint_io.wait()
        trainer.strategy.barrier()  # a rank that leaves has the others killed by Lightning, while they still write
        raise Preempted(module.stop_signal or signal.SIGTERM)

    def on_exception(self, *_: Any) -> None:
        self.on_fit_end()

    def on_fit_end(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def call_handler(number: int) -> None:
    """Call the handler that the signal had before the training, if there is one."""
    handler = signal.getsignal(number)
    if callable(handler) and number != signal.SIGINT:
        handler(number, None)
