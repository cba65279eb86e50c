"""What a run costs: FLOPs, throughput, data wait, peak memory, model FLOPs utilisation."""

from __future__ import annotations

import resource
import time

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode

from nxtp.data import Batch
from nxtp.layout import Objective, lay_out
from nxtp.model import Model, ModelConfig
from nxtp.optim import TrainsConfig, choose_trained


def meta_model(config: ModelConfig, vocab_size: int | None, trains: TrainsConfig | None = None) -> Model:
    """The model's shapes without its numbers, on the meta device, in well under a second."""
    with torch.device("meta"):
        model = Model(config, vocab_size, load_pretrained=False)
    if trains is not None:
        choose_trained(model, trains)
    return model


def training_flops(model: Model, *, prompt_tokens: int = 7, labels: int = 8, label_tokens: int = 2) -> tuple[int, int]:
    """FLOPs of one image, (forward, backward), counted operator by operator on the meta device.

    Backward counts only where something trains. ``label_tokens`` is without the delimiter.
    """
    layout = lay_out(
        [[(0,) * label_tokens] * labels],
        prompt=[0] * prompt_tokens,
        delimiter=0,
        num_image_tokens=model.num_image_tokens,
        objective=Objective.MATCHED,
    ).to("meta")
    size = model.config.encoder.image_size
    images = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as forward:
        loss = model(images, layout).total
    with FlopCounterMode(display=False) as backward:
        if loss.requires_grad:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


class Throughput(L.Callback):
    """Logs images/s, tokens/s, the share of time spent waiting for data, peak memory, and MFU where it is known.

    Rates are over all ranks and over the steps since they were last logged; validation does not count.
    """

    def __init__(self, flops_per_image: float | None = None):
        self.flops_per_image = flops_per_image
        self._reset()
        self._last_end: float | None = None

    def _reset(self) -> None:
        self.images = self.tokens = 0
        self.waited = self.worked = 0.0

    def on_train_epoch_start(self, trainer, module) -> None:
        self._last_end = None

    def on_validation_end(self, trainer, module) -> None:
        self._last_end = None

    def on_train_batch_start(self, trainer, module, batch: Batch, batch_idx: int) -> None:
        self._start = time.perf_counter()
        if self._last_end is not None:
            self.waited += self._start - self._last_end

    def on_train_batch_end(self, trainer, module, outputs, batch: Batch, batch_idx: int) -> None:
        self.images += len(batch)
        self.tokens += batch.layout.num_tokens
        logs = trainer.global_step % trainer.log_every_n_steps == 0
        if logs and module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._last_end = time.perf_counter()
        self.worked += self._last_end - self._start
        if not logs:
            return
        seconds = self.waited + self.worked
        images_per_s = self.images / seconds * trainer.world_size
        values = {
            "perf/images_per_s": images_per_s,
            "perf/tokens_per_s": self.tokens / seconds * trainer.world_size,
            "perf/data_wait": self.waited / seconds,
            "perf/peak_memory_gb": peak_memory_bytes(module.device) / 1e9,
        }
        peak = self._peak_flops(trainer, module)
        if peak and self.flops_per_image:
            values["perf/mfu"] = images_per_s * self.flops_per_image / (peak * trainer.world_size)
        module.log("perf/images_per_s", values.pop("perf/images_per_s"), prog_bar=True)
        module.log_dict(values)
        self._reset()

    @staticmethod
    def _peak_flops(trainer, module) -> float | None:
        if module.device.type != "cuda":
            return None
        dtype = {"16": torch.float16, "bf": torch.bfloat16}.get(str(trainer.precision)[:2], torch.float32)
        return get_available_flops(module.device, dtype)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def count_parameters(model: Model) -> dict[str, int]:
    """Parameters by part, with those that train beside: ``encoder``, ``encoder_trained``, …, ``total``."""
    counts: dict[str, int] = {}
    for part in ("encoder", "projection", "image_token", "decoder", "total"):
        found = [p for n, p in model.named_parameters() if part == "total" or n.split(".")[0] == part]
        counts[part] = sum(p.numel() for p in found)
        counts[f"{part}_trained"] = sum(p.numel() for p in found if p.requires_grad)
    return counts
