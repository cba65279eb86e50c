"""Many images: the same predictions as one by one, in bounded memory, from every source; files are resumed."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import threading
from itertools import count, islice

import pyarrow.parquet
import pytest
import torch
from helpers import COLOURS, call_nxtp, jpeg, nxtp_here, recognizer, write_shards
from PIL import Image

from nxtp.errors import UserError
from nxtp.inference import predict
from nxtp.inference.recognizer import Recognizer
from nxtp.inference.streaming import ImageItem, ImageSource, Prediction, stream
from nxtp.inference.writer import PredictionWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return recognizer().save_pretrained(tmp_path_factory.mktemp("stream") / "model")


@pytest.fixture(scope="module")
def loaded(model):
    return Recognizer.from_pretrained(model, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures") / "in"
    (directory / "deep").mkdir(parents=True)
    for i in range(9):
        path = directory / ("deep" if i > 6 else ".") / f"{i}.jpg"
        path.write_bytes(jpeg(list(COLOURS.values())[i % 4], seed=i, size=40 + i))
    (directory / "4.jpg").write_bytes(b"no picture")
    return directory


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "set", [4, 3])


def rounded(labels):
    return [(label, pytest.approx(probability, rel=1e-4)) for label, probability in labels]


def test_a_folder_gives_what_each_image_gives(loaded, pictures):
    found = list(loaded.predict_batches(pictures, top_k=4, batch_size=4))
    assert [prediction.image for prediction in found] == [str(path) for path in sorted(pictures.rglob("*.jpg"))]
    assert [prediction.error for prediction in found if prediction.error] == ["not an image in a known format"]
    for prediction in found:
        if prediction.error is None:
            assert prediction.labels == rounded(loaded.predict(prediction.image, top_k=4))


def test_shards_give_what_their_images_give(loaded, shards):
    found = list(loaded.predict_batches(shards, top_k=3, batch_size=3))
    assert [prediction.image for prediction in found] == [f"{i:06d}" for i in range(7)]
    assert [prediction.shard.rsplit("/")[-1] for prediction in found] == ["part-00000.tar"] * 4 + ["part-00001.tar"] * 3
    assert found[5].labels == rounded(loaded.predict(found[5].item.read(), top_k=3))
    assert found[5].item.read() == jpeg(list(COLOURS.values())[5 % 4], seed=5)
    one = list(loaded.predict_batches(f"{shards}/part-{{00001..00001}}.tar", top_k=3))
    assert [prediction.image for prediction in one] == [f"{i:06d}" for i in range(4, 7)]
    closed = list(loaded.classify_batches(shards, ["rose", "lemon"], batch_size=2))
    assert closed[2].labels == rounded(loaded.classify(closed[2].item.read(), ["rose", "lemon"]))


def test_damaged_shards_are_told_and_the_rest_is_done(loaded, shards, tmp_path):
    whole = (shards / "part-00000.tar").read_bytes()
    (tmp_path / "part.tar").write_bytes(whole[: len(whole) // 2])
    found = list(loaded.predict_batches(tmp_path, top_k=1))
    assert "truncated shard × 1" in [prediction.error for prediction in found]
    assert next(prediction.image for prediction in found if not prediction.error) == "000000"
    assert len(found) == ImageSource.open(tmp_path).count
    (tmp_path / "part.tar").write_bytes(whole[:100])
    with pytest.raises(UserError, match="contain no sample"):
        loaded.predict_batches(tmp_path)
    with pytest.raises(UserError, match="No shards"):
        loaded.predict_batches(str(tmp_path / "gone-{0..3}.tar"))


def test_an_image_is_read_whatever_the_texts_beside_it_contain(loaded, tmp_path):
    image = jpeg((30, 80, 200))
    texts = {"txt": b"x" * (1 << 17), "json": b"{"}, {"json": b'{"labels": "dog"}'}, {"json": b'{"crc32": 1}'}
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number, beside in enumerate(texts):
            for extension, data in {"jpg": image, **beside}.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    found = list(loaded.predict_batches(tmp_path / "a.tar", top_k=2))
    assert [(prediction.image, prediction.error) for prediction in found] == [("0", None), ("1", None), ("2", None)]
    assert found[0].labels == rounded(loaded.predict(image, top_k=2))


def test_a_folder_of_images_and_shards_is_told(pictures, shards, tmp_path, caplog):
    for path in (pictures / "0.jpg", shards / "part-00000.tar"):
        shutil.copy(path, tmp_path)
    assert [item.image for item in ImageSource.open(tmp_path).items] == [str(tmp_path / "0.jpg")]
    assert "contains images and shards" in caplog.text
    both = ImageSource.from_paths([str(tmp_path), f"{tmp_path}/*.tar"])
    assert both.count == 5
    assert len(list(both.items)) == 5


def test_an_iterator_is_read_as_it_is_needed(loaded):
    taken = []

    def endless():
        for number in count():
            taken.append(number)
            yield f"image {number}", Image.new("RGB", (32, 32), (number % 256, 90, 30))

    found = list(islice(loaded.predict_batches(endless(), top_k=2, batch_size=4), 10))
    assert [prediction.image for prediction in found] == [f"image {number}" for number in range(10)]
    assert len(taken) <= 10 + 3 * 4, "memory is bounded: at most three batches were asked for ahead"
    plain = list(loaded.predict_batches([jpeg((9, 9, 200)), Image.new("RGB", (9, 9)), b"x"], top_k=2))
    assert [prediction.image for prediction in plain] == ["0", "1", "2"]
    assert [prediction.error is None for prediction in plain] == [True, True, False]


def test_decoding_runs_beside_the_model_and_in_several_threads():
    both = threading.Barrier(2, timeout=20)

    def transform(image):
        if image in (0, 1):
            both.wait()  # passes only if two are decoded at a time
        if image in (2, 3):
            ahead.set()
        return torch.zeros(3, 4, 4)

    def label(pixels):
        labelled.append(len(pixels))
        if len(labelled) == 1:
            assert ahead.wait(20), "the next batch is decoded while this one is labelled"
        return [[("x", 1.0)]] * len(pixels)

    ahead, labelled = threading.Event(), []
    source = ImageSource(ImageItem(str(i), lambda i=i: i) for i in range(5))
    assert [prediction.image for prediction in stream(source, label, transform, 2, workers=2)] == list("01234")
    assert labelled == [2, 2, 1]


def test_embeddings_are_the_tokens_of_the_model(loaded):
    images = [jpeg((200, 10, 60), seed=i) for i in range(3)]
    pixels = torch.stack([loaded.transform(image) for image in images])
    with torch.inference_mode():
        tokens, projected = loaded.model.encoder(pixels), loaded.model.encode(pixels)
    assert torch.allclose(loaded.embed(images, pool=False), tokens, atol=1e-5)
    assert torch.allclose(loaded.embed(images, batch_size=2), tokens.mean(1), atol=1e-5)
    assert torch.allclose(loaded.embed(images[0], space="decoder"), projected[0].mean(0), atol=1e-5)
    assert loaded.embed([]).shape == (0, tokens.shape[-1])
    with pytest.raises(ValueError, match="encoder or decoder"):
        loaded.embed(images, space="clip")


def test_push_to_hub_uploads_the_model_directory_with_a_card(loaded, monkeypatch):
    from huggingface_hub import HfApi

    seen = {}

    def upload(self, *, folder_path, repo_id, **options):
        seen.update(options, files=sorted(os.listdir(folder_path)), card=(folder_path / "README.md").read_text())
        seen["again"] = Recognizer.from_pretrained(folder_path, device="cpu").provenance
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert loaded.push_to_hub("me/animals", private=True, commit_message="First") == "https://hub/me/animals"
    assert seen["files"] == ["README.md", "config.yaml", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert seen["commit_message"] == "First"
    assert seen["again"] == {"run": "test"}
    assert 'from_pretrained("me/animals")' in seen["card"]
    assert "run: test" in seen["card"]
    assert "library_name: nxtp" in seen["card"]


# Files of predictions


def prediction(number, error=None):
    item = ImageItem(f"{number}.jpg", lambda: None)
    return Prediction(item, None if error else [("rose", 0.5)], error)


def test_a_file_is_taken_up_where_it_was_cut_off(tmp_path):
    out, partial = tmp_path / "o.jsonl", tmp_path / "o.jsonl.partial"
    file = PredictionWriter(out, {"top_k": 3})
    for number in range(3):
        file.write(prediction(number, "torn" if number == 1 else None))
    with pytest.raises(UserError, match="another process"):
        PredictionWriter(out, {"top_k": 3})
    file.close()
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-4])  # killed in the middle of a line
    with pytest.raises(UserError, match="begun with top_k 3, not 4"):
        PredictionWriter(out, {"top_k": 4})
    file = PredictionWriter(out, {"top_k": 3})
    left = list(file.remaining(prediction(number).item for number in (0, 1, 1, 2, 3)))
    assert [item.image for item in left] == ["1.jpg", "2.jpg", "3.jpg"], "an image that comes twice has two rows"
    assert (file.count, file.failed) == (2, 1)
    file.write(prediction(2))
    file.finish()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[2] == {"image": "2.jpg", "labels": [{"label": "rose", "probability": 0.5}]}
    assert rows[1] == {"image": "1.jpg", "error": "torn"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl"]
    with pytest.raises(UserError, match="exists"):
        PredictionWriter(out, {"top_k": 3})
    PredictionWriter(out, {"top_k": 4}, overwrite=True).finish()
    assert out.read_text() == ""


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "o.jsonl.partial").write_text("my notes")
    with pytest.raises(UserError, match="was not written by nxtp"):
        PredictionWriter(tmp_path / "o.jsonl", {})
    assert (tmp_path / "o.jsonl.partial").read_text() == "my notes"
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        PredictionWriter(tmp_path / "o.csv", {})
    with pytest.raises(UserError, match="cannot be written"):
        PredictionWriter(tmp_path / "none" / "o.jsonl", {})


def test_the_command_writes_parquet_of_folders_and_shards(model, pictures, shards, tmp_path):
    given = (str(pictures), str(shards), "--model", str(model), "--top-k", "3", "--batch-size", "4")
    done = call_nxtp("predict", *given, "--out", "o.parquet", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {pictures}/4.jpg: not an image in a known format",
        "o.parquet: 16 images, 1 of them could not be read",
    ]
    assert done.stdout == ""
    rows = pyarrow.parquet.read_table(tmp_path / "o.parquet").to_pylist()
    assert [row["image"] for row in rows[-7:]] == [f"{i:06d}" for i in range(7)]
    assert [row["error"] is None for row in rows].count(False) == 1
    done = call_nxtp("predict", *given, "--json", cwd=tmp_path)
    for line, row in zip(map(json.loads, done.stdout.splitlines()), rows, strict=True):
        assert line["image"] == row["image"]
        for expected, found in zip(line.get("labels") or [], row["labels"] or [], strict=True):
            assert found == {"label": expected["label"], "probability": pytest.approx(expected["probability"])}


def in_a_fork(function) -> multiprocessing.Process:
    """Runs ``function`` in a copy of this process: it has imported everything."""

    def run():
        torch.set_num_threads(1)  # OpenMP's other threads are not copied
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_a_killed_command_is_resumed(model, pictures, tmp_path):
    given = ["predict", str(pictures), "--model", str(model), "--out", "o.jsonl", "--batch-size", "1", "--top-k", "2"]
    whole = call_nxtp(*given, cwd=tmp_path)
    assert whole.returncode == 1
    expected = (tmp_path / "o.jsonl").read_text().splitlines()
    (tmp_path / "o.jsonl").unlink()
    write = PredictionWriter.write

    def write_five(writer, prediction):
        write(writer, prediction)
        if writer.count == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def until_killed():
        PredictionWriter.write = write_five
        nxtp_here(given, str(tmp_path), os.devnull, os.devnull, {})

    killed = in_a_fork(until_killed)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl.partial"]
    others = call_nxtp("predict", str(pictures / "deep"), *given[2:], cwd=tmp_path)
    assert others.returncode == 1
    assert f"begun with input {pictures}, not {pictures}/deep" in others.stderr
    again = call_nxtp(*given, cwd=tmp_path)
    assert again.returncode == 1, "the image that failed before the kill counts too"
    assert again.stderr.startswith(f"o.jsonl.partial: 5 of {len(expected)} images are done\n")
    assert (tmp_path / "o.jsonl").read_text().splitlines() == expected
    other = call_nxtp(*given, "--overwrite", "--sampler", "exact", "--batch-size", "9", cwd=tmp_path)
    assert other.returncode == 1


def test_names_and_images_come_on_a_pipe(model, pictures, tmp_path):
    names = "\n".join([str(pictures / "0.jpg"), "", "gone.jpg", str(pictures / "deep")])
    source = ImageSource.from_pipe(io.BytesIO(names.encode()))
    assert [item.image for item in source.items] == [
        str(pictures / "0.jpg"), "gone.jpg", str(pictures / "deep" / "7.jpg"), str(pictures / "deep" / "8.jpg"),
    ]  # fmt: skip
    odd = ImageSource.from_pipe(io.BufferedReader(io.BytesIO(b"a\nb\0c")), b"\0")
    assert [item.image for item in odd.items] == ["a\nb", "c"]


def test_labels_are_printed_before_the_next_name_is_written(model, pictures, tmp_path):
    for name in ("names", "rows"):
        os.mkfifo(tmp_path / name)

    def on_pipes():
        sys.stdin = open(tmp_path / "names")  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  not pytest's
        given = ["predict", "--stdin", "--model", str(model), "--json", "--batch-size", "1"]
        nxtp_here(given, str(tmp_path), str(tmp_path / "rows"), os.devnull, {})

    process = in_a_fork(on_pipes)
    with open(tmp_path / "names", "w") as names, open(tmp_path / "rows") as rows:
        for number in (0, 3):
            names.write(f"{pictures / f'{number}.jpg'}\n")
            names.flush()
            assert json.loads(rows.readline())["image"] == str(pictures / f"{number}.jpg")
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "No images"),
        (["--stdin", "x.jpg"], "give no IMAGES"),
        (["--null", "x.jpg"], "--null needs --stdin"),
        (["-", "x.jpg"], "'-' is one image"),
        (["x.jpg", "--out", "o.csv"], "name must end"),
        (["x.jpg", "--grid", "none/g.png"], "no directory none"),
        (["x.jpg", "--attention", "a.png", "--head", "9"], "head must be from -4 to 3, got 9"),
        (["x.jpg", "--classes", ""], "Classes in '' cannot be read"),
        (["x.jpg", "--device", "tpu"], "No device 'tpu' on this machine: use one of auto, cpu"),
    ],
)
def test_bad_options_are_told_in_a_line(model, tmp_path, arguments, told):
    done = call_nxtp("predict", *arguments, "--model", str(model), cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_pictures_show_images_of_the_whole_folder(model, shards, tmp_path, monkeypatch):
    drawn = {}
    for option in ("grid", "attention"):
        monkeypatch.setattr(predict, f"_save_{option}", lambda path, shown, *_: drawn.update({path.name: shown}))
    monkeypatch.setattr(predict, "_GRID", 4)
    monkeypatch.setattr(predict, "_ATTENTION", 2)
    call_nxtp("predict", str(shards), "--model", str(model), "--grid", "g", "--attention", "a", cwd=tmp_path)
    names = {name: [prediction.image for prediction in shown] for name, shown in drawn.items()}
    assert names == {"g": ["000000", "000001", "000003", "000005"], "a": ["000000", "000003"]}
