"""What do int8 weights and ONNX graphs cost and gain, in size, speed and recall?

    python experiments/benchmarks/exported.py --model runs/demo/model --data data/shards/demo/val --aoti

2026-11-25, two threads of an AMD EPYC; top 10; a 64-pixel convolutional encoder with a decoder of two blocks (6.2 M
parameters), 500 unseen scenes; README.md has the table of a decoder of eight blocks:

                      MB   one image ms         images/s, batches of 8         recall@10   probabilities differ by
    PyTorch         24.7           16.6   1.0×                     266   1.0×      0.929
    PyTorch int8    21.4           17.6   0.9×                     258   1.0×      0.930                      3e-2
    ONNX            25.1            9.7   1.7×                     219   0.8×      0.929                      4e-7
    ONNX int8       21.9            9.0   1.8×                     198   0.7×      0.929                      3e-2
    AOTInductor     28.8           11.9   1.4×                     344   1.3×      0.929                      4e-7
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from rich.table import Table

from nxtp.bench.command import as_json, number, repeats
from nxtp.bench.reporting import build_table, machine_description, machine_line, show
from nxtp.data.images import ImageError
from nxtp.data.labels.from_samples import labels_of
from nxtp.data.labels.nouns import noun_backend
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.shards.urls import expand_shards
from nxtp.deploy.onnx.export import (
    DecoderGraph,
    EncoderGraph,
    decoder_inputs,
    encoder_inputs,
    export_onnx,
    require_onnx,
    runner_config,
)
from nxtp.deploy.onnx.runner import OnnxRecognizer
from nxtp.errors import UserError
from nxtp.eval.metrics import ExactMatch
from nxtp.inference.recognizer import Recognizer
from nxtp.sampling.ranking import Labels

TOP_K, BATCH, ALONE = 10, 8, 50  # labels, images a batch, images timed one by one

Predict = Callable[[np.ndarray], list[Labels]]


class CompiledRecognizer(OnnxRecognizer):
    """The same graphs compiled ahead of time by torch (AOTInductor) in place of onnxruntime's sessions."""

    def __init__(self, directory: Path, recognizer: Recognizer, out: Path):
        super().__init__(directory)
        config = runner_config(recognizer, "float32")
        graphs = ((EncoderGraph, encoder_inputs(config)), (DecoderGraph, decoder_inputs(config)))
        self.compiled = []
        with torch.no_grad():
            for graph, inputs in graphs:
                examples, axes = zip(*inputs.values(), strict=True)
                exported = torch.export.export(graph(recognizer.model).eval(), examples, dynamic_shapes=axes)
                path = str(out / f"{graph.__name__}.pt2")
                torch._inductor.aoti_compile_and_package(exported, package_path=path)
                self.compiled.append(torch._inductor.aoti_load_package(path))

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        return self.compiled[0](torch.from_numpy(pixels)).numpy()

    def _decode(self, *inputs: np.ndarray) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(each)) for each in inputs]
        return [each.numpy() for each in self.compiled[1](*tensors)]


def measure(*, model: str, data: str, images: int, repeats: int, aoti: bool) -> dict[str, Any]:
    """Recall, difference, size and seconds of each way, on a CPU.

    Args:
        model: a model directory.
        data: shards with labels or captions; the first ``images`` of them are used.
        repeats: rounds of timing, in which the ways take turns; the result has medians.
        aoti: also compile the graphs ahead of time; needs a C++ compiler.

    Returns:
        ``rows``: of each way megabytes, milliseconds of one image, images/s in batches, recall@10, and the largest
        difference of a probability from the model as it is.

    Raises:
        UserError: no such model or shards.
    """
    require_onnx()
    recognizer = Recognizer.from_pretrained(model, device="cpu")
    pixels, truth = _samples(data, images, recognizer)
    with tempfile.TemporaryDirectory() as directory:
        ways: dict[str, tuple[Predict, float]] = {
            "PyTorch": (_of_torch(recognizer), _megabytes(recognizer)),
        }
        if find_spec("torchao"):
            narrow = Recognizer.from_pretrained(model, device="cpu").to_int8()
            ways["PyTorch int8"] = (_of_torch(narrow), _megabytes(narrow))
        for name, int8 in (("ONNX", False), ("ONNX int8", True)):
            out = Path(directory, name)
            export_onnx(recognizer, out, int8)
            size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
            ways[name] = (_of_runner(OnnxRecognizer(out, torch.get_num_threads())), size)
        if aoti:
            compiled = CompiledRecognizer(Path(directory, "ONNX"), recognizer, Path(directory))
            size = sum(path.stat().st_size for path in Path(directory).glob("*.pt2")) / 1e6
            ways["AOTInductor"] = (_of_runner(compiled), size)
        rows = {name: _quality(predict, pixels, truth) | {"megabytes": size} for name, (predict, size) in ways.items()}
        reference = rows["PyTorch"]["labels"]
        for row in rows.values():
            row["difference"] = _difference(row.pop("labels"), reference)
        _time({name: predict for name, (predict, _) in ways.items()}, rows, pixels, repeats)
    return {
        "rows": rows,
        "images": len(pixels),
        "repeats": repeats,
        "parameters": sum(parameter.numel() for parameter in recognizer.model.parameters()),
        "machine": machine_description("cpu"),
    }


def _samples(data: str, count: int, recognizer: Recognizer) -> tuple[np.ndarray, list[list[str]]]:
    shards, nouns = IndexedShards(expand_shards(data)), noun_backend()
    pixels, truth = [], []
    for position in range(len(shards)):
        try:
            raw = shards.read(position)
            labels, image = labels_of(raw, nouns), recognizer.transform(raw.image)
        except (SampleError, ImageError):
            continue
        truth.append(labels)
        pixels.append(image.numpy())
        if len(pixels) == count:
            break
    if not pixels:
        raise UserError(f"No image with labels in '{data}'.")
    return np.stack(pixels), truth


def _of_torch(recognizer: Recognizer) -> Predict:
    return lambda pixels: recognizer.predict_pixels(torch.from_numpy(pixels), TOP_K)


def _of_runner(runner: OnnxRecognizer) -> Predict:
    return lambda pixels: runner.predict_pixels(pixels, TOP_K)


def _megabytes(recognizer: Recognizer) -> float:
    """Of the parameters in memory."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    def size(tensor: torch.Tensor) -> int:
        if is_traceable_wrapper_subclass(tensor):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    return sum(size(parameter.data) for parameter in recognizer.model.parameters()) / 1e6


def _quality(predict: Predict, pixels: np.ndarray, truth: list[list[str]]) -> dict[str, Any]:
    labels = [image for start in range(0, len(pixels), BATCH) for image in predict(pixels[start : start + BATCH])]
    metric = ExactMatch(top_k=TOP_K)
    metric.update([[label for label, _ in image] for image in labels], truth)
    return {"labels": labels, "recall": float(metric.compute()[f"recall@{TOP_K}"])}


def _difference(labels: list[Labels], reference: list[Labels]) -> float:
    return max(
        abs(dict(image).get(label, 0.0) - probability)
        for image, expected in zip(labels, reference, strict=True)
        for label, probability in expected
    )


def _time(ways: dict[str, Predict], rows: dict[str, dict[str, Any]], pixels: np.ndarray, repeats: int) -> None:
    alone: dict[str, list[float]] = {name: [] for name in ways}
    batched: dict[str, list[float]] = {name: [] for name in ways}
    single = pixels[: min(ALONE, len(pixels))]
    for turn in range(repeats + 1):
        for name, predict in ways.items():
            begin = time.perf_counter()
            for image in single:
                predict(image[None])
            middle = time.perf_counter()
            for start in range(0, len(pixels), BATCH):
                predict(pixels[start : start + BATCH])
            if turn:  # the first round is a warm-up
                alone[name].append((middle - begin) / len(single))
                batched[name].append((time.perf_counter() - middle) / len(pixels))
    for name, row in rows.items():
        row["alone_ms"], row["images_per_s"] = 1e3 * median(alone[name]), 1 / median(batched[name])


def table(result: dict[str, Any]) -> Table:
    first = result["rows"]["PyTorch"]
    rows = [
        (
            name,
            f"{row['megabytes']:,.1f}",
            f"{row['alone_ms']:,.1f}",
            f"{first['alone_ms'] / row['alone_ms']:.1f}×",
            f"{row['images_per_s']:,.0f}",
            f"{row['images_per_s'] / first['images_per_s']:.1f}×",
            f"{row['recall']:.3f}",
            f"{row['difference']:.0e}" if row["difference"] else "",
        )
        for name, row in result["rows"].items()
    ]
    caption = (
        f"{result['parameters'] / 1e6:,.1f} M parameters; one image, and batches of {BATCH}; × is the gain in "
        f"speed, medians of {result['repeats']} rounds; recall@{TOP_K} of {result['images']:,} images, and the largest "
        f"difference of a probability. {machine_line(result['machine'])}"
    )
    columns = ("", "MB", "ms alone", "", "images/s", "", "recall", "differs by")
    return build_table("A model as it is, and exported", columns, rows, caption)


@click.command()
@as_json
@repeats
@click.option("--model", required=True, help="A model directory.")
@click.option("--data", required=True, help="Shards with labels or captions: a directory, glob or brace expression.")
@number("--images", 500, "The first of the shards.")
@click.option("--aoti", is_flag=True, help="Also AOTInductor; compiles for a minute.")
def exported(**options: Any) -> None:
    """A model as it is, with int8 weights and as ONNX graphs: size, speed, recall."""
    show(measure, table, **options)


if __name__ == "__main__":
    exported()
