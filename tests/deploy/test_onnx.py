"""ONNX graphs and their runner: the same labels and probabilities, without torch."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import COLOURS, call_nxtp, ending_recognizer, jpeg, recognizer
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from nxtp.data.images import ImageError
from nxtp.data.transforms import ImageTransform, to_pixels
from nxtp.deploy.onnx.export import DecoderGraph, EncoderGraph, cleans_spaces, quantize, runner_config
from nxtp.deploy.onnx.pixels import to_pixels as numpy_pixels
from nxtp.deploy.onnx.runner import OnnxRecognizer
from nxtp.errors import UserError
from nxtp.model.attention_rule import attention_mask

pytestmark = pytest.mark.costly
IMAGES = [jpeg(colour, size=40 + i, seed=i) for i, colour in enumerate(COLOURS.values())]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def model():
    return ending_recognizer(surplus=20, num_key_value_heads=2)


@pytest.fixture(scope="module")
def graphs(model, place):
    model.save_pretrained(place / "model")
    done = call_nxtp("export", "model", "--format", "onnx", "--out", "graphs", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("graphs: ONNX graphs with float32 weights")
    assert len(done.stderr.splitlines()) == 1, "nothing of the exporter's own insides"
    return place / "graphs"


@pytest.fixture(scope="module")
def runner(graphs):
    return OnnxRecognizer(graphs, threads=1)


def assert_same(found, expected):
    """Relative: of random weights every probability is small, and an absolute 1e-4 would let a wrong mask pass."""
    for ours, theirs in zip(found, expected, strict=True):
        assert dict(ours) == pytest.approx(dict(theirs), rel=1e-4, abs=1e-12)
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("top_k", [1, 7, 60])
def test_labels_and_probabilities_are_the_models(model, runner, top_k):
    assert_same(runner.predict(IMAGES, top_k), model.predict(IMAGES, top_k))
    assert_same([runner.predict(IMAGES[2], top_k)], [model.predict(IMAGES[2], top_k)])
    assert_same(runner.predict(IMAGES, top_k, batch_size=3), runner.predict(IMAGES, top_k, batch_size=1))


def test_spaces_are_cleaned_where_transformers_cleans_them():
    """It ignores the setting for byte pairs."""
    made = recognizer()
    for setting in (False, True):
        made.tokenizer.tokenizer.clean_up_tokenization_spaces = setting
        assert not runner_config(made, "float32").cleans_spaces
    pieces = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, ",": 2, "b": 3, ".": 4}, unk_token="[UNK]"))
    pieces.pre_tokenizer = Whitespace()
    for setting in (False, True):
        fast = PreTrainedTokenizerFast(tokenizer_object=pieces, clean_up_tokenization_spaces=setting)
        assert cleans_spaces(fast) == setting
    runner = object.__new__(OnnxRecognizer)
    runner.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " women 's shoe , o ' clock ")
    runner.config = SimpleNamespace(cleans_spaces=True)
    assert runner._text([]) == "women's shoe, o'clock"


def test_labels_end_at_different_lengths(model):
    """Otherwise no branch would be dropped in the comparison above."""
    labels = {label for image in model.predict(IMAGES, 60) for label, _ in image}
    lengths = {len(ids) for ids in model.tokenizer.encode_labels(sorted(labels))}
    assert min(lengths) < 5
    assert max(lengths) > 10


def test_the_decoder_of_a_model_that_pools_is_the_models():
    """Its prefix and a step, as the runner asks for them."""
    model = ending_recognizer().model.eval()
    model.config.pool = True
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    prompt, graph, count = torch.tensor([[1, 5, 7]] * 2), DecoderGraph(model), model.num_image_tokens
    lm, length = model.decoder.lm.config, count + 4
    empty = torch.zeros(
        len(model.decoder.blocks), 2, lm.num_key_value_heads, 0, lm.hidden_size // lm.num_attention_heads
    )
    with torch.inference_mode():
        first_BV, cache = model.prefill(pixels, prompt[0].tolist())
        mask = attention_mask(torch.zeros(1, length, dtype=torch.long), count)
        index, last = torch.arange(length)[None], torch.tensor([-1])
        found, keys, values = graph(EncoderGraph(model)(pixels), prompt, index, mask, last, empty, empty)
        torch.testing.assert_close(found[:, 0], first_BV)
        tokens, seen = first_BV.argmax(dim=1, keepdim=True), torch.ones(1, 1, 1, length + 1, dtype=torch.bool)
        expected = model.step(tokens, length, seen, cache)
        nothing, place = torch.zeros(2, 0, model.decoder.width), torch.tensor([[length]])
        found, *_ = graph(nothing, tokens, place, seen, torch.tensor([0]), keys, values)
        torch.testing.assert_close(found, expected)


def test_one_weight_changed_is_seen(model, runner):
    """The comparison above can fail."""
    with torch.no_grad():
        model.model.projection.weight[0, 0] += 1
    try:
        with pytest.raises(AssertionError):
            assert_same(runner.predict(IMAGES, 7), model.predict(IMAGES, 7))
    finally:
        with torch.no_grad():
            model.model.projection.weight[0, 0] -= 1


@pytest.mark.parametrize("size", [(640, 427), (33, 500), (97, 96), (40, 30), (300, 2900), (1, 1), (64, 64), (5, 3000)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("side", "interpolation"), [(32, "bicubic"), (64, "bicubic"), (32, "bilinear")])
def test_pixels_are_torchs_to_the_bit(size, side, interpolation, resize_mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    how = (side, interpolation, resize_mode)
    assert np.array_equal(numpy_pixels(image, *how), to_pixels(image, *how).numpy())


def test_the_runner_prepares_images_as_the_model_does(graphs, tmp_path):
    model = recognizer()
    model.pixels = ImageTransform(32, "bilinear", "squash")
    config = runner_config(model, "float32")
    for name in ("encoder.onnx", "decoder.onnx", "encoder.onnx.data", "decoder.onnx.data", "tokenizer.json"):
        (tmp_path / name).symlink_to(graphs / name)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    image = Image.effect_noise((90, 40), 90).convert("RGB")
    assert np.array_equal(OnnxRecognizer(tmp_path).transform(image), model.transform(image).numpy())
    before = {k: v for k, v in asdict(config).items() if k not in ("interpolation", "resize_mode")}
    (tmp_path / "config.json").write_text(json.dumps(before | {"format": 1}))
    assert np.array_equal(OnnxRecognizer(tmp_path).transform(image), ImageTransform(32)(image).numpy())


def test_int8_weights_are_smaller_and_nearly_the_same(graphs, place, runner):
    shutil.copytree(graphs, place / "int8")
    for name in ("encoder.onnx", "decoder.onnx"):
        quantize(place / "int8" / name)
    narrow = OnnxRecognizer(place / "int8")
    sizes = [(place / name / "decoder.onnx.data").stat().st_size for name in ("graphs", "int8")]
    assert sizes[1] < 0.8 * sizes[0]  # embeddings and norms stay
    for ours, theirs in zip(narrow.predict(IMAGES, 5), runner.predict(IMAGES, 5), strict=True):
        assert dict(ours).get(theirs[0][0], 0) == pytest.approx(theirs[0][1], abs=0.02)
        assert ours != theirs


def test_the_runner_needs_no_torch(graphs, place):
    (place / "a.jpg").write_bytes(IMAGES[0])
    (place / "b.jpg").write_bytes(b"no picture")
    blocked = ("torch", "torchvision", "transformers", "lightning", "open_clip", "timm", "hydra", "onnx", "scipy")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += f"sys.argv = ['nxtp.deploy.onnx', {str(graphs)!r}, 'a.jpg', 'b.jpg', '--top-k', '3', '--json']\n"
    code += "import runpy; runpy.run_module('nxtp.deploy.onnx', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: b.jpg: not an image in a known format"]
    (row,) = map(json.loads, done.stdout.splitlines())
    expected = OnnxRecognizer(graphs).predict(IMAGES[0], 3)
    assert [(label["label"], label["probability"]) for label in row["labels"]] == [
        (label, pytest.approx(probability)) for label, probability in expected
    ]


def test_a_reader_that_has_enough_gets_no_traceback(graphs, place):
    (place / "a.jpg").write_bytes(IMAGES[0])
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nxtp.deploy.onnx", graphs, place / "a.jpg"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_directory_is_whole_and_bad_options_are_told(graphs, place):
    assert sorted(path.name for path in graphs.iterdir()) == [
        "config.json", "decoder.onnx", "decoder.onnx.data", "encoder.onnx", "encoder.onnx.data", "tokenizer.json",
    ]  # fmt: skip
    for arguments, told in (
        (("model", "--format", "onnx", "--out", "graphs"), "'graphs' exists"),
        (("model", "--out", "x", "--int8"), "--int8 needs --format onnx"),
        (("gone", "--format", "onnx", "--out", "x"), "No model directory 'gone'"),
    ):
        done = call_nxtp("export", *arguments, cwd=place)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert told in done.stderr
    done = call_nxtp("export", "model", cwd=place)
    assert done.returncode == 2
    assert "'--out'" in done.stderr


def test_without_onnxruntime_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("export", "runner"):
        monkeypatch.delitem(sys.modules, f"nxtp.deploy.onnx.{name}")
    done = call_nxtp("export", "model", "--format", "onnx", "--out", "x", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: ONNX needs onnxruntime: pip install 'nxtp[onnx]'.\n")


def test_bad_input_is_told_in_a_line(runner, graphs, tmp_path):
    (tmp_path / "x.jpg").write_text("x")
    with pytest.raises(ImageError, match=r"x\.jpg"):
        runner.predict(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="top_k must be ≥ 1, got 0"):
        runner.predict(IMAGES[0], 0)
    assert runner.predict([]) == []
    with pytest.raises(UserError, match="not a directory of ONNX graphs"):
        OnnxRecognizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a configuration"):
        OnnxRecognizer(tmp_path)
    (tmp_path / "config.json").write_text((graphs / "config.json").read_text().replace('"format": 2', '"format": 9'))
    with pytest.raises(UserError, match="format 9"):
        OnnxRecognizer(tmp_path)
    (tmp_path / "config.json").write_text((graphs / "config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded"):
        OnnxRecognizer(tmp_path)


FULL_SIZE = """
import resource, sys, torch
from pathlib import Path
from transformers.initialization import no_init_weights
from nxtp.deploy.onnx.export import export_onnx, quantize
from nxtp.inference.recognizer import Recognizer
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import train_tokenizer

if sys.argv[1] == "export":
    llama = dict(model_type="llama", hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    blocks = DecoderConfig(config=llama | {"num_hidden_layers": 6, "vocab_size": 32000})
    config = ModelConfig(EncoderConfig(name="ViT-L-14"), blocks)
    with no_init_weights():
        model = Model(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    print(sum(parameter.numel() for parameter in model.parameters()))
    export_onnx(Recognizer(model, train_tokenizer(["rose"], vocab_size=400), config), Path("full"))
else:
    for name in ("encoder.onnx", "decoder.onnx"):
        quantize(Path("full", name))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
RUN = """
import resource
from PIL import Image
from nxtp.deploy.onnx.runner import OnnxRecognizer

print(len(OnnxRecognizer("full").predict(Image.effect_noise((300, 200), 90).convert("RGB"), 3)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
def test_the_published_size_is_exported_quantised_and_run_within_16_gb(tmp_path):
    def run(code: str, *arguments: str) -> list[float]:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        return [float(line) for line in done.stdout.split()]

    parameters, gigabytes = run(FULL_SIZE, "export")
    assert parameters == pytest.approx(1.78e9, rel=0.005)
    assert gigabytes < 16
    assert run(RUN)[1] < 16
    assert run(FULL_SIZE, "int8")[0] < 16
    labels, gigabytes = run(RUN)
    assert labels >= 1
    assert gigabytes < 6
    assert sum(path.stat().st_size for path in (tmp_path / "full").iterdir()) < 2.6e9
