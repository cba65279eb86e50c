"""`nxtp train`: instantiate a composed configuration → fit → run record and model directory."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from nxtp.config import instantiated, to_dataclass
from nxtp.data.config import DataConfig, named_sources
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.features.store import FeatureStore
from nxtp.data.labels.from_samples import label_counts, warn_if_nouns_differ
from nxtp.data.mixture import OpenedSet, open_set
from nxtp.data.shards.manifest import manifest_hash
from nxtp.data.shards.urls import directory_of
from nxtp.data.transforms import ImageTransform
from nxtp.distributed.checkpoints import BackgroundCheckpoints
from nxtp.distributed.fsdp2 import FSDP2Strategy
from nxtp.distributed.parallelize import ParallelConfig
from nxtp.distributed.rendezvous import Ranks
from nxtp.distributed.start import StartTogether
from nxtp.errors import UserError, by_kind, nearest, one_line
from nxtp.eval.metrics import HIT_CUTS
from nxtp.model.layout import Objective
from nxtp.model.meta import count_parameters, meta_model
from nxtp.model.model import ModelConfig
from nxtp.model.tokenizer import LabelTokenizer, train_tokenizer
from nxtp.runs.atomic import atomic_directory
from nxtp.runs.lock import run_lock
from nxtp.runs.log import run_log
from nxtp.runs.processes import is_first_rank
from nxtp.runs.record import PREDICTIONS_FILE, RunRecord, read_record
from nxtp.runs.resume import MODES, PER_MACHINE, clear, find_checkpoint, last_checkpoint
from nxtp.runs.tracking import configured_loggers, end_tracking
from nxtp.train.callbacks.averaging import defer_average, keep_average
from nxtp.train.callbacks.early_stopping import EarlyStopping
from nxtp.train.callbacks.predictions import WritePredictions
from nxtp.train.callbacks.preemption import PreemptionHandler, call_handler, preempted_by
from nxtp.train.callbacks.run_record import FrequentLabels, RunRecordWriter
from nxtp.train.checks import check_machine, check_memory, check_settings
from nxtp.train.module import RecognitionModule, ValidationConfig
from nxtp.train.optim import OptimConfig

log = logging.getLogger("nxtp")

SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "validation": ValidationConfig,
    "parallel": ParallelConfig,
}


def train(cfg: DictConfig) -> float | None:
    """One run in one directory. Returns the recall on the first validation set, for sweepers; None without one."""
    filter_lightning_messages()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    overrides = list(HydraConfig.get().overrides.task)
    command, is_first = ["nxtp", "train", *overrides], is_first_rank()
    with run_lock(run_dir, command, cfg.lock_timeout) if is_first else nullcontext():
        checkpoint = find_checkpoint(run_dir, resolved)
        if checkpoint == "finished":
            log.info("%s contains this run, finished: nothing to do. Choose another name to train again.", run_dir)
            return None
        if cfg.resume == "restart" and is_first:
            clear(run_dir)
        with run_log(run_dir, command) if is_first else nullcontext():
            before = (read_record(run_dir) or {}).get("wall_time_s", 0.0) if checkpoint else 0.0
            record = RunRecord(cfg.name, resolved, overrides, cfg.seed, cfg.sweep, wall_time_s=before)
            return train_from(checkpoint, cfg, run_dir, record)


def train_from(checkpoint: str | None, cfg: DictConfig, run_dir: Path, record: RunRecord) -> float | None:
    """:func:`train` from a checkpoint or from the start; ``record`` is filled in and written."""
    try:
        cfg.data.val = cfg.data.val or {}
        if "train" in cfg.data.val:
            raise UserError("data.val.train: 'train' is the training set: give the validation set another name.")
        check_settings(cfg)
        check_machine(cfg)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        if cfg.matmul_precision is not None:
            torch.set_float32_matmul_precision(cfg.matmul_precision)
        trainer = build_trainer(cfg, run_dir)
        timeout = to_dataclass(ParallelConfig, cfg.parallel, "parallel").start_timeout
        start = StartTogether(trainer.strategy, timeout, setting="parallel.start_timeout")
        data, module = build(cfg, run_dir, start.ranks, resumes=checkpoint is not None)
        record.data = describe_data(data)
    except Exception as error:
        if cfg.sweep is not None and is_first_rank():  # for the sweep's status; otherwise nothing is written
            record.fail(error)
            record.write(run_dir)
        raise
    record.monitor = monitored(data.val_names, cfg.validation.top_k)
    module.provenance = {
        "run": record.name,
        "code": record.code,
        "objective": cfg.objective.name,
        "nouns": data.config.nouns,
        "data": record.data["train"],
    }
    for name, spec in {"train": data.config.train, **data.config.val}.items():
        warn_if_nouns_differ(name, spec, data.config.nouns, data.config.nouns)
    start.opened = opened_by_rank(record, module, checkpoint, data)
    writer = RunRecordWriter(run_dir, cfg, record)
    trainer.callbacks += [start, FrequentLabels(record, cfg.validation.top_k), writer]
    ranks = getattr(trainer.strategy.launcher, "procs", [])  # those that this process starts
    preempted = None
    try:
        with start.waiting():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        finish(run_dir, cfg, trainer, module, data, record)
        record.status = "finished"
    except BaseException as error:
        preempted = preempted_by(error)
        if preempted is None:
            if "`val_check_interval`" in str(error):  # more batches than an epoch has, which Lightning finds now
                error = UserError(f"trainer.val_check_interval: {one_line(error)}")
            record.fail(error)
            raise error
        record.status = "interrupted"
    finally:
        left = ranks[:]
        ranks.clear()  # in Lightning's list, a rank that has ended would have this process killed
        counts = module.final_counts or module.own_counts()
        record.samples_seen, record.samples_read = counts["samples_seen"], counts["samples_read"]
        record.samples_skipped = counts["skipped"] | dict(data.shard_faults)
        # A run that cannot be continued with these settings keeps its record.
        keeps = cfg.resume not in MODES and not writer.written and read_record(run_dir) is not None
        if trainer.is_global_zero and not keeps:
            with suppress(OSError) if record.status == "failed" else nullcontext():  # the disk may be full
                record.write(run_dir)
            end_tracking(trainer.loggers, run_dir)
        for rank in left:  # they die with this process: each may report its own error
            with suppress(subprocess.TimeoutExpired):
                rank.wait(2)
    if preempted is not None:
        if trainer.is_global_zero:
            state = "is saved" if last_checkpoint(run_dir).exists() else "has no checkpoint yet"
            log.warning("%s %s, %s. The same command continues it.", run_dir, state, preempted)
        call_handler(preempted.number)
        sys.exit(preempted.exit_code)
    if record.samples_skipped:
        log.warning("Skipped samples and shards: %s.", by_kind(record.samples_skipped))
    return record.metrics.get(record.monitor or "")


def filter_lightning_messages() -> None:
    """Hide Lightning's advertisements and its warnings about its own code; print its other messages once."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):  # Hydra's root logger prints them
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for message in (
        ".*LeafSpec.*",
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "Found .* module.* in eval mode",  # the frozen part of the encoder
        "Grad strides do not match bucket view strides",  # of 1×1 convolutions
        "torch.distributed.nn.functional.all_gather is deprecated",  # called by Lightning, at each log of each rank
        "You're using the WeightAveraging callback with a model that overrides",  # sharded ones are refused
        r".*Please add the following callbacks: \['\w*WeightAveraging'\]",  # they have done their part
        "Total length of `list` across ranks is zero",  # a run without validation sets
        "The number of training batches .* is smaller than the logging interval",
        # before the first validation; after it, a missing metric is an error
        r"`ModelCheckpoint\(monitor=.*could not find the monitored key",
    ):
        warnings.filterwarnings("ignore", message=message)
    noise = ["Tip:", "GPU available: False", "TPU available: False", "`Trainer(val_check_interval"]
    noise += ["Loading `train_data", "Detected KeyboardInterrupt", "LOCAL_RANK: "]
    noise += ["has Tensor Cores"]  # what to call in Python, also in bfloat16; ours is matmul_precision
    rank_zero = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
    for name in (*rank_zero, "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in noise))


def build(
    cfg: DictConfig, run_dir: Path, ranks_of_run: Callable[[], Ranks] = Ranks, resumes: bool = False
) -> tuple[WebDatasetDataModule, RecognitionModule]:
    """Tokenizer, data and module of a composed configuration; ``ranks_of_run`` is called before data is opened."""
    sections: dict[str, Any] = {name: to_dataclass(kind, cfg[name], name) for name, kind in SECTIONS.items()}
    model, config, optim = sections["model"], sections["data"], sections["optim"]
    shape = meta_model(model, None, optim.trainable)  # which finds what is wrong, before data is opened
    check_memory(shape, cfg, optim)
    sets: dict[str, OpenedSet] = {}
    ranks = ranks_of_run()
    tokenizer = find_tokenizer(model, config, run_dir, sets, ranks, reuse=resumes)
    data = WebDatasetDataModule(
        config,
        tokenizer,
        transform=ImageTransform.of(shape.encoder.config),
        num_image_tokens=shape.num_image_tokens,
        objective=to_dataclass(Objective, cfg.objective, "objective"),
        sets=sets,
        ranks=ranks,
    )
    module = RecognitionModule(
        model,
        tokenizer,
        optim,
        validation=sections["validation"],
        val_names=list(config.val),
        max_skip_fraction=config.max_skip_fraction,
        parallel=sections["parallel"],
        seed=cfg.seed,
        features=FeatureStore(config.features) if config.features else None,
    )
    return data, module


def find_tokenizer(
    model: ModelConfig, data: DataConfig, run_dir: Path, sets: dict[str, OpenedSet], ranks: Ranks, reuse: bool = True
) -> LabelTokenizer:
    """The tokenizer that the configuration names, the decoder's own, or one trained on the training labels.

    The last one is the first rank's, for all. It needs the training set, which is opened and added to ``sets``.

    Args:
        reuse: take the one that this run has trained before; a start that failed may have had other settings.
    """
    trained = run_dir / "tokenizer"
    if source := model.tokenizer or model.decoder.source:
        return LabelTokenizer.load(source, model.prompt)
    sets["train"] = open_set("train", data.train, data, ranks)

    def train() -> dict[str, str]:
        if not (reuse and trained.is_dir()):
            labels = label_counts(sets["train"].shards, data)
            tokenizer = train_tokenizer(labels, vocab_size=model.vocab_size, prompts=[model.prompt])
            with atomic_directory(trained) as directory:
                tokenizer.save(directory)
        return LabelTokenizer.load(trained, model.prompt).files()

    return LabelTokenizer.of_files(ranks.from_first("tokenizer", train), model.prompt)


def build_trainer(cfg: DictConfig, run_dir: Path) -> L.Trainer:
    loggers = configured_loggers(cfg)
    named: dict[str, Callback] = {}
    for name, node in (cfg.callbacks or {}).items():
        if node is None:
            continue
        callback = instantiated(node, f"callbacks.{name}")
        is_best = isinstance(callback, ModelCheckpoint) and Path(callback.filename or "").name == "best"
        if is_best or isinstance(callback, EarlyStopping):
            callback.monitor = callback.monitor or monitored(list(cfg.data.val), cfg.validation.top_k)
            if is_best and not cfg.data.val:
                continue
            if callback.monitor is None:
                raise UserError(f"callbacks.{name} needs a validation set (data.val), or a monitor that needs none.")
        named[name] = callback
    check_monitors(named, cfg)
    callbacks = [*named.values(), PreemptionHandler(last_checkpoint(run_dir))]
    options = {"_convert_": "all", "logger": loggers or False, "callbacks": callbacks, "default_root_dir": None}
    trainer = instantiated(cfg.trainer, "trainer", **options)
    averaging = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
    for callback in averaging:
        defer_average(callback)
    if averaging:
        if isinstance(trainer.strategy, FSDP2Strategy):
            raise UserError("callbacks: WeightAveraging averages whole weights: use trainer=ddp, or no averaging.")
        for saver in (c for c in callbacks if isinstance(c, ModelCheckpoint)):
            saver.save_weights_only = False  # such a checkpoint of Lightning has the weights that are not averaged
    trainer.strategy.checkpoint_io = BackgroundCheckpoints()
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)  # no second copy of all gradients
    return trainer


def check_monitors(callbacks: dict[str, Callback], cfg: DictConfig) -> None:
    """
    Raises:
        UserError: a callback monitors a metric that no run of this configuration measures, or takes the worst for the
            best. Lightning would find the first at the end of an epoch, the second never.
    """
    ours = metric_names(cfg)
    # Others than Lightning's and ours may log anything.
    others = [c for c in callbacks.values() if not type(c).__module__.startswith(("lightning.", "nxtp."))]
    for name, callback in callbacks.items():
        metric, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        where = f"callbacks.{name}.monitor={metric}"
        if metric not in (None, "train/grad_norm", *ours) and not others:
            raise UserError(f"{where} is no metric.{nearest(str(metric), ours)} A run measures {', '.join(ours)}.")
        right = "min" if str(metric).endswith("/loss") else "max"
        is_own = str(metric).partition("/")[2] in cfg.validation.metrics  # whose best is known to its author alone
        if metric in ours and not is_own and mode not in (None, right):
            raise UserError(f"{where} with mode={mode} selects the worst: set mode={right}.")


def monitored(val_names: list[str], top_k: int) -> str | None:
    """The metric that chooses the best checkpoint: recall on the first validation set."""
    return f"{val_names[0]}/recall@{top_k}" if val_names else None


def metric_names(cfg: DictConfig) -> list[str]:
    """The metrics of a run's record, the monitored one first; without validation, its training loss alone."""
    k = cfg.validation.top_k
    kinds = [f"{kind}@{k}" for kind in ("recall", "precision", "f1")]
    kinds += [f"semantic_{kind}" for kind in kinds] if cfg.validation.semantic else []
    kinds += [f"hit@{cut}" for cut in HIT_CUTS if cut <= k]
    kinds += cfg.validation.metrics
    return [f"{name}/{kind}" for name in cfg.data.val for kind in (*kinds, "loss")] + ["train/loss"]


def result_line(name: str, metrics: dict[str, float], cfg: DictConfig, step: int) -> str:
    """What a validation set has measured, as "val: recall@10 0.348, hit@1 0.212 (step 200)"."""
    kinds = [f"recall@{cfg.validation.top_k}", *(f"hit@{k}" for k in HIT_CUTS), *cfg.validation.metrics]
    found = ", ".join(f"{kind} {metrics[f'{name}/{kind}']:.3f}" for kind in kinds if f"{name}/{kind}" in metrics)
    return f"{name}: {found or 'no image has labels'} (step {step:,})"


def describe_data(data: WebDatasetDataModule) -> dict[str, Any]:
    """For the run record: samples and fingerprint of each set, shards and manifest hash of its sources."""
    described: dict[str, Any] = {}
    for name, spec in {"train": data.config.train, **data.config.val}.items():
        sources = {key: source.shards for key, source in named_sources(spec).items()}
        parts = {
            key: {
                "shards": f"{shards!s:.2000}",  # thousands of names are no part of a model directory
                "manifest": manifest_hash(directory) if (directory := directory_of(shards)) else None,
            }
            for key, shards in sources.items()
        }
        opened = data.open(name, spec, whole=name != "train")
        described[name] = {
            **parts.get("", {"sources": parts}),
            "samples": len(opened),
            "fingerprint": opened.fingerprint,
        }
    return described


def opened_by_rank(
    record: RunRecord, module: RecognitionModule, checkpoint: str | None, data: WebDatasetDataModule
) -> dict[str, Any]:
    """What all ranks must have in common: :func:`nxtp.distributed.start.require_same`."""
    config = {key: value for key, value in record.config.items() if key != "logger"}
    config["data"] = {key: value for key, value in config["data"].items() if key not in PER_MACHINE}
    shards = {}
    for name, opened in data.sets.items():
        shards[name] = {"plan": opened.plan} | ({} if data.config.allow_missing_shards else opened.local)
    tokenizer = zlib.crc32(module.tokenizer.files()["tokenizer.json"].encode())
    return {"configuration": config, "checkpoint": checkpoint, "data": shards, "tokenizer": tokenizer}


def finish(
    run_dir: Path,
    cfg: DictConfig,
    trainer: L.Trainer,
    module: RecognitionModule,
    data: WebDatasetDataModule,
    record: RunRecord,
) -> None:
    """Write the final metrics, predictions and the model directory, of the best or the last weights."""
    trainer.save_checkpoint(last_checkpoint(run_dir), weights_only=False)
    trainer.strategy.checkpoint_io.wait()
    keep_average(trainer, module)
    record.metrics["train/loss"] = float(trainer.logged_metrics.get("train/loss", float("nan")))
    record.parameters = count_parameters(module.model)
    if data.val_names and trainer.limit_val_batches:
        choosing = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        best = next((c.best_model_path for c in choosing if c.best_model_path), None)
        path = best if cfg.export == "best" else None
        trainer.callbacks.append(WritePredictions(run_dir / PREDICTIONS_FILE))
        for values in trainer.validate(module, datamodule=data, ckpt_path=path, verbose=False, weights_only=True):
            record.metrics.update(values)
        if trainer.is_global_zero:
            step = module.loaded_step if path else trainer.global_step
            for name in data.val_names:
                log.info("%s", result_line(name, record.metrics, cfg, step))
    module.recognizer().save_pretrained(run_dir / "model", writes=trainer.is_global_zero)
    if trainer.is_global_zero:
        log.info("Model directory: %s", run_dir / "model")
