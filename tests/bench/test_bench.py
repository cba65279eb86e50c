"""`nxtp bench` at its tiny size, as a user runs it, and its refusal of ways that disagree."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import ending_recognizer, tiny_config, write_shards
from rich.console import Console

from nxtp.bench.command import bench
from nxtp.bench.measure import train_table
from nxtp.bench.padding import batches
from nxtp.bench.processes import TOLERANCE, assert_equal, children, choose_device, machine_description
from nxtp.bench.static import StaticOneShot
from nxtp.bench.workers import DELIMITER, SIZES, Predictor, Trainer, random_labels
from nxtp.errors import UserError
from nxtp.model.flops import count_parameters, meta_model
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig
from nxtp.sampling.one_shot import one_shot


def run(*arguments: str) -> tuple[dict, str]:
    result = CliRunner().invoke(bench, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    return json.loads(last), result.stdout


@pytest.mark.slow
def test_train_prints_a_table_and_one_object_last():
    numbers, output = run("train", "--size", "tiny", "--repeats", "1", "--batch", "2")
    assert "ours / published" in output
    assert numbers["images_per_s_ratio"] > 0
    assert 0 < numbers["peak_memory_ratio"] < 2
    assert numbers["difference"] < TOLERANCE
    assert set(numbers["rows"]) == {"ours", "published", "ours, matched"}
    assert numbers["machine"]["threads"] >= 1
    assert all(row["tflops"] > 0 and row["mfu"] is None for row in numbers["rows"].values()), "a CPU's peak is unknown"
    assert numbers["precision"] == "32-true"


def test_predict_prints_a_table_and_one_object_last():
    numbers, output = run("predict", "--size", "tiny", "--repeats", "1", "--steps", "2", "--batch", "3")
    assert "Top-100" in output
    assert "in batches of 3" in output
    assert all(numbers["rows"][f"ours@{k}"][key] > 0 for k in (1, 20, 100) for key in ("images_per_s", "peak_bytes"))
    keys = ("ratio@20", "ratio@100", "decode_ratio@20", "decode_ratio@100", "top100_over_top1")
    assert all(isinstance(numbers[key], float) for key in keys)
    assert numbers["steps"] == 2
    assert numbers["difference"] < TOLERANCE


def test_closed_prints_a_table_and_one_object_last(tmp_path):
    (tmp_path / "labels.txt").write_text("coffee\ncoffee table\ntable, desk\n")
    labels = str(tmp_path / "labels.txt")
    numbers, output = run("closed", "--size", "tiny", "--repeats", "1", "--steps", "2", "--labels", labels)
    assert "3 labels" in output
    assert (numbers["labels"], numbers["names"]) == (3, 4)
    assert numbers["nodes"] < numbers["tokens"]
    assert numbers["ratio"] == pytest.approx(numbers["seconds"]["classify"] / numbers["seconds"]["predict"])
    assert numbers["difference"] < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("command", "precision"), [("train", "bf16-mixed"), ("predict", "bf16-true")])
def test_narrow_types_are_measured_and_float32_is_compared(command, precision):
    numbers, output = run(command, "--size=tiny", "--repeats=1", "--batch=2", f"--precision={precision}")
    assert numbers["precision"] == precision
    assert numbers["difference"] < TOLERANCE
    assert "in float32" in " ".join(output.split())


def test_a_worker_measures_in_its_precision():
    for precision, weights, hidden in (
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ):
        worker = Trainer("ours", SIZES["tiny"], batch=2, seed=0, precision=precision)
        seen = []
        worker.model.projection.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.dtype))
        worker.result()
        worker.narrow()
        worker.measure("matched")
        assert seen == [torch.float32, hidden]
        assert worker.model.projection.weight.dtype == weights


def test_ways_agree_where_only_some_parts_train():
    size = dataclasses.replace(SIZES["tiny"], trainable=TrainableConfig(encoder=1, embedding=False))
    ours, theirs = (Trainer(way, size, batch=2, seed=0) for way in ("ours", "published"))
    results = ours.result(), theirs.result()
    assert assert_equal(*results, "step") < TOLERANCE
    assert "gradient of first encoder block" not in results[0]
    assert "gradient of last encoder block" in results[0]
    assert (
        ours.flops("published") == theirs.flops("published") < Trainer("ours", SIZES["tiny"], 2, 0).flops("published")
    )


def test_a_missing_gpu_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match="no GPU"):
        CliRunner().invoke(bench, ["train", "--device", "cuda", "--size", "tiny"], catch_exceptions=False)


def test_mfu_is_shown_where_the_peak_is_known():
    row = {"seconds": 0.5, "images_per_s": 4.0, "tflops": 3.5, "mfu": 0.4567, "peak_bytes": 2e9}
    result = {"rows": {"ours": row | {"peak_above_model_bytes": 1e9}}, "machine": machine_description()}
    result |= {"images_per_s_ratio": 3.0, "peak_memory_ratio": 0.5, "peak_above_model_ratio": 0.4, "difference": 1e-6}
    result |= {"size": "g3m", "batch": 2, "repeats": 1, "parameters": 1, "precision": "bf16-mixed"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(train_table(result))
    console.print(train_table(result | {"machine": result["machine"] | {"gpu": "NVIDIA H100 PCIe"}}))
    text = console.export_text()
    assert "45.7%" in text
    assert "the published parts train" in text
    assert "NVIDIA H100 PCIe, torch" in text


def test_g3m_is_the_published_recipe():
    size = SIZES["g3m"]
    model = meta_model(size.config(), None, size.trainable)
    counts = count_parameters(model)
    assert 1.77e9 < counts["total"] < 1.79e9
    assert model.decoder.vocab_size == size.vocab
    assert model.config.encoder.image_size == size.image_size
    assert 0 < counts["encoder_trained"] < counts["encoder"] / 3
    assert not model.decoder.lm.model.embed_tokens.weight.requires_grad


def test_the_full_size_is_what_is_said():
    size = SIZES["full"]
    with torch.device("meta"):
        model = Model(size.config())
    assert model.num_image_tokens == 256
    assert 90e6 < sum(p.numel() for p in model.parameters()) < 110e6
    labels = random_labels(64, size.vocab, seed=0)
    assert labels == random_labels(64, size.vocab, seed=0) != random_labels(64, size.vocab, seed=1)
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


def test_a_child_that_dies_is_a_one_line_error():
    with (
        children(Predictor, size=SIZES["tiny"], batch=1, seed=0) as (ours, _),
        pytest.raises(UserError, match=r"'ours' ended"),
    ):
        ours.ask("no such method")


@pytest.mark.slow
def test_metric_prints_a_table_and_one_object_last():
    numbers, output = run("metric", "--images", "300", "--plain-images", "2")
    assert "one at a time" in output
    assert numbers["labels_per_s_ratio"] > 1
    assert numbers["difference"] < 1e-5
    assert numbers["distinct_labels"] < 300 * 15 / 2, "a Zipf stream repeats its words"
    assert 0 < numbers["f1"] < 1


def test_data_prints_a_table_and_one_object_last():
    numbers, output = run("data", "--images=20", "--width=64", "--height=48", "--size=32", "--batch=8")
    assert "open_clip get_wds_dataset" in output
    assert all(row["images_per_s"] > 0 and row["cpu_ms"] > 0 for row in numbers["rows"].values())
    assert len(numbers["rows"]) == 3
    assert numbers["ratio_plain"] > 0
    assert numbers["ratio_open_clip"] > 0
    assert numbers["pixel_difference"] < 0.1
    assert numbers["cores_per_h100"] > 0


def test_data_reads_real_shards_and_refuses_too_few(tmp_path):
    write_shards(tmp_path, [9])
    numbers, _ = run("data", "--shards", str(tmp_path), "--size", "16", "--batch", "4", "--repeats", "1")
    assert numbers["images"] == 9
    with pytest.raises(UserError, match="fewer than one batch of 10"):
        CliRunner().invoke(bench, ["data", "--shards", str(tmp_path), "--batch", "10"], catch_exceptions=False)


def test_padding_prints_a_table_and_one_object_last():
    numbers, output = run("padding", "--images", "640")
    assert "Bucketing saves" in output
    plain, bucketed = numbers["rows"]["as they come"], numbers["rows"]["bucketed by length"]
    assert numbers["prefix"] == 256 + 1 + 7
    assert 0 < bucketed["padding"] < plain["padding"] < 0.05
    assert 0 < numbers["bucketing_saves"] < numbers["packing_saves"] < plain["padding"], "an encoder has no padding"
    assert plain["length"] * (1 - plain["padding"]) == pytest.approx(numbers["prefix"] + numbers["label_tokens"])
    with pytest.raises(UserError, match="--nouns"):
        CliRunner().invoke(bench, ["padding", "--nouns", "0.5"], catch_exceptions=False)


def test_padding_of_real_shards(tmp_path):
    write_shards(tmp_path, [12])  # two nouns a caption
    numbers, _ = run("padding", "--shards", str(tmp_path), "--experiment", "scenes", "--batch", "4")
    assert numbers["images"] == 12
    assert 4 <= numbers["label_tokens"] < 12
    with pytest.raises(UserError, match="fewer than one batch of 16"):
        CliRunner().invoke(bench, ["padding", "--shards", str(tmp_path)], catch_exceptions=False)


def test_bucketed_batches_hold_every_sample_once_and_less_padding():
    labels = [[[i] * (1 + i % 7)] for i in range(96)]
    plain, bucketed = batches(labels, 8, 1, seed=0), batches(labels, 8, 6, seed=0)
    for made in (plain, bucketed):
        assert sorted(label[0][0] for batch in made for label in batch) == list(range(96))
        assert [len(batch) for batch in made] == [8] * 12

    def spread(made):
        return sum(max(len(image[0]) for image in batch) - len(image[0]) for batch in made for image in batch)

    assert spread(bucketed) < spread(plain) / 3


@pytest.mark.parametrize(("ends", "kv_heads"), [(30.0, 4), (30.0, 2), (0.0, 4)])
def test_fixed_shapes_give_the_same_labels(ends, kv_heads):
    torch.manual_seed(1)
    model = Model(tiny_config(num_key_value_heads=kv_heads), 400).eval()
    with torch.no_grad():
        model.decoder.lm.model.embed_tokens.weight.normal_()
        model.decoder.lm.lm_head.weight[DELIMITER] *= ends
    static = StaticOneShot(compiled=False, device=torch.device("cpu"))
    options = {"prompt": [1, 7, 8], "delimiter": DELIMITER, "max_tokens": 6, "never_first": [DELIMITER]}
    for seed, k in ((0, 12), (1, 12), (2, 1)):  # the second call finds the first one's keys in its cache
        images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(seed)).byte()
        expected, given = one_shot(model, images, top_k=k, **options), static(model, images, top_k=k, **options)
        assert torch.equal(given.tokens_BKL, expected.tokens_BKL)
        assert torch.equal(given.cut_BK, expected.cut_BK)
        torch.testing.assert_close(given.probs_BKL, expected.probs_BKL, rtol=1e-5, atol=1e-5)
        assert k == 1 or expected.lengths_BK.unique().numel() >= 3 or ends == 0
    assert len(static.caches) == 2


@pytest.mark.slow
def test_static_compiles_prints_a_table_and_one_object_last():
    numbers, output = run("static", "--size=tiny", "--repeats=1", "--batch=2", "--tokens=5")
    assert "first call compiles" in output
    assert numbers["difference"] < TOLERANCE
    rows = numbers["rows"]
    assert len(rows) == 9
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A model directory and shards that are like its training's."""
    root = tmp_path_factory.mktemp("used")
    ending_recognizer().save_pretrained(root / "model")
    write_shards(root / "val", [12], labels=True)
    return root


@pytest.mark.slow
def test_export_prints_a_table_and_one_object_last(used):
    given = ("--model", str(used / "model"), "--data", str(used / "val"), "--images", "10", "--repeats", "1")
    result, printed = run("export", *given)
    assert {"PyTorch", "ONNX", "ONNX int8"} <= set(result["rows"])
    assert result["rows"]["PyTorch"]["difference"] == 0
    assert result["rows"]["ONNX"]["difference"] < 1e-4
    assert result["rows"]["ONNX"]["difference"] < result["rows"]["ONNX int8"]["difference"] < 0.2
    assert result["images"] == 10
    assert "recall" in printed


@pytest.mark.slow
def test_serve_prints_a_table_and_one_object_last(used):
    given = ("--model", str(used / "model"), "--data", str(used / "val"))
    result, printed = run("serve", *given, "--requests", "12", "--clients", "4", "--repeats", "1")
    assert result["ratio"] > 0
    assert all(0 < row["p50"] <= row["p95"] for row in result["rows"].values())
    assert "one by one" in printed
