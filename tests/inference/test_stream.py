"""Many images: the same answers as one by one, in bounded memory, from every source; files that are taken up again."""

import io
import json
import os
import shutil
import signal
import sys
import threading
from itertools import count, islice

import pyarrow.parquet
import pytest
import torch
from helpers import COLOURS, forks, jpeg, nxtp_here, recognizer, run_nxtp, write_shards
from PIL import Image

from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.inference.streaming import Item, Prediction, Source, answers
from nxtp.inference.writer import AnswerFile


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
    assert [answer.image for answer in found] == [str(path) for path in sorted(pictures.rglob("*.jpg"))]
    assert [answer.error for answer in found if answer.error] == ["not an image in a known format"]
    for answer in found:
        if answer.error is None:
            assert answer.labels == rounded(loaded.predict(answer.image, top_k=4))


def test_shards_give_what_their_images_give(loaded, shards):
    found = list(loaded.predict_batches(shards, top_k=3, batch_size=3))
    assert [answer.image for answer in found] == [f"{i:06d}" for i in range(7)]
    assert [answer.shard.rsplit("/")[-1] for answer in found] == ["part-00000.tar"] * 4 + ["part-00001.tar"] * 3
    assert found[5].labels == rounded(loaded.predict(found[5].item.read(), top_k=3))
    assert found[5].item.read() == jpeg(list(COLOURS.values())[5 % 4], seed=5)
    one = list(loaded.predict_batches(f"{shards}/part-{{00001..00001}}.tar", top_k=3))
    assert [answer.image for answer in one] == [f"{i:06d}" for i in range(4, 7)]
    closed = list(loaded.classify_batches(shards, ["rose", "lemon"], batch_size=2))
    assert closed[2].labels == rounded(loaded.classify(closed[2].item.read(), ["rose", "lemon"]))


def test_damaged_shards_are_told_and_the_rest_is_done(loaded, shards, tmp_path):
    whole = (shards / "part-00000.tar").read_bytes()
    (tmp_path / "part.tar").write_bytes(whole[: len(whole) // 2])
    found = list(loaded.predict_batches(tmp_path, top_k=1))
    assert "truncated shard × 1" in [answer.error for answer in found]
    assert next(answer.image for answer in found if not answer.error) == "000000"
    assert len(found) == Source.of(tmp_path).count
    (tmp_path / "part.tar").write_bytes(whole[:100])
    with pytest.raises(UserError, match="No image in the shards"):
        loaded.predict_batches(tmp_path)
    with pytest.raises(UserError, match="No shards"):
        loaded.predict_batches(str(tmp_path / "gone-{0..3}.tar"))


def test_a_folder_of_images_and_shards_is_told(pictures, shards, tmp_path, caplog):
    for path in (pictures / "0.jpg", shards / "part-00000.tar"):
        shutil.copy(path, tmp_path)
    assert [item.image for item in Source.of(tmp_path).items] == [str(tmp_path / "0.jpg")]
    assert "holds images and shards" in caplog.text
    both = Source.all_of([str(tmp_path), f"{tmp_path}/*.tar"])
    assert both.count == 5
    assert len(list(both.items)) == 5


def test_an_iterator_is_read_as_it_is_needed(loaded):
    taken = []

    def endless():
        for number in count():
            taken.append(number)
            yield f"image {number}", Image.new("RGB", (32, 32), (number % 256, 90, 30))

    found = list(islice(loaded.predict_batches(endless(), top_k=2, batch_size=4), 10))
    assert [answer.image for answer in found] == [f"image {number}" for number in range(10)]
    assert len(taken) <= 10 + 3 * 4, "memory is bounded: at most three batches were asked for ahead"
    plain = list(loaded.predict_batches([jpeg((9, 9, 200)), Image.new("RGB", (9, 9)), b"x"], top_k=2))
    assert [answer.image for answer in plain] == ["0", "1", "2"]
    assert [answer.error is None for answer in plain] == [True, True, False]


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
    source = Source(Item(str(i), lambda i=i: i) for i in range(5))
    assert [answer.image for answer in answers(source, label, transform, 2, workers=2)] == list("01234")
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


# Files of answers


def answer(number, error=None):
    item = Item(f"{number}.jpg", lambda: None)
    return Prediction(item, None if error else [("rose", 0.5)], error)


def test_a_file_is_taken_up_where_it_was_cut_off(tmp_path):
    out, partial = tmp_path / "o.jsonl", tmp_path / "o.jsonl.partial"
    file = AnswerFile(out, {"top_k": 3})
    for number in range(3):
        file.add(answer(number, "torn" if number == 1 else None))
    with pytest.raises(UserError, match="another process"):
        AnswerFile(out, {"top_k": 3})
    file.close()
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-4])  # killed in the middle of a line
    with pytest.raises(UserError, match="begun with top_k 3, not 4"):
        AnswerFile(out, {"top_k": 4})
    file = AnswerFile(out, {"top_k": 3})
    left = list(file.left(answer(number).item for number in (0, 1, 1, 2, 3)))
    assert [item.image for item in left] == ["1.jpg", "2.jpg", "3.jpg"], "an image that comes twice has two rows"
    assert (file.count, file.failed) == (2, 1)
    file.add(answer(2))
    file.finish()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[2] == {"image": "2.jpg", "labels": [{"label": "rose", "probability": 0.5}]}
    assert rows[1] == {"image": "1.jpg", "error": "torn"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl"]
    with pytest.raises(UserError, match="exists"):
        AnswerFile(out, {"top_k": 3})
    AnswerFile(out, {"top_k": 4}, overwrite=True).finish()
    assert out.read_text() == ""


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "o.jsonl.partial").write_text("my notes")
    with pytest.raises(UserError, match="not what nxtp leaves"):
        AnswerFile(tmp_path / "o.jsonl", {})
    assert (tmp_path / "o.jsonl.partial").read_text() == "my notes"
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        AnswerFile(tmp_path / "o.csv", {})
    with pytest.raises(UserError, match="cannot be written"):
        AnswerFile(tmp_path / "none" / "o.jsonl", {})


def test_the_command_writes_parquet_of_folders_and_shards(model, pictures, shards, tmp_path):
    given = (str(pictures), str(shards), "--model", str(model), "--top-k", "3", "--batch-size", "4")
    done = run_nxtp("predict", *given, "--out", "o.parquet", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {pictures}/4.jpg: not an image in a known format",
        "o.parquet: 16 images, 1 of them could not be used",
    ]
    assert done.stdout == ""
    rows = pyarrow.parquet.read_table(tmp_path / "o.parquet").to_pylist()
    assert [row["image"] for row in rows[-7:]] == [f"{i:06d}" for i in range(7)]
    assert [row["error"] is None for row in rows].count(False) == 1
    done = run_nxtp("predict", *given, "--json", cwd=tmp_path)
    for line, row in zip(map(json.loads, done.stdout.splitlines()), rows, strict=True):
        assert line["image"] == row["image"]
        for expected, found in zip(line.get("labels") or [], row["labels"] or [], strict=True):
            assert found == {"label": expected["label"], "probability": pytest.approx(expected["probability"])}


def killed_after_five(arguments, cwd):
    def add(file, answer):
        usual(file, answer)
        if file.count == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    usual, AnswerFile.add = AnswerFile.add, add
    nxtp_here(arguments, cwd, os.devnull, os.devnull, {})


def test_a_killed_command_is_taken_up(model, pictures, tmp_path):
    given = ["predict", str(pictures), "--model", str(model), "--out", "o.jsonl", "--batch-size", "1", "--top-k", "2"]
    whole = run_nxtp(*given[:-1], "2", cwd=tmp_path)
    assert whole.returncode == 1
    expected = (tmp_path / "o.jsonl").read_text().splitlines()
    (tmp_path / "o.jsonl").unlink()
    killed = forks.Process(target=killed_after_five, args=(given, str(tmp_path)))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl.partial"]
    again = run_nxtp(*given, cwd=tmp_path)
    assert again.returncode == 1, "the failure before it was killed counts too"
    assert (tmp_path / "o.jsonl").read_text().splitlines() == expected
    other = run_nxtp(*given, "--overwrite", "--sampler", "exact", cwd=tmp_path)
    assert other.returncode == 1


def test_names_and_images_come_on_a_pipe(model, pictures, tmp_path):
    names = "\n".join([str(pictures / "0.jpg"), "", "gone.jpg", str(pictures / "deep")])
    source = Source.named_on(io.BytesIO(names.encode()))
    assert [item.image for item in source.items] == [
        str(pictures / "0.jpg"), "gone.jpg", str(pictures / "deep" / "7.jpg"), str(pictures / "deep" / "8.jpg"),
    ]  # fmt: skip
    odd = Source.named_on(io.BufferedReader(io.BytesIO(b"a\nb\0c")), b"\0")
    assert [item.image for item in odd.items] == ["a\nb", "c"]


def on_pipes(arguments, cwd):
    sys.stdin = open(os.path.join(cwd, "names"))  # noqa: SIM115
    nxtp_here(arguments, cwd, os.path.join(cwd, "answers"), os.devnull, {})


def test_a_name_is_answered_before_the_next_is_written(model, pictures, tmp_path):
    for name in ("names", "answers"):
        os.mkfifo(tmp_path / name)
    given = ["predict", "--stdin", "--model", str(model), "--json", "--batch-size", "1"]
    process = forks.Process(target=on_pipes, args=(given, str(tmp_path)))
    process.start()
    with open(tmp_path / "names", "w") as names, open(tmp_path / "answers") as found:
        for number in (0, 3):
            names.write(f"{pictures / f'{number}.jpg'}\n")
            names.flush()
            assert json.loads(found.readline())["image"] == str(pictures / f"{number}.jpg")
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "No images"),
        (["--stdin", "x.jpg"], "leave IMAGES out"),
        (["--null", "x.jpg"], "--null goes with --stdin"),
        (["-", "x.jpg"], "'-' is one image"),
        (["x.jpg", "--out", "o.csv"], "end its name"),
        (["x.jpg", "--grid", "none/g.png"], "no directory none"),
    ],
)
def test_bad_options_are_told_in_a_line(model, tmp_path, arguments, told):
    done = run_nxtp("predict", *arguments, "--model", str(model), cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
