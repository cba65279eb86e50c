"""Untrusted model directories: each of many kinds is refused in one line, quickly and in little memory."""

import math
from dataclasses import replace

import hostile_directories
import pytest
from helpers import call_nxtp, fork, jpeg, recognizer, tiny_config

from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.inference.streaming import ImageItem, Prediction
from nxtp.inference.writer import json_line, to_row
from nxtp.model.encoder import Encoder


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    sound = recognizer().save_pretrained(root / "sound")
    directories = hostile_directories.make(sound, root / "hostile")
    process = fork(hostile_directories.attempts, directories, root / "refusals.jsonl")
    process.join(300)
    assert process.exitcode == 0, "the process was ended by a directory"
    return hostile_directories.read_refusals(root / "refusals.jsonl")


def test_hostile_directories_are_refused_in_one_line(refusals, record_property):
    record_property("directories refused in one line", len(refusals))
    assert len(refusals) == len(hostile_directories.HOSTILE) >= 48
    assert {row.kind: (row.error, row.message) for row in refusals if row.error != "UserError"} == {}
    assert [row.message for row in refusals if "\n" in row.message or len(row.message) > 600] == []


def test_hostile_directories_take_little_memory_and_time(refusals, record_property):
    record_property("s at most for one", f"{max(row.seconds for row in refusals):.1f}")
    record_property("MB at most for one", f"{max(row.megabytes for row in refusals):.0f}")
    # The drill prints the seconds; here the machine may be busy.
    assert {row.kind: row.megabytes for row in refusals if row.megabytes >= hostile_directories.MEGABYTES} == {}
    assert {row.kind: row.seconds for row in refusals if row.seconds >= 5 * hostile_directories.SECONDS} == {}


def test_a_directory_is_loaded_without_the_files_beside_it(tmp_path):
    made = recognizer().save_pretrained(tmp_path / "m")
    before = Recognizer.from_pretrained(made, device="cpu").predict(jpeg((200, 40, 60)), top_k=3)
    for name in (
        "config.json",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ):
        (made / name).unlink(missing_ok=True)
        (made / name).symlink_to("/dev/zero")
    assert Recognizer.from_pretrained(made, device="cpu").predict(jpeg((200, 40, 60)), top_k=3) == before


def test_a_list_that_is_stored_twice_is_read_again(tmp_path):
    model, shards = recognizer(), ["a", "b"]
    model.provenance = {"train": shards, "val": shards}
    assert (
        Recognizer.from_pretrained(model.save_pretrained(tmp_path / "m"), device="cpu").provenance == model.provenance
    )


def test_weights_of_a_hostile_directory_are_refused_in_training_too(tmp_path):
    made = recognizer().save_pretrained(tmp_path / "m")
    hostile_directories.HOSTILE["aliases"](made)
    with pytest.raises(UserError, match="has aliases"):
        Encoder(replace(tiny_config().encoder, pretrained=str(made)))


def test_probabilities_that_are_no_numbers_end_in_one_line(tmp_path):
    model = recognizer()
    model.model.decoder.lm.model.norm.weight.data.fill_(1e30)  # finite, but no logits are
    model.model.decoder.lm.lm_head.weight.data *= 1e15
    made = model.save_pretrained(tmp_path / "m")
    loaded = Recognizer.from_pretrained(made, device="cpu")
    for call in (loaded.predict, lambda image: loaded.classify(image, ["rose", "lemon"])):
        with pytest.raises(UserError, match="no numbers"):
            call(jpeg((1, 2, 3)))
    (tmp_path / "a.jpg").write_bytes(jpeg((1, 2, 3)))
    done = call_nxtp("predict", "a.jpg", "--model", str(made), "--json", "--device", "cpu", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_json_has_no_nan():
    prediction = Prediction(ImageItem("a", lambda: b""), labels=[("x", math.inf), ("y", math.nan), ("z", 0.5)])
    assert json_line(to_row(prediction, "score")).count("null") == 2
    with pytest.raises(ValueError, match="JSON"):
        json_line({"score": math.nan})
