"""Throughput of a training run: images/s, tokens/s, data wait, padding, MFU and memory."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from nxtp.data.dataset import Batch
from nxtp.model.flops import Flops, ModelFlops, compute_dtype, peak_flops, peak_memory_bytes
from nxtp.model.meta import meta_model

log = logging.getLogger("nxtp")


class Throughput(L.Callback):
    """Logs the throughput since the last log, over all ranks, to every logger.

        perf/images_per_s     samples
        perf/tokens_per_s     tokens: image tokens included, padding excluded
        perf/data_wait        share of the time spent waiting for batches, on the rank that waited longest
        perf/unused           share of the samples read that batches lack: filtered by data.where, or skipped; if any
        perf/cache_hits       of remote shards: share of the samples that were there when they were read
        perf/download_mb_per_s  10⁶ bytes/s that were fetched of them
        perf/padding          share of the decoder's positions that are padding
        perf/tflops           model TFLOP/s per device: by formula, without padding and recomputation
        perf/mfu              the same as a share of the device's peak; missing if that is unknown
        perf/checkpoint_s     seconds that saving checkpoints held up the training, if one was saved
        perf/peak_memory_gb   since the start, on the rank that needs most; allocated on a GPU, resident on a CPU

    Validation and the start of an epoch are excluded. The GPU is synchronised only at a log, before a validation and at
    the end of an epoch.
    """

    def __init__(self, flops: ModelFlops | None = None):
        self.flops = flops
        self.line = ""  # the last log, as text
        self._mark: tuple[float, float] | None = None  # clock, and seconds waited for the loader until then
        self._step, self._saving_s = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self._read = self._images = self._tokens = self._positions = 0
        self._remote: Counter = Counter()
        self._flops = self._seconds = self._waited = 0.0

    def setup(self, trainer, module, stage: str) -> None:
        if self.flops is None:
            shape = meta_model(module.model_config, len(module.tokenizer), module.optim_config.trainable)
            self.flops = ModelFlops(shape)
            if module.features is not None:
                self.flops.encoder = Flops(0, 0)

    def _resume(self, trainer) -> None:
        self._mark = time.perf_counter(), getattr(trainer.train_dataloader, "waited", math.nan)

    def _pause(self, trainer, device: torch.device) -> None:
        if self._mark is None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock, waited = self._mark
        self._resume(trainer)
        self._seconds += self._mark[0] - clock
        self._waited += self._mark[1] - waited
        self._mark = None

    def on_train_epoch_start(self, trainer, module) -> None:
        self._mark, self._step = None, trainer.global_step

    def on_train_epoch_end(self, trainer, module) -> None:
        self._pause(trainer, module.device)

    def on_validation_start(self, trainer, module) -> None:
        self._pause(trainer, module.device)

    def on_validation_end(self, trainer, module) -> None:
        self._resume(trainer)

    def on_train_batch_start(self, trainer, module, batch: Batch, batch_idx: int) -> None:
        if self._mark is None:
            self._resume(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch: Batch, batch_idx: int) -> None:
        self._read += batch.samples_read
        if len(batch):
            self._images += len(batch)
            self._tokens += batch.layout.num_tokens
            assert self.flops is not None  # since setup
            self._flops += self.flops.of(batch.layout).total
        self._positions += batch.layout.segments_BT.numel()
        self._remote += batch.remote
        stepped, self._step = trainer.global_step != self._step, trainer.global_step  # not while accumulating
        if not stepped or trainer.global_step % max(trainer.log_every_n_steps, 1):
            return
        self._pause(trainer, module.device)
        values = self._together(trainer, module.device)
        self._reset()
        self._resume(trainer)
        saving_s = getattr(trainer.strategy.checkpoint_io, "pause_s", 0.0)
        if saving_s > self._saving_s:
            values["perf/checkpoint_s"], self._saving_s = saving_s - self._saving_s, saving_s
        module.log_dict(values)
        self.line = speed_line(values)
        if trainer.is_global_zero and not get_console().is_terminal:  # a progress bar is not visible
            log.info("step %d: %s", trainer.global_step, self.line)

    def _together(self, trainer, device: torch.device) -> dict[str, float]:
        """The values to log; one collective call."""
        remote = self._remote["reads"], self._remote["hits"], self._remote["bytes"] / 1e6
        sums = self._read, self._images, self._tokens, self._positions, self._flops / 1e12, *remote
        mine = torch.tensor([*sums, self._seconds, self._waited, peak_memory_bytes(device) / 1e9], device=device)
        every_RX = trainer.strategy.all_gather(mine).view(-1, len(mine)).cpu()
        read, images, tokens, positions, tflop, reads, hits, fetched_mb = every_RX[:, :8].sum(dim=0).tolist()
        seconds, waited, memory = every_RX[:, 8:].amax(dim=0).tolist()
        values = {
            "perf/images_per_s": images / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/padding": 1 - tokens / positions,
            "perf/tflops": tflop / seconds / trainer.world_size,
            "perf/peak_memory_gb": memory,
        }
        if not math.isnan(waited):
            values["perf/data_wait"] = waited / seconds
        if images < read:
            values["perf/unused"] = 1 - images / read
        if reads:
            values |= {"perf/cache_hits": hits / reads, "perf/download_mb_per_s": fetched_mb / seconds}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, compute_dtype(trainer.precision))
        if peak:
            values["perf/mfu"] = values["perf/tflops"] * 1e12 / peak
        return values


def speed_line(values: dict[str, float]) -> str:
    """The values of :class:`Throughput` as one line."""
    shown = {
        "perf/images_per_s": "{:,.0f} images/s",
        "perf/tokens_per_s": "{:,.0f} tokens/s",
        "perf/data_wait": "data wait {:.1%}",
        "perf/unused": "unused samples {:.1%}",
        "perf/cache_hits": "cache hits {:.1%}",
        "perf/download_mb_per_s": "{:,.1f} MB/s fetched",
        "perf/padding": "padding {:.1%}",
        "perf/mfu": "MFU {:.1%}",
        "perf/peak_memory_gb": "{:.2f} GB",
    }
    return " · ".join(text.format(values[key]) for key, text in shown.items() if key in values)


class Progress(RichProgressBar):
    """Lightning's progress bar, with the throughput at its end: in one line, which ends where the terminal does."""

    line = ""

    @property
    def total_train_batches(self) -> int | float:
        """Of the epoch, or what trainer.max_steps leaves of it."""
        trainer, batches = self.trainer, self.trainer.num_training_batches
        if trainer.max_steps < 0 or math.isinf(batches):
            return batches
        accumulated = trainer.accumulate_grad_batches
        before = trainer.current_epoch * math.ceil(batches / accumulated)
        return min(batches, (trainer.max_steps - before) * accumulated)

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")  # trainer.max_epochs is -1

    def configure_columns(self, trainer) -> list:
        description, bar, batches, time_left, _ = super().configure_columns(trainer)
        bar.bar_width = 10
        return [description, bar, batches, time_left, _Line(self)]

    def get_metrics(self, trainer, module) -> dict:
        if trainer.training and trainer.global_step % max(trainer.log_every_n_steps, 1):
            return {}  # reading the loss would wait for the device
        speed = next((c.line for c in trainer.callbacks if isinstance(c, Throughput)), "")
        loss = trainer.callback_metrics.get("train/loss")
        values = {"train/loss": float(loss)} if loss is not None else {}
        values |= {key: value for key, value in super().get_metrics(trainer, module).items() if key != "v_num"}
        shown = (
            f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        self.line = " · ".join([*shown, *filter(None, [speed])])
        return {}  # Lightning would break the line


class _Line(ProgressColumn):
    def __init__(self, bar: Progress):
        super().__init__()
        self.bar = bar

    def render(self, task: Task) -> Text:
        text = self.bar.line if task.id == self.bar.train_progress_bar_id else ""
        return Text(text, no_wrap=True, overflow="ellipsis")
