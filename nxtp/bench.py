"""`nxtp bench train|predict`: ours beside the published way, the same weights and inputs, in one run.

Each way lives in a fresh process that builds the same seeded model. The parent first has both compute the same
thing and compares the results, then asks them for one measurement each in turn (A B A B …); ratios are medians
over the rounds. The published way is :mod:`nxtp.reference`. Other work on the machine falsifies the numbers:
threads that wait for each other slow short steps far more than long ones.
"""

from __future__ import annotations

import json as json_module
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nxtp.decoder import DecoderConfig
from nxtp.encoder import EncoderConfig
from nxtp.errors import UserError
from nxtp.layout import Objective, lay_out
from nxtp.model import Model, ModelConfig
from nxtp.record import cpu_name
from nxtp.reference import PADDED_LENGTH, published_loss, published_one_shot
from nxtp.sampling import Samples, one_shot

TOLERANCE = 1e-4  # of the results, relative
WAYS = ("ours", "published")
COUNTS = (1, 20, 100)  # labels an image in `bench predict`
DELIMITER, PROMPT_TOKENS = 4, 7  # BOS and the six tokens of the evaluation prompt in LLaMA's vocabulary


@dataclass(frozen=True)
class Size:
    """Dimensions of the measured model.

    ``full`` keeps the proportions of the published model (ViT-L/14 and six blocks of LLaMA-2 with its vocabulary,
    257 + 1 + 7 prefix positions) at about 100 M parameters, the encoder about a seventh of them as there.
    """

    image_size: int
    patch_size: int
    encoder_width: int
    encoder_layers: int
    width: int
    heads: int
    layers: int
    intermediate: int
    vocab: int
    pad_to: int

    def config(self) -> ModelConfig:
        vision = {
            "layers": self.encoder_layers,
            "width": self.encoder_width,
            "head_width": min(64, self.encoder_width // 2),
            "patch_size": self.patch_size,
        }
        decoder = {
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "pad_token_id": None,
        }
        return ModelConfig(
            encoder=EncoderConfig(vision=vision, quick_gelu=True, image_size=self.image_size),
            decoder=DecoderConfig(config=decoder),
        )


SIZES = {
    "full": Size(224, 14, 384, 8, 768, 12, 6, 2048, 32000, PADDED_LENGTH),
    "tiny": Size(32, 8, 32, 2, 32, 4, 2, 64, 400, 80),
}


def random_labels(batch: int, vocab: int, seed: int) -> list[list[list[int]]]:
    """6 to 10 labels an image of 1 to 3 tokens each, without the delimiter: what nouns of captions look like."""
    generator = np.random.default_rng(seed)
    return [
        [generator.integers(5, vocab, generator.integers(1, 4)).tolist() for _ in range(generator.integers(6, 11))]
        for _ in range(batch)
    ]


# ---- in a child process: one way of computing, one model


class Trainer:
    """Forward, backward and AdamW step of one way on one batch; all parameters train."""

    def __init__(self, way: str, size: Size, batch: int, seed: int):
        self.published_way = way == "published"
        self.model = _seeded_model(size, seed).train()
        self.images = _images(batch, size, seed)
        self.labels = random_labels(batch, size.vocab, seed)
        self.prompt = _prompt(size, seed)
        self.pad_to = size.pad_to
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def loss(self, objective: str) -> torch.Tensor:
        if self.published_way:
            return published_loss(
                self.model, self.images, self.labels, prompt=self.prompt, delimiter=DELIMITER, pad_to=self.pad_to
            )
        layout = lay_out(
            self.labels,
            prompt=self.prompt,
            delimiter=DELIMITER,
            num_image_tokens=self.model.num_image_tokens,
            objective=objective,
        )
        return self.model(self.images, layout).mean

    def result(self) -> dict[str, np.ndarray]:
        """Loss and the gradients of parameters from the first to the last layer, at the initial weights."""
        self.optimizer.zero_grad()
        loss = self.loss(Objective.PUBLISHED)
        loss.backward()
        blocks, tower = self.model.decoder.blocks, self.model.encoder.visual.transformer.resblocks
        parameters = {
            "first encoder block": tower[0].mlp.c_fc.weight,
            "last encoder block": tower[-1].attn.in_proj_weight,
            "projection": self.model.projection.weight,
            "image token": self.model.image_token,
            "first decoder block": blocks[0].self_attn.q_proj.weight,
            "last decoder block": blocks[-1].mlp.down_proj.weight,
            "final norm": self.model.decoder.lm.model.norm.weight,
        }
        gradients = {f"gradient of {name}": parameter.grad.numpy() for name, parameter in parameters.items()}
        return {"loss": loss.detach().numpy()} | gradients

    def measure(self, objective: str) -> float:
        """Seconds of one training step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(objective).backward()
        self.optimizer.step()
        return time.perf_counter() - start


class Predictor:
    """One-shot prediction of one image, one way."""

    def __init__(self, way: str, size: Size, batch: int, seed: int):
        self.sample: Callable[..., Samples] = one_shot if way == "ours" else published_one_shot
        self.model = _seeded_model(size, seed).eval()
        self.images = _images(batch, size, seed)
        self.prompt = _prompt(size, seed)

    def measure(self, top_k: int, tokens: int) -> tuple[float, dict[str, np.ndarray]]:
        """Seconds from uint8 image to sampled labels (the median of up to five runs in a second), and the labels."""
        seconds: list[float] = []
        while not seconds or (len(seconds) < 5 and sum(seconds) < 1):
            start = time.perf_counter()
            samples = self._run(top_k, tokens)
            seconds.append(time.perf_counter() - start)
        return median(seconds), {"tokens": samples.tokens_BKL.numpy(), "probabilities": samples.probs_BKL.numpy()}

    def _run(self, top_k: int, tokens: int) -> Samples:
        return self.sample(
            self.model,
            self.images,
            prompt=self.prompt,
            delimiter=DELIMITER,
            top_k=top_k,
            max_tokens=tokens,
            never_first=[DELIMITER],
        )


def _seeded_model(size: Size, seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(size.config())


def _images(batch: int, size: Size, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size.image_size, size.image_size), dtype=torch.uint8, generator=generator)


def _prompt(size: Size, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, size.vocab, PROMPT_TOKENS).tolist()


def _resident_peak() -> int:
    """Bytes: the largest resident set that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _serve(connection: Connection, worker: type, arguments: dict[str, Any], threads: int) -> None:
    """A child's life: build the worker, then answer (method, arguments) until the parent hangs up."""
    torch.set_num_threads(threads)
    instance = worker(**arguments)
    baseline = _resident_peak()
    parameters = sum(parameter.numel() for parameter in instance.model.parameters())
    connection.send((parameters, baseline))
    with suppress(EOFError):
        while True:
            method, keywords = connection.recv()
            connection.send((getattr(instance, method)(**keywords), _resident_peak()))


# ---- in the parent


class Child:
    """One way in its own process. ``peak`` and ``baseline`` are resident bytes, the latter before any step."""

    def __init__(self, context, worker: type, threads: int, **arguments: Any):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, worker, arguments, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.way = arguments["way"]
        self.parameters = self.baseline = self.peak = 0

    def wait_until_ready(self) -> None:
        self.parameters, self.baseline = self._receive()
        self.peak = self.baseline

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise UserError(f"The process measuring '{self.way}' ended with code {code}; is memory short?") from None

    def ask(self, method: str, **keywords: Any) -> Any:
        self.connection.send((method, keywords))
        answer, self.peak = self._receive()
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=1)
        self.process.kill()


@contextmanager
def _children(worker: type, **arguments: Any) -> Iterator[tuple[Child, Child]]:
    context = multiprocessing.get_context("spawn")
    opened: list[Child] = []
    try:
        for way in WAYS:
            opened.append(Child(context, worker, torch.get_num_threads(), way=way, **arguments))
        for child in opened:
            child.wait_until_ready()
        yield opened[0], opened[1]
    finally:
        for child in opened:
            child.close()


def _assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], case: str) -> float:
    """The largest relative difference.

    Raises:
        UserError: more than ``TOLERANCE``.
    """
    worst = 0.0
    for name, expected in theirs.items():
        same_shape = ours[name].shape == expected.shape
        scale = float(np.abs(expected).max()) or 1.0
        error = float(np.abs(ours[name] - expected).max()) / scale if same_shape else float("inf")
        if name == "tokens" and error:
            raise UserError(f"{case}: ours and the published way give other tokens.")
        if not error <= TOLERANCE:
            raise UserError(f"{case}: {name} differs by {error:.1e} relative, more than {TOLERANCE:g}.")
        worst = max(worst, error)
    return worst


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def measure_train(size: str = "full", repeats: int = 3, batch: int = 8, seed: int = 0) -> dict[str, Any]:
    """Training steps a second and peak memory of both ways.

    Args:
        batch: images a step. Weights, gradients, AdamW's state and the libraries (2.5 GB at full size) weigh the
            same in both ways, so that the ratio of memory falls with the batch; the published one is 16 a GPU.

    Returns:
        ``images_per_s_ratio`` and ``peak_memory_ratio`` (ours / published), what they are made of, the machine.

    Raises:
        UserError: the two ways disagree.
    """
    with _children(Trainer, size=SIZES[size], batch=batch, seed=seed) as (ours, theirs):
        difference = _assert_equal(ours.ask("result"), theirs.ask("result"), "training step")
        cases = {
            "ours": (ours, Objective.PUBLISHED),
            "published": (theirs, Objective.PUBLISHED),
            "ours, matched": (ours, Objective.MATCHED),
        }
        for child, objective in cases.values():
            child.ask("measure", objective=objective)  # the optimiser's state is made here
        peaks = {}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, (child, objective) in cases.items():
                seconds[name].append(child.ask("measure", objective=objective))
                peaks[name] = (child.peak, child.peak - child.baseline)
        parameters = ours.parameters
    rows = {
        name: {
            "seconds": median(times),
            "images_per_s": batch / median(times),
            "peak_bytes": peaks[name][0],
            "peak_above_model_bytes": peaks[name][1],
        }
        for name, times in seconds.items()
    }
    return {
        "images_per_s_ratio": _ratio(seconds["published"], seconds["ours"]),
        "peak_memory_ratio": peaks["ours"][0] / peaks["published"][0],
        "peak_above_model_ratio": peaks["ours"][1] / max(peaks["published"][1], 1),
        "matched_images_per_s_ratio": _ratio(seconds["published"], seconds["ours, matched"]),
        "difference": difference,
        "rows": rows,
        "parameters": parameters,
        "batch": batch,
        "repeats": repeats,
        "machine": _machine(),
    }


def measure_predict(size: str = "full", repeats: int = 3, steps: int = 3, seed: int = 0) -> dict[str, Any]:
    """Seconds an image of both ways, for 1, 20 and 100 labels.

    Args:
        steps: decoding steps after the first token; random weights hardly ever end a label sooner.

    Returns:
        ``ratio@20``, ``ratio@100``: published / ours, encoder and prefix included. ``decode_ratio@…``: after the
        first token, i.e. less the time of the same call with one token a label. ``top100_over_top1``: ours.

    Raises:
        UserError: the two ways disagree.
    """
    tokens = steps + 1
    whole: dict[tuple[str, int], list[float]] = {}
    decode: dict[tuple[str, int], list[float]] = {}
    differences = []
    with _children(Predictor, size=SIZES[size], batch=1, seed=seed) as (ours, theirs):

        def both(top_k: int, tokens: int) -> dict[str, float]:
            """Each way's seconds; their labels have been compared."""
            answers = {child.way: child.ask("measure", top_k=top_k, tokens=tokens) for child in (ours, theirs)}
            results = (answers[child.way][1] for child in (ours, theirs))
            differences.append(_assert_equal(*results, case=f"top-{top_k}"))
            return {way: seconds for way, (seconds, _) in answers.items()}

        for k in COUNTS[:-1]:
            both(k, tokens)  # before anything counts
        for _ in range(repeats):
            for k in COUNTS:
                first, every = both(k, 1), both(k, tokens)
                for way in WAYS:
                    whole.setdefault((way, k), []).append(every[way])
                    decode.setdefault((way, k), []).append(max(every[way] - first[way], 1e-6))
        parameters = ours.parameters
    result: dict[str, Any] = {}
    for k in COUNTS[1:]:
        result[f"ratio@{k}"] = _ratio(whole["published", k], whole["ours", k])
        result[f"decode_ratio@{k}"] = _ratio(decode["published", k], decode["ours", k])
    most = COUNTS[-1]
    result[f"top{most}_over_top1"] = _ratio(whole["ours", most], whole["ours", 1])
    rows = {
        f"{way}@{k}": {"seconds": median(whole[way, k]), "decode_seconds": median(decode[way, k])}
        for k in COUNTS
        for way in WAYS
    }
    return result | {
        "difference": max(differences),
        "rows": rows,
        "parameters": parameters,
        "steps": steps,
        "repeats": repeats,
        "machine": _machine(),
    }


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over the rounds of one time by the other of the same round."""
    return median(n / d for n, d in zip(numerators, denominators, strict=True))


# ---- what is printed


def _caption(result: dict[str, Any], what: str) -> str:
    machine = result["machine"]
    return (
        f"{what}. {result['parameters'] / 1e6:.0f} M parameters; results equal to {result['difference']:.0e} relative. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
    )


def train_table(result: dict[str, Any]) -> Table:
    table = Table(title="Training step: ours beside the published way", caption_justify="left")
    for column in ("", "s a step", "images/s", "peak memory GB", "above the model GB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in result["rows"].items():
        shared = name == "ours, matched"  # the same process as ours
        peak, above = (f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "peak_above_model_bytes"))
        numbers = (f"{row['seconds']:.2f}", f"{row['images_per_s']:.2f}", *(("", "") if shared else (peak, above)))
        table.add_row(name, *numbers)
    speed, memory, above = (result[k] for k in ("images_per_s_ratio", "peak_memory_ratio", "peak_above_model_ratio"))
    table.add_section()
    table.add_row("ours / published", "", f"{speed:.1f}×", f"{memory:.2f}×", f"{above:.2f}×")
    table.caption = _caption(
        result,
        f"Forward, backward and AdamW of {result['batch']} images, all parameters train; medians of "
        f"{result['repeats']} rounds; memory is the largest resident set of a process (getrusage)",
    )
    return table


def predict_table(result: dict[str, Any]) -> Table:
    table = Table(title="One-shot prediction of one image: ours beside the published way", caption_justify="left")
    for column in ("labels", "ours s", "published s", "ratio", "decoding: ours s", "published s", "ratio"):
        table.add_column(column, justify="right")
    for k in COUNTS:
        ours, theirs = result["rows"][f"ours@{k}"], result["rows"][f"published@{k}"]
        ratios = [f"{result[name]:.1f}×" if name in result else "" for name in (f"ratio@{k}", f"decode_ratio@{k}")]
        table.add_row(
            str(k),
            f"{ours['seconds']:.3f}",
            f"{theirs['seconds']:.2f}",
            ratios[0],
            f"{ours['decode_seconds']:.3f}",
            f"{theirs['decode_seconds']:.2f}",
            ratios[1],
        )
    table.caption = _caption(
        result,
        f"Top-100 takes {result['top100_over_top1']:.2f}× the time of top-1. Encoder and prefix included, except "
        f"under decoding: {result['steps']} steps after the first token; medians of {result['repeats']} rounds",
    )
    return table


def bench_train(*, json: bool = False, **options: Any) -> dict[str, Any]:
    """Measure, print the table, and with ``json`` one JSON object as the last line."""
    return _report(measure_train, train_table, json, options)


def bench_predict(*, json: bool = False, **options: Any) -> dict[str, Any]:
    """Measure, print the table, and with ``json`` one JSON object as the last line."""
    return _report(measure_predict, predict_table, json, options)


def _report(measure, table, json: bool, options: dict[str, Any]) -> dict[str, Any]:
    with Console(stderr=True).status("measuring; the published way takes its time …"):
        result = measure(**options)
    Console().print(table(result))
    if json:
        print(json_module.dumps(result), flush=True)
    return result


@click.group()
def bench() -> None:
    """Ours against the published way of doing it, side by side in one run."""


def _common(command):
    for option in (
        click.option("--json", is_flag=True, help="Print one JSON object as the last line."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of weights, images and labels."),
        click.option(
            "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are shown."
        ),
        click.option("--size", type=click.Choice(list(SIZES)), default="full", show_default=True, help="Of the model."),
    ):
        command = option(command)
    return command


@bench.command()
@_common
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Images a step.")
def train(**options: Any) -> None:
    """Training steps a second and peak memory, ours and published."""
    bench_train(**options)


@bench.command()
@_common
@click.option(
    "--steps", type=click.IntRange(1), default=3, show_default=True, help="Decoding steps after a label's first token."
)
def predict(**options: Any) -> None:
    """Seconds an image for 1, 20 and 100 labels, ours and published."""
    bench_predict(**options)
