"""The scripts of experiments/benchmarks at toy size, as a user runs them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click import ClickException
from click.testing import CliRunner
from helpers import ending_recognizer, tiny_config, write_shards

from nxtp.bench.models import DELIMITER
from nxtp.bench.processes import TOLERANCE
from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.sampling.one_shot import one_shot

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"))

import starting
from closed_vocabulary import closed_vocabulary
from open_shards import open_shards
from padding import batches, padding
from static_shapes import StaticOneShot, static_shapes


def run(command, *arguments: str) -> tuple[dict, str]:
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    return json.loads(last), result.stdout


def test_closed_prints_a_table_and_one_object_last(tmp_path):
    (tmp_path / "labels.txt").write_text("coffee\ncoffee table\ntable, desk\n")
    labels = str(tmp_path / "labels.txt")
    numbers, output = run(closed_vocabulary, "--size", "tiny", "--repeats", "1", "--steps", "2", "--classes", labels)
    assert "3 labels" in output
    assert (numbers["labels"], numbers["names"]) == (3, 4)
    assert numbers["nodes"] < numbers["tokens"]
    assert numbers["ratio"] == pytest.approx(numbers["seconds"]["classify"] / numbers["seconds"]["predict"])
    assert numbers["difference"] < TOLERANCE


def test_many_shards_are_opened_without_one():
    found, _ = run(open_shards, "--shards", "300")
    assert found["plan"].startswith("300 shards of 1,51")
    assert found["agree"]
    assert all(row["opened_s"] < row["first_batch_s"] < 20 for row in found["rows"].values())
    assert all(0 < row["worker_mb"] < row["own_mb"] < row["memory_mb"] for row in found["rows"].values())


def test_starting_times_commands_beside_their_imports(monkeypatch):
    commands = {"--help": ("", ""), "sweep --help": ("json", "Show the state of a sweep")}
    monkeypatch.setattr(starting, "COMMANDS", commands)
    numbers, output = run(starting.starting, "--repeats", "1")
    assert "nxtp sweep --help" in output
    helped, sweep = numbers["rows"]
    assert "ratio" not in helped
    assert sweep["ratio"] == pytest.approx(sweep["s"] / sweep["imports_s"])
    with pytest.raises(ClickException, match="no-such-command failed with exit code 2"):
        starting.seconds(["-m", "nxtp", "no-such-command"])


@pytest.mark.slow  # padding was measured once; its answer is in experiments/benchmarks/README.md
def test_padding_prints_a_table_and_one_object_last():
    numbers, output = run(padding, "--images", "640")
    assert "Bucketing saves" in output
    plain, bucketed = numbers["rows"]["as they come"], numbers["rows"]["bucketed by length"]
    assert numbers["prefix"] == 256 + 1 + 7
    assert 0 < bucketed["padding"] < plain["padding"] < 0.05
    assert 0 < numbers["bucketing_saves"] < numbers["packing_saves"] < plain["padding"], "an encoder has no padding"
    assert plain["length"] * (1 - plain["padding"]) == pytest.approx(numbers["prefix"] + numbers["label_tokens"])
    with pytest.raises(UserError, match="--nouns"):
        CliRunner().invoke(padding, ["--nouns", "0.5"], catch_exceptions=False)


@pytest.mark.slow  # as above
def test_padding_of_real_shards(tmp_path):
    write_shards(tmp_path, [12])  # two nouns per caption
    numbers, _ = run(padding, "--shards", str(tmp_path), "--experiment", "scenes", "--batch-size", "4")
    assert numbers["images"] == 12
    assert 4 <= numbers["label_tokens"] < 12
    with pytest.raises(UserError, match="fewer than one batch of 16"):
        CliRunner().invoke(padding, ["--shards", str(tmp_path)], catch_exceptions=False)


def test_bucketed_batches_have_every_sample_once_and_less_padding():
    labels = [[[i] * (1 + i % 7)] for i in range(96)]
    plain, bucketed = batches(labels, 8, 1, seed=0), batches(labels, 8, 6, seed=0)
    for epoch in (plain, bucketed):
        assert sorted(label[0][0] for batch in epoch for label in batch) == list(range(96))
        assert [len(batch) for batch in epoch] == [8] * 12

    def spread(epoch):
        return sum(max(len(image[0]) for image in batch) - len(image[0]) for batch in epoch for image in batch)

    assert spread(bucketed) < spread(plain) / 3


@pytest.mark.parametrize(("ends", "kv_heads"), [pytest.param(30.0, 4, marks=pytest.mark.slow), (30.0, 2), (0.0, 4)])
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
        expected, found = one_shot(model, images, top_k=k, **options), static(model, images, top_k=k, **options)
        assert torch.equal(found.tokens_BKL, expected.tokens_BKL)
        assert torch.equal(found.cut_BK, expected.cut_BK)
        torch.testing.assert_close(found.probs_BKL, expected.probs_BKL, rtol=1e-5, atol=1e-5)
        assert k == 1 or expected.lengths_BK.unique().numel() >= 3 or ends == 0
    assert len(static.caches) == 2


@pytest.mark.slow
def test_static_compiles_prints_a_table_and_one_object_last():
    numbers, output = run(static_shapes, "--size=tiny", "--repeats=1", "--batch-size=2", "--tokens=5")
    assert "first call compiles" in output
    assert numbers["difference"] < TOLERANCE
    rows = numbers["rows"]
    assert len(rows) == 9
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model directory and shards like those that it was trained on."""
    root = tmp_path_factory.mktemp("trained")
    ending_recognizer().save_pretrained(root / "model")
    write_shards(root / "val", [12], labels=True)
    return root


@pytest.mark.slow
def test_export_prints_a_table_and_one_object_last(trained):
    from exported import exported

    options = ("--model", str(trained / "model"), "--data", str(trained / "val"), "--images", "10", "--repeats", "1")
    result, printed = run(exported, *options)
    assert {"PyTorch", "ONNX", "ONNX int8"} <= set(result["rows"])
    assert result["rows"]["PyTorch"]["difference"] == 0
    assert result["rows"]["ONNX"]["difference"] < 1e-4
    assert result["rows"]["ONNX"]["difference"] < result["rows"]["ONNX int8"]["difference"] < 0.2
    assert result["images"] == 10
    assert "recall" in printed


@pytest.mark.slow
def test_serve_prints_a_table_and_one_object_last(trained):
    from server import server

    options = ("--model", str(trained / "model"), "--data", str(trained / "val"))
    result, printed = run(server, *options, "--requests", "12", "--clients", "4", "--repeats", "1")
    assert result["ratio"] > 0
    assert all(0 < row["p50"] <= row["p95"] for row in result["rows"].values())
    assert "one by one" in printed


@pytest.mark.slow  # starts both servers, as a user does
def test_soak_finds_no_errors_and_prints_one_object_last():
    from soak import soak

    result, printed = run(soak, "--minutes", "0.2", "--clients", "4")
    for row in result["rows"].values():
        assert row["errors"] == {}
        assert row["requests"]["good"] > 0
        assert (row["tracebacks"], row["left"]) == (0, [])
    assert "nxtp app" in printed
