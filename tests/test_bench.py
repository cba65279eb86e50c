"""`nxtp bench` at its tiny size, as a user runs it, and its refusal of ways that disagree."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_shards

from nxtp.bench import bench
from nxtp.bench.processes import TOLERANCE, assert_equal, children
from nxtp.bench.workers import SIZES, Predictor, random_labels
from nxtp.errors import UserError
from nxtp.model import Model


def run(*arguments: str) -> tuple[dict, str]:
    result = CliRunner().invoke(bench, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    return json.loads(last), result.stdout


def test_train_prints_a_table_and_one_object_last():
    numbers, output = run("train", "--size", "tiny", "--repeats", "1", "--batch", "2")
    assert "ours / published" in output
    assert numbers["images_per_s_ratio"] > 0
    assert 0 < numbers["peak_memory_ratio"] < 2
    assert numbers["difference"] < TOLERANCE
    assert set(numbers["rows"]) == {"ours", "published", "ours, matched"}
    assert numbers["machine"]["threads"] >= 1


def test_predict_prints_a_table_and_one_object_last():
    numbers, output = run("predict", "--size", "tiny", "--repeats", "1", "--steps", "2")
    assert "Top-100" in output
    keys = ("ratio@20", "ratio@100", "decode_ratio@20", "decode_ratio@100", "top100_over_top1")
    assert all(isinstance(numbers[key], float) for key in keys)
    assert numbers["steps"] == 2
    assert numbers["difference"] < TOLERANCE


def test_the_full_size_is_what_is_said():
    import torch

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
