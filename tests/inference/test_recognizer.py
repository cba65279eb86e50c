"""A model directory: the same predictions after saving; every kind of damage told in one line."""

import shutil
import tracemalloc

import numpy as np
import pytest
import torch
import yaml
from helpers import COLOURS, WORDS, jpeg, recognizer, tiny_config
from open_clip.transform import image_transform
from PIL import Image

import nxtp
from nxtp.data.images import ImageError
from nxtp.data.transforms import ImageTransform, to_pixels
from nxtp.errors import UserError
from nxtp.inference.predict import attention_item
from nxtp.inference.recognizer import Recognizer
from nxtp.inference.streaming import ImageItem, Prediction
from nxtp.model.encoder import EncoderConfig
from nxtp.model.hub import is_path
from nxtp.model.layout import lay_out
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.ranking import RankingConfig, rank


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return recognizer().save_pretrained(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "m")


@pytest.mark.parametrize("decoder", [{}, {"tie_word_embeddings": True}, {"model_type": "qwen2"}])
def test_loading_gives_the_same_predictions_to_the_bit(tmp_path, decoder):
    ours = recognizer(**decoder)
    loaded = Recognizer.from_pretrained(ours.save_pretrained(tmp_path / "m"), device="cpu")
    images = [jpeg((200, 40, 60)), jpeg((20, 140, 60), size=77)]
    assert loaded.predict(images, top_k=7) == ours.predict(images, top_k=7)
    assert loaded.provenance == {"run": "test"}
    for (name, a), (_, b) in zip(ours.model.named_buffers(), loaded.model.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_a_second_round_trip_changes_nothing(saved, tmp_path):
    again = Recognizer.from_pretrained(saved, device="cpu").save_pretrained(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    first, second = (yaml.safe_load((d / "config.yaml").read_text()) for d in (saved, again))
    assert first["model"] == second["model"]
    assert first["files"]["tokenizer.json"] == second["files"]["tokenizer.json"]


def test_saving_replaces_a_model_whole_and_deletes_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to("disk")
    (tmp_path / "m" / "calibration.json").touch()
    recognizer().save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "m"], "nothing half-written beside it"
    assert (tmp_path / "m").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert not (tmp_path / "disk" / "calibration.json").exists(), "of the model before"
    (tmp_path / "m" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"disk' contains notes\.txt, no files of a model: choose another directory"):
        recognizer().save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="contains disk, m, no files"):
        recognizer().save_pretrained(".")


def test_inputs_of_every_kind_agree(saved, tmp_path):
    model = nxtp.Recognizer.from_pretrained(saved, device="cpu")
    (tmp_path / "a.jpg").write_bytes(jpeg((30, 80, 200)))
    image = Image.open(tmp_path / "a.jpg").convert("RGB")
    one = model.predict(tmp_path / "a.jpg", top_k=4)
    assert isinstance(one[0], tuple)
    pixels = to_pixels(image, 32)
    for same in (str(tmp_path / "a.jpg"), jpeg((30, 80, 200)), image, pixels, pixels.permute(1, 2, 0).numpy()):
        assert model.predict(same, top_k=4) == one
    assert model.predict([image], top_k=4) == [one]
    probabilities = [p for _, p in one]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= p <= 1 for p in probabilities)  # a long label of random weights may underflow


def test_results_do_not_depend_on_the_batch(saved):
    model = Recognizer.from_pretrained(saved, device="cpu")
    images = [jpeg((i * 20 % 255, i * 50 % 255, 90), seed=i) for i in range(7)]
    together, alone = model.predict(images, top_k=6), [model.predict(image, top_k=6) for image in images]
    for a, b in zip(together, alone, strict=True):
        assert [label for label, _ in a] == [label for label, _ in b]
        assert [p for _, p in a] == pytest.approx([p for _, p in b], rel=1e-5)


def test_bfloat16_gives_the_labels_of_float32(tmp_path):
    trained = recognizer()
    tokenizer, model = trained.tokenizer, trained.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        images = torch.stack([trained.transform(jpeg(colour, seed=step)) for colour in COLOURS.values()])
        layout = lay_out(
            [tokenizer.encode_labels([name, "stone"]) for name in COLOURS],
            prompt=tokenizer.prompt_ids,
            delimiter=tokenizer.delimiter_id,
            num_image_tokens=model.num_image_tokens,
        )
        optimizer.zero_grad()
        model(images, layout).mean.backward()
        optimizer.step()
    model.eval()
    trained.save_pretrained(tmp_path / "m")
    wide, narrow = (
        Recognizer.from_pretrained(tmp_path / "m", device="cpu", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.bfloat16}
    unseen = [jpeg(colour, seed=1000 + i) for i in range(2) for colour in COLOURS.values()]
    rows = zip(*(each.predict(unseen, top_k=5) for each in (wide, narrow)), list(COLOURS) * 2, strict=True)
    for expected, given, name in rows:
        likely = {label: p for label, p in expected if p > 0.05}
        assert {name, "stone"} <= set(likely), "it has learnt something"
        assert {label: dict(given).get(label) for label in likely} == pytest.approx(likely, abs=2e-2)
        assert given != expected


def test_int8_weights_are_smaller_nearly_the_same_and_not_saved(saved, tmp_path):
    pytest.importorskip("torchao")  # not among the development requirements: transformers would import it always
    wide, narrow = (Recognizer.from_pretrained(saved, device="cpu") for _ in range(2))
    assert narrow.to_int8() is narrow
    image = jpeg((200, 40, 60))
    for ours, theirs in zip(narrow.predict([image], top_k=3), wide.predict([image], top_k=3), strict=True):
        assert dict(ours).get(theirs[0][0], 0) == pytest.approx(theirs[0][1], abs=0.02)
        assert ours != theirs
    with pytest.raises(UserError, match="cannot be saved"):
        narrow.save_pretrained(tmp_path / "m")


def test_bad_arguments(saved, tmp_path):
    model = Recognizer.from_pretrained(saved, device="cpu")
    with pytest.raises(ValueError, match="top_k must be ≥ 1, got 0"):
        model.predict(jpeg((1, 2, 3)), top_k=0)
    for call in (model.predict, model.predict_batches):
        with pytest.raises(ValueError, match="batch_size must be ≥ 1, got 0"):
            list(call([jpeg((1, 2, 3))], batch_size=0))
    (tmp_path / "x.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"x\.jpg"):
        model.predict(tmp_path / "x.jpg")


def test_pixels_are_the_short_side_and_centre():
    image = Image.new("RGB", (300, 100))
    image.paste((255, 0, 0), (100, 0, 200, 100))
    pixels = to_pixels(image, 50)
    assert pixels.shape == (3, 50, 50)
    assert pixels[0].min() > 200
    assert pixels[1].max() < 50
    square = Image.effect_noise((64, 64), 90).convert("RGB")
    assert torch.equal(to_pixels(square, 64), torch.tensor(list(square.tobytes())).view(64, 64, 3).permute(2, 0, 1))
    assert to_pixels(Image.new("RGB", (1, 1), (7, 8, 9)), 32).shape == (3, 32, 32)
    assert to_pixels(Image.new("RGB", (5000, 1)), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(640, 427), (333, 500), (97, 96), (40, 30), (300, 1500)])
def test_pixels_are_those_of_open_clips_preprocessing(size, resize_mode, interpolation):
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    how = {"resize_mode": resize_mode, "interpolation": interpolation}
    usual = 255 * image_transform(64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), **how)(image)
    difference = (to_pixels(image, 64, **how) - usual).abs()
    assert difference.max() <= 3
    assert difference.mean() < 0.25


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
def test_a_side_of_millions_is_resized_in_little_memory(resize_mode):
    strip = Image.new("RGB", (3_000_000, 2), (9, 9, 9))
    tracemalloc.start()
    narrow = to_pixels(strip, 32, resize_mode=resize_mode)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert set(narrow.unique().tolist()) == {"longest": {0, 9}, "squash": {9}}[resize_mode]


def test_a_model_directory_stores_how_its_images_are_prepared(tmp_path):
    """Prediction and what is shown follow it; a directory of before has the settings of before."""
    image = Image.effect_noise((90, 40), 90).convert("RGB")
    expected = to_pixels(image, 32, "bilinear", "squash")
    chosen = {"mean": [0.1] * 3, "quick_gelu": True, "resize_mode": "squash", "interpolation": "bilinear"}
    config = tiny_config()
    config.encoder = EncoderConfig(vision={"timm_model_name": "test_resnet"}, image_size=32, **chosen)
    tokenizer = train_tokenizer(WORDS, vocab_size=400)
    made = Recognizer(Model(config, len(tokenizer)), tokenizer, config)
    made.save_pretrained(tmp_path / "m")
    again = Recognizer.from_pretrained(tmp_path / "m", device="cpu")
    stored = yaml.safe_load((tmp_path / "m" / "config.yaml").read_text())
    assert stored["model"]["encoder"].items() >= chosen.items()
    for model in (made, again):
        assert torch.equal(model.transform(image), expected)
        shown = attention_item(Prediction(ImageItem("x", lambda: image), [("rose", 0.5)]), model, 1).image
        whole = ImageTransform(shown.width, "bilinear", "squash")(image)
        assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.array(shown))
    assert again.predict(image) == made.predict(image)

    for name in ("resize_mode", "interpolation"):
        del stored["model"]["encoder"][name]
    (tmp_path / "m" / "config.yaml").write_text(yaml.safe_dump(stored))
    old = Recognizer.from_pretrained(tmp_path / "m", device="cpu")
    assert old.pixels == ImageTransform(32, "bicubic", "shortest"), "timm says bilinear"


def test_duplicates_are_merged_and_empty_labels_dropped():
    tokenizer = train_tokenizer(WORDS, vocab_size=400)
    rose, stone = (tokenizer.encode_labels([word])[0] for word in ("rose", "stone"))
    spelled = tuple(tokenizer.tokenizer.convert_tokens_to_ids(["▁", "r", "o", "s", "e"]))
    rows = [rose, spelled, stone, ()]
    width = max(map(len, rows)) + 1
    tokens = torch.full((1, 4, width), tokenizer.delimiter_id)
    for i, row in enumerate(rows):
        tokens[0, i, : len(row)] = torch.tensor(row, dtype=torch.long)
    probs = torch.ones(1, 4, width)
    probs[0, :, 0] = torch.tensor([0.3, 0.25, 0.4, 0.9])
    lengths = torch.tensor([[len(row) for row in rows]])
    samples = Samples(tokens, probs, lengths, torch.zeros(1, 4, dtype=torch.bool))
    (labels,) = rank(samples, tokenizer.decode_label, RankingConfig(), 5)
    assert [label for label, _ in labels] == ["rose", "stone"]
    assert [p for _, p in labels] == pytest.approx([0.55, 0.4])


def edit(path, change):
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no directory": (lambda d: shutil.rmtree(d), "No model directory"),
    "no config": (lambda d: (d / "config.yaml").unlink(), "no config.yaml"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "lacks model.safetensors"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "a bit of the weights": (lambda d: flip(d / "model.safetensors"), "not the file that was saved"),
    "a truncated file": (lambda d: (d / "model.safetensors").write_bytes(b"123"), "not the file that was saved"),
    "another tokenizer": (lambda d: flip(d / "tokenizer.json"), "not the file that was saved"),
    "broken yaml": (lambda d: (d / "config.yaml").write_text("a: [1"), "is damaged"),
    "binary config": (lambda d: (d / "config.yaml").write_bytes(b"\xff\xfe\x00\x80"), "is damaged"),
    "other yaml": (lambda d: (d / "config.yaml").write_text("- 1"), "not a model's configuration"),
    "a later format": (lambda d: edit(d / "config.yaml", lambda c: c.update(format=99)), "format 99"),
    "an unknown key": (
        lambda d: edit(d / "config.yaml", lambda c: c["model"].update(promt="x")),
        "model.promt.*Did you mean 'model.prompt'",
    ),
    "code": (
        lambda d: edit(d / "config.yaml", lambda c: c["model"]["encoder"].update(_target_="os.system")),
        "_target_",
    ),
    "another width": (
        lambda d: edit(d / "config.yaml", lambda c: c["model"]["decoder"]["config"].update(intermediate_size=96)),
        "of another shape",
    ),
    "another depth": (
        lambda d: edit(d / "config.yaml", lambda c: c["model"]["decoder"]["config"].update(num_hidden_layers=3)),
        r"missing \(decoder",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_told_in_one_line(damaged, kind):
    act, message = DAMAGE[kind]
    act(damaged)
    with pytest.raises(UserError, match=message) as told:
        Recognizer.from_pretrained(damaged, device="cpu")
    assert "\n" not in str(told.value)


def test_unverified_loading_still_refuses_what_it_cannot_read(damaged):
    (damaged / "model.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="cannot be read"):
        Recognizer.from_pretrained(damaged, device="cpu", verify=False)


def test_what_can_only_be_a_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    paths = ("./lm", "../lm", "~/lm", "/lm", "a/b/c", "runs/lm")
    assert all(map(is_path, paths))
    assert not any(map(is_path, ("meta-llama/Llama-2-7b-hf", "gpt2")))
    for source in (*paths, "gpt2"):
        with pytest.raises(UserError, match="No model directory"):
            Recognizer.from_pretrained(source)


def test_the_directory_of_a_run_is_told_from_its_model(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    for content in (None, "name: mine\nmodel: {}\n"):
        if content:
            (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(UserError, match=rf"\. Did you mean '{tmp_path}/model'\?$"):
            Recognizer.from_pretrained(tmp_path)
