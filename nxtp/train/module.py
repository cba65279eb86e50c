"""LightningModule: training and validation steps, gradient clipping, and counts of samples seen and skipped."""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from nxtp.data.dataset import Batch, check_skipped, report_skipped
from nxtp.data.features.store import FeatureStore
from nxtp.distributed.checkpoints import OLD_FORMAT
from nxtp.distributed.fsdp2 import FSDP2Strategy
from nxtp.distributed.parallelize import ParallelConfig, parallelize, unsharded
from nxtp.distributed.ranks import gathered
from nxtp.errors import UserError
from nxtp.eval.embedders import label_embedder
from nxtp.eval.metrics import ExactMatch, SemanticMatch, meaningless, own_metrics
from nxtp.inference.pretrained import rebuildable
from nxtp.inference.recognizer import Recognizer
from nxtp.model.model import Loss, Model, ModelConfig
from nxtp.model.tokenizer import LabelTokenizer
from nxtp.model.trainable import choose_trainable
from nxtp.model.weights import full_tensor
from nxtp.sampling.one_shot import one_shot
from nxtp.sampling.ranking import RankingConfig, rank
from nxtp.sampling.samplers import never_first
from nxtp.train.optim import OptimConfig, build_optimizer, create_schedule

log = logging.getLogger("nxtp")


@dataclass
class ValidationConfig:
    """Metrics of the validation sets while training.

    ``top_k``     labels predicted per image, and the k of recall@k
    ``semantic``  encoder of semantic recall, precision and F1 (:func:`nxtp.eval.embedders.label_embedder`); None: skip
    ``metrics``   name → a further metric as its ``_target_`` and arguments (:func:`nxtp.eval.metrics.own_metrics`)
    """

    top_k: int = 10
    semantic: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


class Sums:
    """Numbers of a batch, copied to the host in the background; reading them does not wait for later work.

    Args:
        values: float32 [n], on the device.
        step: the optimizer step that the batch is for.
        samples: of this rank, as :attr:`Batch.names`.
    """

    def __init__(self, values: Tensor, step: int, samples: list[str]):
        self.step, self.samples = step, samples
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=values.is_cuda)
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


class RecognitionModule(L.LightningModule):
    """Trains a :class:`nxtp.model.model.Model` on a :class:`nxtp.data.dataset.Batch` per step.

    The loss is the mean over all supervised tokens of a step, over all ranks and accumulated batches: not a mean of
    means. A loss that is not finite stops the run and names the batch's samples.

    A step reads nothing back from the device, which would stop a GPU: what the host must know of a batch is copied
    without waiting and read at the next one (:class:`Sums`).

    ``stop_signal``: this rank's signal to stop (:mod:`nxtp.train.callbacks.preemption`), which each step's all-reduce
    shares; ``stop_agreed`` is true on all ranks after the same step, the one after the signal's.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: LabelTokenizer,
        optim: OptimConfig,
        *,
        validation: ValidationConfig | None = None,
        val_names: Sequence[str] = (),
        max_skip_fraction: float = 0.1,
        parallel: ParallelConfig | None = None,
        seed: int = 0,
        features: FeatureStore | None = None,
    ):
        super().__init__()
        self.model_config, self.tokenizer, self.optim_config = model, tokenizer, optim
        self.validation, self.val_names = validation or ValidationConfig(), list(val_names)
        self.max_skip_fraction, self.seed, self.features = max_skip_fraction, seed, features
        self.parallel = parallel or ParallelConfig()
        self.provenance: dict[str, Any] = {}  # of a model directory
        self.model: Any = None  # a Model, once it is configured
        self._gathered = ExitStack()  # the full weights, while validating
        self.stop_signal, self.stop_agreed = 0, False
        # Loss and supervised tokens of the step so far, tokens of its first batch; on the device, None between steps.
        self._step_sums: Any = None
        self._divisor: Any = None
        self._options: list[dict[str, Any]] = []  # of the optimizer's groups, as configured
        self._sums: Sums | None = None  # of the last batch, not read yet
        self._losses = nn.ModuleList(MeanMetric() for _ in self.val_names)
        k, semantic = self.validation.top_k, self.validation.semantic
        self._scores = nn.ModuleList(nn.ModuleDict({"exact": ExactMatch(top_k=k)}) for _ in self.val_names)
        if semantic:
            embedder = label_embedder(semantic)
            for scores in self._scores:
                scores["semantic"] = SemanticMatch(embedder, top_k=k)
        self._own = nn.ModuleList(
            nn.ModuleDict(own_metrics(self.validation.metrics, "validation.metrics")) for _ in self.val_names
        )
        self._warned: set[str] = set()
        self.skipped: Counter[str] = Counter()
        self.samples_read = self.samples_seen = 0
        self.loaded_step = 0  # of the last checkpoint that was loaded
        self.final_counts: dict[str, Any] | None = None  # of all ranks, after the training

    def configure_model(self) -> None:
        if self.model is not None:
            return
        trainer = self._trainer
        resuming = trainer is not None and trainer.ckpt_path is not None
        sharded = trainer is not None and isinstance(trainer.strategy, FSDP2Strategy)
        model = Model(self.model_config, len(self.tokenizer), load_pretrained=not resuming, deferred=sharded)
        choose_trainable(model, self.optim_config.trainable)
        if self.features is not None and model.encoder.is_trained:
            raise UserError("data.features needs a frozen encoder: set optim.trainable.encoder=none.")
        mesh = trainer.strategy.device_mesh["data_parallel"] if sharded else None
        self.model = parallelize(model, self.parallel, mesh, str(trainer.precision) if sharded else "")
        if not model.decoder.is_filled:
            model.decoder.fill(trainer.strategy.root_device, load_pretrained=not resuming)

    def forward(self, batch: Batch) -> Loss:
        """The loss of this rank's batch: a sum over its supervised tokens."""
        return self.model(batch.images, batch.layout)

    def on_train_start(self) -> None:
        # Not earlier: a run that resumes has the weights of its encoder only now.
        if self.features is not None:
            self.features.check(self.model.encoder)
        if self.loaded_step:
            self._restore_options()

    def _restore_options(self) -> None:
        """Give a resumed run its own learning rates, weight decay, … and schedule, at the step where it is.

        Lightning has loaded those of the run that saved the checkpoint.
        """
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        for group, options in zip(optimizer.param_groups, self._options, strict=True):
            group.pop("initial_lr", None)
            group.update(options)
        schedule = create_schedule(optimizer, self.optim_config, int(self.trainer.estimated_stepping_batches))
        with warnings.catch_warnings(action="ignore"):  # the optimizer has not made these steps in this process
            for _ in range(config.scheduler.last_epoch):
                schedule.step()
        config.scheduler = schedule

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # A step's random numbers (stochastic depth) do not depend on the steps before it, so that a resumed run draws
        # the same ones.
        place = f"{self.seed} {self.trainer.current_epoch} {batch_idx} {self.global_rank}"
        torch.manual_seed(zlib.crc32(place.encode()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.check_last_batch()
        self._count(batch)
        loss = self(batch)
        usable = len(batch) > 0
        mine = loss.total.detach() * usable
        sums = self._over_ranks(mine, loss.count * usable, self.stop_signal)
        self._sums = Sums(torch.cat([sums, mine[None]]), self.global_step, batch.names)
        tokens = sums[1].clamp(min=1)
        # Ranks average their gradients: times world_size is the sum. All batches that are accumulated for one step are
        # divided by the first one's tokens; on_before_optimizer_step corrects that.
        if self._divisor is None:
            self._divisor, self._step_sums = tokens, torch.zeros_like(sums[:2])
        self._step_sums += sums[:2]
        loss_of_step = self._step_sums[0] / self._step_sums[1].clamp(min=1)
        self.log("train/loss", loss_of_step)  # not prog_bar: Lightning reads such values at every step
        return loss.total * usable * (self._world_size / self._divisor)

    def check_last_batch(self) -> None:
        """Read the sums of the last batch: whether its loss is finite, and whether a rank has a signal to stop.

        Raises:
            UserError: the loss is not finite.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            return
        total, _, stop, mine = sums.read()
        if not math.isfinite(total):
            samples = "see another rank's error" if math.isfinite(mine) else "; ".join(sums.samples)
            raise UserError(
                f"The loss is {total} at step {sums.step}. Samples of the batch: {samples}. "
                "Check these samples, lower optim.lr, or use a wider trainer.precision."
            )
        self.stop_agreed = stop > 0

    def on_train_epoch_end(self) -> None:
        self.check_last_batch()

    @property
    def between_steps(self) -> bool:
        """Whether no batch has been accumulated for the next step."""
        return self._divisor is None

    def agree_to_stop(self) -> bool:
        """Whether any rank has a signal to stop; a collective call."""
        return bool(self._over_ranks(self.stop_signal)[0] > 0)

    @property
    def _world_size(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    def _over_ranks(self, *values: Any) -> Tensor:
        """Each value summed over all ranks, float32 [number of values], on the device."""
        kind = {"dtype": torch.float32, "device": self.device}
        stacked = torch.stack([v.to(**kind) if isinstance(v, Tensor) else torch.full((), v, **kind) for v in values])
        return self.trainer.strategy.reduce(stacked, reduce_op="sum") if self._world_size > 1 else stacked

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.accumulate_grad_batches > 1:
            # Lightning has divided each batch's loss by the number of batches per step.
            scale = self.trainer.accumulate_grad_batches * self._divisor / self._step_sums[1].clamp(min=1)
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], scale)
        self._step_sums = self._divisor = None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any] | None:
        self._count(batch, training=False)
        if len(batch) == 0:
            return None
        with torch.compiler.set_stance("force_eager"):  # each cache length, and each block with a cache, would compile
            loss, prefilled = self.model.evaluate(batch.images, batch.layout, self.tokenizer.prompt_ids)
            samples = one_shot(
                self.model,
                batch.images,
                prompt=self.tokenizer.prompt_ids,
                delimiter=self.tokenizer.delimiter_id,
                top_k=self.validation.top_k,
                never_first=never_first(self.model, self.tokenizer),
                prefilled=prefilled,
            )
        predictions = rank(samples, self.tokenizer.decode_label, RankingConfig(), self.validation.top_k)
        labels = [[label for label, _ in image] for image in predictions]
        for scores in (*self._scores[dataloader_idx].values(), *self._own[dataloader_idx].values()):
            scores.update(labels, batch.labels)
        self._losses[dataloader_idx].update(loss.nll_S)
        return {"predictions": predictions}

    def on_validation_epoch_start(self) -> None:
        self.check_last_batch()
        self._gathered.enter_context(unsharded(self.model, self.parallel.reshard_after_forward))

    def end_validation(self) -> None:
        """Free the weights that were gathered for it."""
        self._gathered.close()

    def on_validation_epoch_end(self) -> None:
        self.end_validation()
        for index, name in enumerate(self.val_names):
            values = {"loss": self._losses[index].compute()}
            self._losses[index].reset()
            for kind, scores in self._scores[index].items():
                prefix = "" if kind == "exact" else f"{kind}_"
                values |= {f"{prefix}{key}": value for key, value in scores.compute().items()}
                if kind == "exact":
                    self._warn_if_meaningless(name, list(values), scores.labels)
                scores.reset()
            for own, metric in self._own[index].items():
                values[own] = metric.compute()
                metric.reset()
            shown = f"recall@{self.validation.top_k}"
            for key, value in values.items():
                self.log(f"{name}/{key}", value, prog_bar=key == shown and index == 0, sync_dist=True)

    @rank_zero_only
    def _warn_if_meaningless(self, name: str, values: list[str], labels: int) -> None:
        found = meaningless(values, labels)
        if found and name not in self._warned:
            self._warned.add(name)
            log.warning(
                "Ignore %s: '%s' has %d different labels, all of which are predicted. Set validation.top_k=1.",
                ", ".join(f"{name}/{value}" for value in found), name, labels,
            )  # fmt: skip

    def configure_optimizers(self) -> dict[str, Any]:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("The learning-rate schedule needs an end: set trainer.max_steps or trainer.max_epochs.")
        fused = not (self._scales_loss and self.trainer.gradient_clip_val)  # which Lightning refuses
        optimizer, schedule = build_optimizer(self.model, self.optim_config, int(total), fused=fused)
        given = ({name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups)
        self._options = [options | {"lr": options.pop("initial_lr")} for options in given]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _scales_loss(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip as Lightning does (which refuses a fused AdamW), and log the norm over all ranks before clipping."""
        if gradient_clip_algorithm in (None, "norm") and not self._scales_loss:
            if gradient_clip_val:
                norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
                self.log("train/grad_norm", full_tensor(norm))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def recognizer(self) -> Recognizer:
        """The trained model, ready to predict and to be saved as a model directory."""
        return Recognizer(self.model, self.tokenizer, self.model_config, self.provenance)

    @cached_property
    def _recognizer_without_weights(self) -> dict[str, Any]:
        """What a model directory contains besides weights, as plain values: see :mod:`nxtp.deploy.export`."""
        return {
            "config": asdict(rebuildable(self.model_config, self.model)),
            "lora": asdict(self.model_config.decoder)["lora"],
            "tokenizer": self.tokenizer.files(),
            "provenance": self.provenance,
        }

    def _count(self, batch: Batch, training: bool = True) -> None:
        report_skipped(batch.examples, self.skipped)
        self.skipped.update(batch.skipped)
        self.samples_read += batch.samples_read
        self.samples_seen += len(batch) if training else 0
        if batch.skipped:
            check_skipped(self.skipped, self.samples_read, self.max_skip_fraction, at_least=100)

    def own_counts(self) -> dict[str, Any]:
        """Samples skipped (by kind), read and seen on this rank, since the start of the run."""
        return {"skipped": dict(self.skipped), "samples_read": self.samples_read, "samples_seen": self.samples_seen}

    def on_fit_end(self) -> None:
        self.final_counts = self.counts()

    def counts(self) -> dict[str, Any]:
        """The same over all ranks; a collective call."""
        every = gathered(self.own_counts())
        total = {key: sum(counts[key] for counts in every) for key in ("samples_read", "samples_seen")}
        return total | {"skipped": dict(sum((Counter(counts["skipped"]) for counts in every), Counter()))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_last_batch()
        checkpoint["counts"] = self.counts()
        checkpoint["recognizer"] = self._recognizer_without_weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "samples_read" not in checkpoint.get("counts", {}):
            raise UserError(f"The checkpoint is {OLD_FORMAT}.")
        if checkpoint["recognizer"]["tokenizer"] != self.tokenizer.files():
            raise UserError(
                "The checkpoint has another tokenizer, whose tokens have other numbers: "
                "model.tokenizer=runs/NAME/tokenizer takes that of run NAME."
            )
        if self.trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint:
            raise UserError("The checkpoint has the weights alone, as best.ckpt: resume from last.ckpt.")
        self.loaded_step = checkpoint["global_step"]
        if self.trainer.is_global_zero:  # the sum over all ranks continues on one of them
            counts = checkpoint["counts"]
            self.skipped = Counter(counts["skipped"])
            self.samples_read, self.samples_seen = counts["samples_read"], counts["samples_seen"]
        self._place_in_epoch(checkpoint)

    def _place_in_epoch(self, checkpoint: dict[str, Any]) -> None:
        """Lightning resumes at a batch index of the epoch: with another number of ranks it becomes another index.

        It counts an epoch in which max_steps or max_time ended the run as done: a longer run has its rest before it.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        position = checkpoint.get(type(data).__qualname__, {}).get("train")
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if position is None or loops is None:
            return
        current = loops["epoch_loop.batch_progress"]["current"]
        done, left = data.steps_of_epoch(position)
        if current["ready"]:
            shift = done - current["ready"]
            current.update({stage: count + shift for stage, count in current.items()})
        epochs = loops["epoch_progress"]["current"]
        if left and epochs["completed"] > position["epoch"]:
            epochs |= {"processed": position["epoch"], "completed": position["epoch"]}
