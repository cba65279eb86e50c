"""`nxtp evaluate`: a model directory on named sets of shards → metrics table, metrics.json, predictions.jsonl."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from nxtp.config import to_dataclass
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import ResumableDataLoader, WebDatasetDataModule
from nxtp.data.labels.from_samples import warn_if_nouns_differ
from nxtp.errors import UserError, by_kind
from nxtp.eval.embedders import label_embedder
from nxtp.eval.metrics import ExactMatch, SemanticMatch, meaningless, own_metrics
from nxtp.inference.figures import GridItem, save_grid
from nxtp.inference.recognizer import Recognizer
from nxtp.runs.atomic import write_json
from nxtp.runs.lock import run_lock
from nxtp.runs.record import FILE, RunRecord, read_record
from nxtp.runs.tracking import configured_loggers, end_tracking, log_evaluation
from nxtp.sampling.closed_vocabulary import read_classes
from nxtp.sampling.ranking import Labels

log = logging.getLogger("nxtp")


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate one model directory on every set of ``data.val``. Returns ``{"<set>/<metric>": value}``.

    The run's record is written beside the results, unless these go into the directory of a training run.
    """
    if OmegaConf.is_missing(cfg, "model_dir"):
        raise UserError("No model: add model=runs/NAME/model of a run, another model directory, or a hub name.")
    out, overrides = Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task)
    with run_lock(out, ["nxtp", "evaluate", *overrides]):
        return evaluate_into(out, cfg, overrides)


def evaluate_into(out: Path, cfg: DictConfig, overrides: list[str]) -> dict[str, float]:
    """:func:`evaluate` in a directory that no other command writes to."""
    config: dict = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    record = RunRecord(cfg.name, config, overrides, cfg.seed, cfg.sweep, command="evaluate")
    earlier = read_record(out)
    loggers = configured_loggers(cfg)
    in_training_run = (out / FILE).exists() and (earlier or {}).get("command", "train") == "train"
    try:
        metrics = evaluate_sets(cfg, out, record)
        record.status = "finished"
    except BaseException as error:
        record.fail(error)
        raise
    finally:
        if not in_training_run and (record.status == "finished" or cfg.sweep is not None):
            record.write(out)
    log_evaluation(loggers, asdict(record))
    end_tracking(loggers, out)
    return metrics


def evaluate_sets(cfg: DictConfig, out: Path, record: RunRecord) -> dict[str, float]:
    """:func:`evaluate`, with results written to ``out`` and added to ``record``."""
    console = Console()
    config = to_dataclass(DataConfig, cfg.data, "data")
    if not config.val:
        raise UserError("data.val has no set to evaluate on: add +data.val.mine=DIR, or data=scenes.")
    recognizer = Recognizer.from_pretrained(cfg.model_dir, device=cfg.device)
    data = WebDatasetDataModule(
        config,
        recognizer.tokenizer,
        transform=recognizer.pixels,
        num_image_tokens=recognizer.model.num_image_tokens,
    )
    first = next(iter(config.val))
    record.data = {name: {"shards": str(spec)} for name, spec in config.val.items()}
    record.parameters = {"model": sum(p.numel() for p in recognizer.model.parameters())}
    record.monitor = f"{first}/recall@{cfg.top_k}"
    embedder = label_embedder(cfg.semantic, recognizer.device) if cfg.semantic else None
    named = read_classes(cfg.classes) if cfg.classes is not None else None
    classes = recognizer.prepare_classes(named) if named is not None else None

    def predict(pixels: Tensor) -> list[Labels]:
        if classes is not None:
            return recognizer.classify_pixels(pixels, classes, cfg.top_k)
        return recognizer.predict_pixels(pixels, cfg.top_k, cfg.sampler, cfg.ranking)

    metrics: dict[str, float] = {}
    marked: list[str] = []
    skipped: Counter = Counter()
    out.mkdir(parents=True, exist_ok=True)
    predictions = out / ".predictions.jsonl.part"
    with predictions.open("w") as file:
        for name, spec in config.val.items():
            loader = data.loader(name, spec, training=False, whole=False)
            warn_if_nouns_differ(name, spec, config.nouns, recognizer.provenance.get("nouns"))
            exact = ExactMatch(top_k=cfg.top_k)
            scores: dict[str, Metric] = {"": exact}
            if embedder is not None:
                scores["semantic_"] = SemanticMatch(embedder, top_k=cfg.top_k)
            scores |= own_metrics(cfg.metrics, "metrics")
            values, shown, skipped_in_set = evaluate_set(name, loader, predict, scores, cfg, file, console)
            metrics |= {f"{name}/{key}": value for key, value in values.items()}
            choices = len(named) if named is not None else exact.labels
            marked += [f"{name}/{key}" for key in meaningless(values, choices)]
            skipped += skipped_in_set
            if shown:
                save_grid(out / f"predictions{'' if name == first else '_' + name}.png", shown)
    predictions.replace(out / "predictions.jsonl")
    skipped += data.shard_faults
    write_json(out / "metrics.json", metrics)
    record.metrics, record.samples_skipped = dict(metrics), dict(skipped)
    record.samples_seen = int(sum(value for key, value in metrics.items() if key.endswith("/images")))
    console.print(metrics_table(metrics, marked))
    if skipped:
        log.warning("Skipped samples and shards: %s.", by_kind(skipped))
    console.print(f"metrics.json and predictions.jsonl in {out}", highlight=False)
    return metrics


def evaluate_set(
    name: str,
    loader: ResumableDataLoader,
    predict: Callable[[Tensor], list[Labels]],
    scores: dict[str, Metric],
    cfg: DictConfig,
    file: TextIO,
    console: Console,
) -> tuple[dict[str, float], list[GridItem], Counter]:
    """Metrics of one set, ``cfg.grid`` images with their labels, and the skipped samples by kind.

    Args:
        predict: uint8 [B, 3, S, S] → ranked labels of each image.
        scores: metrics by their names, or by the prefix of the names of their values.
        file: gets a line of JSON per image.
    """
    skipped: Counter = Counter()
    samples_read = images = 0
    seconds = 0.0
    shown: list[GridItem] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=loader.sampler.total)
        for batch in loader:
            begin = time.perf_counter()
            predictions = predict(batch.images)
            seconds += time.perf_counter() - begin
            labels = [[label for label, _ in ranked] for ranked in predictions]
            for metric in scores.values():
                metric.update(labels, batch.labels)
            for key, pixels, truth, ranked in zip(batch.keys, batch.images, batch.labels, predictions, strict=True):
                rounded = [[label, round(probability, 6)] for label, probability in ranked]
                row = {"set": name, "key": key, "labels": truth, "predictions": rounded}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if len(shown) < cfg.grid:
                    shown.append(GridItem(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()), truth, ranked))
            skipped += batch.skipped
            samples_read += batch.samples_read
            images += len(batch)
            progress.advance(task, batch.samples_read)
    if skipped.total() > cfg.data.max_skip_fraction * samples_read:
        raise UserError(
            f"{skipped.total()} of {samples_read} samples of '{name}' could not be used ({by_kind(skipped)}): "
            f"more than data.max_skip_fraction = {cfg.data.max_skip_fraction:g}."
        )
    values: dict[str, float] = {}
    for name, metric in scores.items():
        found = metric.compute()  # the user's metrics return one value
        named = found.items() if isinstance(found, dict) else [("", found)]
        values |= {f"{name}{key}": float(value) for key, value in named}
    values |= {"images": images, "skipped": skipped.total()}
    if images:
        values["images_per_s"] = round(images / seconds, 2)
    return values, shown, skipped


def metrics_table(metrics: dict[str, float], marked: Sequence[str] = ()) -> Table:
    """One row per metric, one column per set; those ``marked`` as :func:`meaningless` have an asterisk."""
    sets = dict.fromkeys(key.split("/", 1)[0] for key in metrics)
    note = "* says nothing: k is not less than the number of labels or classes; use a smaller top_k" if marked else None
    table = Table("metric", title="Evaluation", caption=note)
    for name in sets:
        table.add_column(name, justify="right")
    for metric in dict.fromkeys(key.split("/", 1)[1] for key in metrics):
        cells = []
        for key in (f"{name}/{metric}" for name in sets):
            value = metrics.get(key)
            text = "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
            cells.append(f"{text} *" if key in marked else text)
        table.add_row(metric, *cells)
    return table
