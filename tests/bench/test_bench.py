"""`nxtp bench` at its tiny size, as a user runs it, and its refusal of ways that differ."""

import dataclasses
import io
import json
import multiprocessing

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import forks, start_fork_server, write_shards
from rich.console import Console

from nxtp.bench import command, processes
from nxtp.bench.command import bench
from nxtp.bench.models import SIZES, Predictor, Trainer, random_labels, tiny
from nxtp.bench.processes import TOLERANCE, assert_equal, children
from nxtp.bench.reporting import choose_device, machine_description
from nxtp.bench.train import train_table
from nxtp.errors import UserError
from nxtp.model.flops import count_parameters, meta_model
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig

pytestmark = pytest.mark.costly


@pytest.fixture
def forked(monkeypatch):
    """Children forked from a process that has imported the libraries, which a spawned one takes seconds for."""
    start_fork_server()
    monkeypatch.setattr(processes, "START_METHOD", forks.get_start_method())


def run(*arguments: str) -> tuple[dict, str]:
    result = CliRunner().invoke(bench, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    return json.loads(last), result.stdout


@pytest.mark.slow
def test_train_prints_a_table_and_one_object_last():
    numbers, output = run("train", "--size", "tiny", "--repeats", "1", "--batch-size", "2")
    assert "ours / published" in output
    assert numbers["images_per_s_ratio"] > 0
    assert 0 < numbers["peak_memory_ratio"] < 2
    assert numbers["difference"] < TOLERANCE
    assert set(numbers["rows"]) == {"ours", "published", "ours, matched"}
    assert numbers["machine"]["threads"] >= 1
    assert all(row["tflops"] > 0 and row["mfu"] is None for row in numbers["rows"].values()), "a CPU's peak is unknown"
    assert numbers["precision"] == "32-true"


@pytest.mark.slow  # as train, above; the cheap test of a whole command is that of data
def test_predict_prints_a_table_and_one_object_last(forked):
    numbers, output = run("predict", "--size", "tiny", "--repeats", "1", "--steps", "2", "--batch-size", "3")
    assert "Top-100" in output
    assert "in batches of 3" in output
    assert all(numbers["rows"][f"ours@{k}"][key] > 0 for k in (1, 20, 100) for key in ("images_per_s", "peak_bytes"))
    keys = ("ratio@20", "ratio@100", "decode_ratio@20", "decode_ratio@100", "top100_over_top1")
    assert all(isinstance(numbers[key], float) for key in keys)
    assert numbers["steps"] == 2
    assert numbers["difference"] < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("command", "precision"), [("train", "bf16-mixed"), ("predict", "bf16-true")])
def test_narrow_types_are_measured_and_float32_is_compared(command, precision):
    numbers, output = run(command, "--size=tiny", "--repeats=1", "--batch-size=2", f"--precision={precision}")
    assert numbers["precision"] == precision
    assert numbers["difference"] < TOLERANCE
    assert "in float32" in " ".join(output.split())


def test_a_worker_measures_in_its_precision():
    for precision, weights, hidden in (
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ):
        worker = Trainer("ours", size="tiny", batch_size=2, precision=precision)
        seen = []
        worker.model.projection.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.dtype))
        worker.result()
        worker.use_precision()
        worker.measure("matched")
        assert seen == [torch.float32, hidden]
        assert worker.model.projection.weight.dtype == weights


def test_ways_agree_where_only_some_parts_train(monkeypatch):
    size = dataclasses.replace(tiny(), trainable=TrainableConfig(encoder=1, embedding=False))
    monkeypatch.setitem(SIZES, "partly trained", lambda: size)
    ours, published = (Trainer(way, size="partly trained", batch_size=2) for way in ("ours", "published"))
    results = ours.result(), published.result()
    assert assert_equal(*results, "step") < TOLERANCE
    assert "gradient of first encoder block" not in results[0]
    assert "gradient of last encoder block" in results[0]
    everything = Trainer("ours", size="tiny", batch_size=2)
    assert ours.flops("published") == published.flops("published") < everything.flops("published")


def test_a_missing_gpu_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match="finds no GPU"):
        CliRunner().invoke(bench, ["train", "--device", "cuda", "--size", "tiny"], catch_exceptions=False)


def test_mfu_is_shown_where_the_peak_is_known():
    row = {"seconds": 0.5, "images_per_s": 4.0, "tflops": 3.5, "mfu": 0.4567, "peak_bytes": 2e9}
    result = {"rows": {"ours": row | {"peak_above_model_bytes": 1e9}}, "machine": machine_description()}
    result |= {"images_per_s_ratio": 3.0, "peak_memory_ratio": 0.5, "peak_above_model_ratio": 0.4, "difference": 1e-6}
    result |= {"size": "g3m", "batch_size": 2, "repeats": 1, "parameters": 1, "precision": "bf16-mixed"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(train_table(result))
    console.print(train_table(result | {"machine": result["machine"] | {"gpu": "NVIDIA H100 PCIe"}}))
    text = console.export_text()
    assert "45.7%" in text
    assert "the published parts train" in text
    assert "NVIDIA H100 PCIe, torch" in text


def test_g3m_is_the_published_recipe():
    size = SIZES["g3m"]()
    model = meta_model(size.config, None, size.trainable)
    counts = count_parameters(model)
    assert 1.77e9 < counts["total"] < 1.79e9
    assert model.decoder.vocab_size == 32002
    assert model.config.encoder.image_size == 224
    assert size.config.encoder.pretrained is None
    assert size.pad_to == 512
    assert 0 < counts["encoder_trained"] < counts["encoder"] / 3
    assert not model.decoder.lm.model.embed_tokens.weight.requires_grad


def test_the_full_size_is_as_documented():
    assert set(command.SIZES) == set(SIZES)
    with torch.device("meta"):
        model = Model(SIZES["full"]().config)
    vocab = model.decoder.vocab_size
    assert vocab == 32000
    assert model.num_image_tokens == 256
    assert 90e6 < sum(p.numel() for p in model.parameters()) < 110e6
    labels = random_labels(64, vocab, seed=0)
    assert labels == random_labels(64, vocab, seed=0) != random_labels(64, vocab, seed=1)
    assert {len(image) for image in labels} == set(range(6, 11))
    assert {len(label) for image in labels for label in image} == {1, 2, 3}


def test_results_that_differ_are_refused():
    good = {"loss": np.float32(2.0), "gradient": np.ones((2, 3))}
    assert assert_equal(good, good, "step") == 0
    for wrong in (good | {"loss": np.float32(2.001)}, good | {"gradient": np.full((2, 3), np.nan)}):
        with pytest.raises(UserError, match="step"):
            assert_equal(wrong, good, "step")
    with pytest.raises(UserError, match="differs"):
        assert_equal(good | {"gradient": np.ones((3, 2))}, good, "step")
    tokens = {"tokens": np.array([[1, 2]])}
    with pytest.raises(UserError, match="other tokens"):
        assert_equal({"tokens": np.array([[1, 3]])}, tokens, "top-2")


def test_a_child_that_dies_is_a_one_line_error(forked):
    with children(Predictor, size="tiny", batch_size=1) as (ours, _):
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(UserError, match=r"'ours' ended, perhaps out of memory: .+\Z"):
            ours.call("num_parameters")


@pytest.mark.slow
def test_metric_prints_a_table_and_one_object_last():
    numbers, output = run("metric", "--images", "300", "--plain-images", "2")
    assert "one at a time" in output
    assert numbers["labels_per_s_ratio"] > 1
    assert numbers["difference"] < 1e-5
    assert numbers["distinct_labels"] < 300 * 15 / 2, "a Zipf stream repeats its words"
    assert 0 < numbers["f1"] < 1


def test_data_prints_a_table_and_one_object_last():
    numbers, output = run("data", "--images=20", "--width=64", "--height=48", "--size=32", "--batch-size=8")
    assert "open_clip get_wds_dataset" in output
    assert all(row["images_per_s"] > 0 and row["cpu_ms"] > 0 for row in numbers["rows"].values())
    assert len(numbers["rows"]) == 3
    assert numbers["ratio_plain"] > 0
    assert numbers["ratio_open_clip"] > 0
    assert numbers["pixel_difference"] < 0.1
    assert numbers["cores_per_h100"] > 0


def test_data_reads_real_shards_and_refuses_too_few(tmp_path):
    write_shards(tmp_path, [9])
    numbers, _ = run("data", "--shards", str(tmp_path), "--size", "16", "--batch-size", "4", "--repeats", "1")
    assert numbers["images"] == 9
    with pytest.raises(UserError, match="fewer than one batch of 10"):
        CliRunner().invoke(bench, ["data", "--shards", str(tmp_path), "--batch-size", "10"], catch_exceptions=False)
