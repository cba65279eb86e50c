"""`nxtp evaluate`: a model directory on named sets of shards → metrics table, metrics.json, predictions.jsonl."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from nxtp.config import to_dataclass
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import ResumableDataLoader, WebDatasetDataModule
from nxtp.data.labels.from_samples import warn_if_nouns_differ
from nxtp.errors import UserError, by_kind
from nxtp.eval.embedders import CachedEmbedder, label_embedder
from nxtp.eval.metrics import ExactMatch, SemanticMatch
from nxtp.inference.figures import GridItem, save_grid
from nxtp.inference.recognizer import Recognizer
from nxtp.runs.atomic import write_json
from nxtp.runs.record import FILE, RunRecord, read_record
from nxtp.sampling.closed_vocabulary import Vocabulary, read_classes

log = logging.getLogger("nxtp")


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate one model directory on every set of ``data.val``. Returns ``{"<set>/<metric>": value}``.

    Beside the results stands the run's record, unless they go into the directory of a training run, which has its own.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    record = RunRecord(cfg.name, resolved, overrides, cfg.seed, cfg.sweep, command="evaluate")
    keeps = (read_record(out) or {}).get("command", "train" if (out / FILE).exists() else None) != "train"
    try:
        metrics = evaluate_sets(cfg, out, record)
        record.status = "finished"
        return metrics
    except BaseException as error:
        record.fail(error)
        raise
    finally:
        if keeps and (record.status == "finished" or cfg.sweep is not None):
            record.write(out)


def evaluate_sets(cfg: DictConfig, out: Path, record: RunRecord) -> dict[str, float]:
    """The same, told to the record."""
    console = Console()
    config = to_dataclass(DataConfig, cfg.data, "data")
    if not config.val:
        raise UserError("data.val names no set to evaluate on: for example +data.val.mine=DIR, or data=scenes.")
    recognizer = Recognizer.from_pretrained(cfg.model_dir, device=cfg.device)
    data = WebDatasetDataModule(
        config,
        recognizer.tokenizer,
        image_size=recognizer.image_size,
        num_image_tokens=recognizer.model.num_image_tokens,
    )
    record.data = {name: {"shards": str(spec)} for name, spec in config.val.items()}
    record.parameters = {"model": sum(p.numel() for p in recognizer.model.parameters())}
    record.monitor = f"{next(iter(config.val))}/recall@{cfg.top_k}"
    embedder = label_embedder(cfg.semantic, recognizer.device) if cfg.semantic else None
    vocabulary = recognizer.vocabulary(read_classes(cfg.vocabulary)) if cfg.vocabulary else None

    metrics: dict[str, float] = {}
    skipped: Counter = Counter()
    out.mkdir(parents=True, exist_ok=True)
    predictions = out / ".predictions.jsonl.part"
    with predictions.open("w") as lines:
        for name, spec in config.val.items():
            loader = data.loader(name, spec, training=False)
            warn_if_nouns_differ(name, spec, config.nouns, recognizer.provenance.get("nouns"))
            values, shown, here = evaluate_set(recognizer, loader, cfg, name, embedder, vocabulary, lines, console)
            metrics.update({f"{name}/{key}": value for key, value in values.items()})
            skipped.update(here)
            if cfg.grid and shown:
                save_grid(out / f"predictions{'' if name == next(iter(config.val)) else '_' + name}.png", shown)
    predictions.replace(out / "predictions.jsonl")
    skipped.update(data.shard_faults)
    write_json(out / "metrics.json", metrics)
    record.metrics, record.samples_skipped = dict(metrics), dict(skipped)
    record.samples_seen = int(sum(v for key, v in metrics.items() if key.endswith("/images")))
    console.print(metrics_table(metrics))
    if skipped:
        log.warning("Skipped samples and shards: %s.", by_kind(skipped))
    console.print(f"metrics.json and predictions.jsonl in {out}", highlight=False)
    return metrics


def evaluate_set(
    recognizer: Recognizer,
    loader: ResumableDataLoader,
    cfg: DictConfig,
    name: str,
    embedder: CachedEmbedder | None,
    vocabulary: Vocabulary | None,
    lines,
    console: Console,
) -> tuple[dict[str, float], list[GridItem], Counter]:
    """Metrics of one set, some images with their labels to show, and what was skipped."""
    exact = ExactMatch(top_k=cfg.top_k)
    semantic = SemanticMatch(embedder, top_k=cfg.top_k) if embedder is not None else None
    skipped: Counter = Counter()
    samples_read = seen = 0
    seconds = 0.0
    shown: list[GridItem] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=loader.sampler.total)
        for batch in loader:
            begin = time.perf_counter()
            if vocabulary is not None:
                predicted = recognizer.classify_pixels(batch.images, vocabulary, cfg.top_k)
            else:
                predicted = recognizer.predict_pixels(batch.images, cfg.top_k, cfg.sampler, cfg.ranking)
            seconds += time.perf_counter() - begin
            labels = [[label for label, _ in image] for image in predicted]
            exact.update(labels, batch.labels)
            if semantic is not None:
                semantic.update(labels, batch.labels)
            for key, truth, image in zip(batch.keys, batch.labels, predicted, strict=True):
                ranked = [[label, round(probability, 6)] for label, probability in image]
                row = {"set": name, "key": key, "labels": truth, "predictions": ranked}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            room = max(cfg.grid - len(shown), 0)
            for pixels, truth, image in list(zip(batch.images, batch.labels, predicted, strict=True))[:room]:
                shown.append(GridItem(to_image(pixels), truth, image))
            skipped.update(batch.skipped)
            samples_read, seen = samples_read + batch.samples_read, seen + len(batch)
            progress.advance(task, batch.samples_read)
    if sum(skipped.values()) > cfg.data.max_skip_fraction * samples_read:
        raise UserError(
            f"{sum(skipped.values())} of {samples_read} samples of '{name}' could not be used ({by_kind(skipped)}): "
            f"more than data.max_skip_fraction = {cfg.data.max_skip_fraction:g}."
        )
    values = dict(exact.compute())
    if semantic is not None:
        values |= {f"semantic_{key}": value for key, value in semantic.compute().items()}
    values = {key: float(value) for key, value in values.items()}
    values |= {"images": seen, "skipped": sum(skipped.values())}
    if seen:
        values["images_per_s"] = round(seen / seconds, 2)
    return values, shown, skipped


def to_image(pixels: Tensor) -> Image.Image:
    """uint8 [3, S, S] → PIL RGB."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def metrics_table(metrics: dict[str, float]) -> Table:
    """One row a metric, one column a set."""
    sets = list(dict.fromkeys(key.split("/", 1)[0] for key in metrics))
    names = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics))
    table = Table(title="Evaluation")
    table.add_column("metric")
    for name in sets:
        table.add_column(name, justify="right")
    for metric in names:
        values = [metrics.get(f"{name}/{metric}") for name in sets]
        table.add_row(metric, *("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values))
    return table
