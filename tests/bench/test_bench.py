"""`nxtp bench` at its tiny size, as a user runs it, and its refusal of ways that differ."""

import dataclasses
import io
import json
import multiprocessing
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import write_shards
from rich.console import Console

from nxtp.bench import command, models, processes
from nxtp.bench.command import bench
from nxtp.bench.data import write_photos
from nxtp.bench.models import SIZES, Trainer
from nxtp.bench.processes import TOLERANCE, assert_equal, children
from nxtp.bench.reporting import machine_description
from nxtp.bench.train import train_table
from nxtp.data.config import DataConfig
from nxtp.data.mixture import open_set
from nxtp.errors import UserError
from nxtp.inference.pretrained import usable_device
from nxtp.model.flops import peak_memory_bytes
from nxtp.model.layout import MATCHED
from nxtp.model.meta import count_parameters, meta_model
from nxtp.model.model import Model
from nxtp.train import module

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"))

import gpu

pytestmark = pytest.mark.costly


class Here:
    """A child without a process of its own, which takes ten seconds to start."""

    def __init__(self, worker, way, **arguments):
        self.worker = worker(way=way, **arguments)
        self.parameters = self.worker.num_parameters()
        self.baseline = self.peak = peak_memory_bytes(self.worker.device)
        self.pool = SimpleNamespace(shutdown=lambda cancel_futures: None)

    def wait_until_ready(self):
        pass

    def call(self, method, **keywords):
        return getattr(self.worker, method)(**keywords)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Its recipe is composed once."""
    size = SIZES["tiny"]()
    with mock.patch.dict(SIZES, tiny=lambda: size):
        yield


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(processes, "Child", Here)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Labelled photographs for the tiny size."""
    directory = tmp_path_factory.mktemp("photos") / "shards"
    write_photos(directory, 8, 64, 48, seed=0, labelled=True)
    return directory


def run(*arguments: str) -> tuple[dict, str]:
    result = CliRunner().invoke(bench, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    return json.loads(last), result.stdout


def test_train_prints_a_table_and_one_object_last(here, tmp_path):
    profile = tmp_path / "profile"
    numbers, output = run("train", "--size=tiny", "--repeats=1", "--batch-size=2", f"--profile={profile}")
    assert "ours / published" in output
    assert numbers["images_per_s_ratio"] > 0
    assert 0 < numbers["peak_memory_ratio"] < 2
    assert numbers["difference"] < TOLERANCE
    assert set(numbers["rows"]) == {"ours", "published", "ours, matched"}
    assert numbers["machine"]["threads"] >= 1
    assert all(row["tflops"] > 0 and row["mfu"] is None for row in numbers["rows"].values()), "a CPU's peak is unknown"
    assert numbers["precision"] == "32-true"
    assert 0 < numbers["rows"]["ours"]["data_wait"] < 1
    assert "AdamW.step" in (profile / "fit-train.txt").read_text()
    assert list(profile.glob("*.pt.trace.json"))


@pytest.mark.slow  # in processes of their own, as a user does
def test_predict_prints_a_table_and_one_object_last():
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


def test_ours_trains_by_the_recipe_in_its_precision(photos):
    """Lightning's loop, with the recipe's clipping, optimizer and loader: what `nxtp train` would do."""
    for precision, weights, hidden in (
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ):
        worker = Trainer("ours", shards=str(photos), size="tiny", batch_size=2, precision=precision)
        seen = []
        worker.model.projection.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.dtype))
        worker.result()
        clips = mock.patch.object(torch.nn.utils, "clip_grad_norm_", wraps=torch.nn.utils.clip_grad_norm_)
        builds = mock.patch.object(module, "build_optimizer", wraps=module.build_optimizer)
        with clips as clip, builds as build:
            numbers = worker.measure(MATCHED)
        assert seen == [torch.float32, hidden, hidden], "compared; to warm up; measured"
        assert worker.model.projection.weight.dtype == weights
        assert [call.args[1] for call in clip.call_args_list] == [worker.size.recipe.trainer.gradient_clip_val] * 2
        assert build.call_args.args[1] == worker.size.optim
        assert numbers["images_per_s"] > 0
        assert 0 < numbers["data_wait"] < 1, "batches are read while it trains"


def test_ways_agree_where_only_some_parts_train(photos, monkeypatch):
    overrides = ("optim.trainable.encoder=1", "optim.trainable.embedding=false", "data.num_workers=0")
    monkeypatch.setitem(SIZES, "partly trained", lambda: dataclasses.replace(SIZES["tiny"](), overrides=overrides))
    options = {"shards": str(photos), "batch_size": 2}
    ours, published = (Trainer(way, size="partly trained", **options) for way in ("ours", "published"))
    results = ours.result(), published.result()
    assert assert_equal(*results, "step") < TOLERANCE
    assert "gradient of first encoder block" not in results[0]
    assert "gradient of last encoder block" in results[0]


def test_without_a_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device("auto").type == usable_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_one_line_error():
    with pytest.raises(UserError, match="No device 'cuda' on this machine"):
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
    model = meta_model(size.config, None, size.optim.trainable)
    counts = count_parameters(model)
    assert 1.77e9 < counts["total"] < 1.79e9
    assert model.decoder.vocab_size == 32002
    assert model.config.encoder.image_size == 224
    assert size.config.encoder.pretrained is None
    assert size.recipe.trainer.gradient_clip_val is None, "as published"
    assert size.optim.schedule["warmup"] == 2000
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


def test_photographs_have_labels_like_captions(tmp_path):
    def labels(name: str, seed: int) -> list[list[str]]:
        write_photos(tmp_path / name, 40, 16, 12, seed, labelled=True)
        shards = open_set("train", str(tmp_path / name), DataConfig()).shards
        return [shards.read(i).labels for i in range(40)]

    first = labels("a", 0)
    assert first == labels("b", 0) != labels("c", 1)
    assert {len(image) for image in first} == set(range(6, 11))
    assert {len(label.split()) for image in first for label in image} == {1, 2, 3}


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


class Small:
    device = torch.device("cpu")

    def __init__(self, way):
        pass

    def num_parameters(self):
        return 7


def test_a_child_that_dies_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "fork")  # nothing is computed there
    with children(Small) as (ours, _):
        assert ours.call("num_parameters") == ours.parameters == 7
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(UserError, match=r"'ours' ended, perhaps out of memory: .+\Z"):
            ours.call("num_parameters")


def printing(numbers: dict) -> list[str]:
    return [sys.executable, "-c", f"print('a table'); print({json.dumps(numbers)!r})"]


def test_gpu_prints_a_table_and_one_object_last(here, monkeypatch):
    """At the tiny size on a CPU, in this process; a GPU's numbers are made up."""

    limits = []

    def part(arguments: list[str], seconds: float) -> dict:
        limits.append(seconds)
        return run(*arguments[4:-1], *(["--repeats=1", "--steps=1"] if "predict" in arguments else []))[0]

    monkeypatch.setattr(gpu, "bounded", part)
    monkeypatch.setattr(models, "MEASURED_S", 0)
    arguments = ["--size=tiny", "--device=cpu", "--batch-size=2", "--budget=600"]
    result = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    *table, last = result.stdout.splitlines()
    numbers = json.loads(last)
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table[2:]}
    assert len({row.count("|") for row in table[2:]}) == 1
    assert limits[0] <= 300 < limits[1] <= 600, "a part gets its share and what is left of those before"
    assert cells["training, images/s"][2] == f"{numbers['train']['images_per_s_ratio']:.1f}×"
    for name in ("MFU", "peak memory GB", "static shapes with CUDA graphs"):
        assert cells[name][0] == "needs a GPU"
    assert float(cells["memory forecast GB"][0]) >= 0
    assert numbers["forecast_bytes"] > 4 * 4 * numbers["train"]["parameters"], "weights, gradients, two moments"
    assert {"1 labels, ms", "20 labels, ms", "100 labels, ms", "100 labels, batches of 8, images/s"} < set(cells)

    numbers["train"]["rows"]["ours, compiled"] = dict(numbers["train"]["rows"]["ours"])
    for row in numbers["train"]["rows"].values():
        row |= {"mfu": 0.4567, "peak_bytes": 2 * numbers["forecast_bytes"]}
    numbers["static"] = {"rows": {f"compiled@{k}": {"seconds": 0.0123, "ratio": 1.5} for k in (1, 20, 100)}}
    text = gpu.markdown(numbers | {"device": "cuda"})
    assert "| MFU | 45.7% |" in text
    assert "| compiled: MFU | 45.7% |" in text
    assert "0.50× measured" in text
    assert "| static shapes with CUDA graphs, 20 labels, ms | 12.3 |  | 1.50× as it is |" in text


def test_a_part_is_bounded_and_its_error_is_one_line():
    assert gpu.bounded(printing({"a": 1}), 60) == {"a": 1}
    fails = [sys.executable, "-c", "import sys; print('more', file=sys.stderr); sys.exit('error: no memory')"]
    assert gpu.bounded(fails, 60) == {"error": "error: no memory"}
    begin = time.monotonic()
    assert gpu.bounded(["sh", "-c", "sleep 100 & sleep 100"], 0.5) == {"error": "not finished in 0 s"}
    assert time.monotonic() - begin < 20, "what the part has started ends too"


def test_a_part_that_fails_does_not_lose_the_others(monkeypatch):
    monkeypatch.setattr(gpu, "bounded", lambda command, seconds: {"error": "out of memory"})
    monkeypatch.setattr(gpu, "memory", lambda *_: SimpleNamespace(total=12e6))
    result = gpu.measure_gpu(size="tiny", device="cpu", batch_size=2, budget=3, seed=0)
    text = gpu.markdown(result)
    assert "| training | out of memory |" in text
    assert "| prediction | out of memory |" in text
    assert "| memory forecast GB | 0.01 |" in text


@pytest.mark.parametrize("size", ["tiny", "g3m"])
def test_the_commands_of_the_parts_exist(size):
    for name, arguments in gpu.commands(size, "cpu", 2, 0).items():
        if name == "static":
            assert Path(arguments[1]).is_file()
            from static_shapes import static_shapes as target
        else:
            target = bench.commands[arguments[4]]
        target.make_context(name, arguments[2 if name == "static" else 5 :])


@pytest.mark.slow  # in processes of its own, as a user runs it
def test_gpu_runs_as_a_command():
    arguments = ["--size=tiny", "--device=cpu", "--batch-size=2"]
    result = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert numbers["train"]["images_per_s_ratio"] > 0
    assert numbers["predict"]["precision"] == "bf16-true"


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
