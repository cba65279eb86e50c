"""The preparation scripts on tiny stand-ins of each source's own files, and `nxtp prepare`."""

import csv
import gzip
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from hatchling.builders.wheel import WheelBuilder
from PIL import Image
from small_shards import contents, jpeg, json_of, picture, samples

from nxtp.data.labels.imagenet import by_wnid, imagenet_classes, real_labels, subset
from nxtp.data.shards.manifest import read_manifest, sha256_of
from nxtp.data.shards.remote import RemoteError
from nxtp.errors import UserError
from nxtp.prepare.commands import prepare
from nxtp.prepare.verification import verify_set
from nxtp.prepare.writer import write_shard

DATA = Path(__file__).parents[2] / "data"


def run(script: str, *arguments, fails: bool = False) -> str:
    """Run a script's command in this process; what it printed."""
    result = CliRunner().invoke(importlib.import_module(script).main, [str(a) for a in arguments] + ["--workers", "1"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code != 0) == fails, result.output
    return result.output


@pytest.fixture
def coco(tmp_path) -> Path:
    root = tmp_path / "coco"
    for split, numbers in (("train", (9, 25, 30, 34)), ("val", (139,))):
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 32, "height": 32, "license": 1} for n in numbers]
        annotations = [
            {"id": 10 * n + c, "image_id": n, "caption": f"A dog number {c} on\na sofa. "}
            for n in numbers
            for c in (2, 1)
        ]
        if split == "train":
            annotations = [a for a in annotations if a["image_id"] != 34]
        path = root / "annotations" / f"captions_{split}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
        for n in numbers:
            if n != 30:
                picture(root / f"{split}2017" / f"{n:012d}.jpg", n)
    return root


def test_coco(coco, tmp_path):
    out = tmp_path / "out"
    text = run("coco", coco, "--out", out)
    assert "missing image × 1" in text
    assert "no caption × 1" in text
    assert f"{coco}/train2017/000000000030.jpg" in text, "named"
    train = samples(out / "train")
    assert sorted(train) == ["000000000009", "000000000025"]
    found = train["000000000009"]
    assert found["caption"] == "A dog number 1 on a sofa. A dog number 2 on a sofa."
    assert found["image"] == (coco / "train2017" / "000000000009.jpg").read_bytes(), "copied byte for byte"
    manifest = read_manifest(out / "train")
    assert manifest["skipped"] == {"missing image": 1, "no caption": 1}
    assert list(samples(out / "val")) == ["000000000139"]

    run("coco", coco, "--out", tmp_path / "separate", "--separate", "--splits", "val", "--nouns", "hanta")
    assert sorted(samples(tmp_path / "separate" / "val")) == ["000000000139_0", "000000000139_1"]
    assert samples(tmp_path / "separate" / "val")["000000000139_0"]["labels"] == ["dog", "number", "sofa"]
    assert read_manifest(tmp_path / "separate" / "val")["nouns"]["backend"] == "hanta"

    stopped = ("coco", coco, "--out", tmp_path / "stop", "--splits", "val", "--stop-nouns", "number, Sofa")
    assert "--stop-nouns needs --nouns" in run(*stopped, fails=True)
    assert "No noun backend ''" in run(*stopped, "--nouns", "", fails=True), "an unset shell variable"
    run(*stopped, "--nouns", "hanta")
    assert samples(tmp_path / "stop" / "val")["000000000139"]["labels"] == ["dog"]
    assert read_manifest(tmp_path / "stop" / "val")["nouns"]["stop"] == "number, Sofa"


@pytest.fixture
def flickr8k(tmp_path) -> Path:
    root = tmp_path / "flickr8k"
    for n in (1, 2, 4):
        picture(root / "Flicker8k_Dataset" / f"{n}_ab.jpg", n)
    lines = [f"{n}_ab.jpg#{c}\tA dog number {c} on a  sofa ." for n in (1, 2, 3) for c in (0, 1)]
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, numbers in (("train", (2, 1, 3, 4)), ("dev", (2,)), ("test", (1,))):
        (root / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{n}_ab.jpg\n" for n in numbers))
    return root


def test_flickr8k(flickr8k, tmp_path):
    out = tmp_path / "out"
    text = run("flickr8k", flickr8k, "--out", out)
    assert "missing image × 1" in text
    assert "no caption × 1" in text
    train = samples(out / "train")
    assert sorted(train) == ["1_ab", "2_ab"]
    assert train["1_ab"]["caption"] == "A dog number 0 on a sofa . A dog number 1 on a sofa ."
    assert train["2_ab"]["image"] == (flickr8k / "Flicker8k_Dataset" / "2_ab.jpg").read_bytes()
    assert list(samples(out / "dev")) == ["2_ab"]
    assert list(samples(out / "test")) == ["1_ab"]
    run("flickr8k", flickr8k, "--out", tmp_path / "separate", "--separate", "--splits", "test")
    assert sorted(samples(tmp_path / "separate" / "test")) == ["1_ab_0", "1_ab_1"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "Flicker8k_Dataset").rename(root / "pictures"),
            "has no folder Flicker8k_Dataset or Images",
        ),
        (lambda root: (root / "Flickr8k.token.txt").unlink(), "Flickr8k.token.txt is missing"),
        (lambda root: (root / "Flickr_8k.testImages.txt").unlink(), "testImages.txt is missing"),
        (
            lambda root: (root / "Flickr8k.token.txt").write_text("1_ab.jpg A dog\n"),
            "line 1: expected IMAGE#NUMBER, a tab and a caption, got '1_ab.jpg A dog'",
        ),
        (lambda root: (root / "Flickr8k.token.txt").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    ],
)
def test_flickr8k_that_is_not_whole_writes_nothing(flickr8k, tmp_path, damage, message):
    damage(flickr8k)
    assert message in " ".join(run("flickr8k", flickr8k, "--out", tmp_path / "out", fails=True).split())
    assert not (tmp_path / "out").exists()


def test_images_that_came_later_or_changed_are_another_source(coco, tmp_path):
    command = ("coco", coco, "--out", tmp_path / "out", "--splits", "train")
    run(*command)
    assert "nothing to do" in run(*command)
    picture(coco / "train2017" / f"{30:012d}.jpg", 30)
    assert "a set made with other options (source)" in run(*command, fails=True)
    assert "3 samples" in run(*command, "--overwrite")
    image = coco / "train2017" / f"{9:012d}.jpg"
    image.write_bytes(image.read_bytes() + b"more")
    assert "a set made with other options (source)" in run(*command, fails=True)


def test_coco_without_annotations(tmp_path):
    (tmp_path / "annotations").mkdir()
    assert "captions_train2017.json is missing" in run("coco", tmp_path, "--out", tmp_path / "o", fails=True)
    (tmp_path / "annotations" / "captions_train2017.json").write_text('{"images": [{"id": 1}]}')
    assert "does not contain COCO captions" in run("coco", tmp_path, "--out", tmp_path / "o", fails=True)
    assert not list((tmp_path).glob("o/*")), "nothing half-written"


@pytest.mark.parametrize("missing", ["annotations/captions_val2017.json", "val2017"])
def test_coco_without_a_split_writes_nothing(coco, tmp_path, missing):
    (coco / missing).rename(coco / "elsewhere")
    message = run("coco", coco, "--out", tmp_path / "out", fails=True)
    assert f"error: {coco / missing} is missing" in message
    assert "or leave 'val' out of --splits" in message
    assert not (tmp_path / "out").exists()
    run("coco", coco, "--out", tmp_path / "out", "--splits", "train")


def test_folder_without_captions_says_where_they_belong(tmp_path):
    picture(tmp_path / "mine" / "a.jpg")
    message = run("folder", tmp_path / "mine", "--out", tmp_path / "out", fails=True)
    assert message.startswith(f"error: {tmp_path / 'mine'}: no image has a usable caption or label: beside NAME.jpg")
    assert "Skipped: no caption × 1 (a.jpg)." in message


def test_class_folders(tmp_path):
    source = tmp_path / "mine"
    for number, name in enumerate(["hot_dog/1", "hot_dog/2", "pets/Guinea Pig/1", "pets/old/cat/1", "outside"]):
        picture(source / f"{name}.jpg", number)
    message = run("folder", source, "--out", tmp_path / "out", fails=True)
    assert "if the folders' names are the labels, add --classes. Skipped: no caption × 5" in message
    text = run("folder", source, "--out", tmp_path / "out", "--classes")
    assert "not in a class folder × 1 (outside.jpg)" in text
    labels = {key: record["labels"] for key, record in json_of(tmp_path / "out").items()}
    assert labels == {
        "hot_dog_1": ["hot dog"],
        "hot_dog_2": ["hot dog"],
        "pets_Guinea Pig_1": ["Guinea Pig"],
        "pets_old_cat_1": ["cat"],
    }
    picture(tmp_path / "flat" / "a.jpg")
    assert "--classes" not in run("folder", tmp_path / "flat", "--out", tmp_path / "o", fails=True)
    message = run("folder", tmp_path / "flat", "--out", tmp_path / "o", "--classes", fails=True)
    assert f"--classes needs a folder for each class, as in {tmp_path / 'flat' / 'dog' / 'NAME.jpg'}." in message


def test_folders_that_are_no_classes_are_named(tmp_path):
    for name in ("train/cat/1", "test/cat/1", "train/n02123045/1"):
        picture(tmp_path / "mine" / f"{name}.jpg")
    message = run("folder", tmp_path / "mine", "--out", tmp_path / "out", "--classes", fails=True)
    both = f"{tmp_path}/mine/test, {tmp_path}/mine/train"
    assert f"{tmp_path / 'mine'} has several splits: prepare each as a set of its own: {both}." in message
    message = run("folder", tmp_path / "mine" / "train", "--out", tmp_path / "out", "--classes", fails=True)
    assert "n02123045 is named by a number of WordNet: nxtp prepare imagenet knows" in message
    run("folder", tmp_path / "mine" / "test", "--out", tmp_path / "out", "--classes")
    for name in ("pets/Train/002.Laysan_Albatross/1", "pets/Train/n02085620-Chihuahua/1", "pets/Val/cat/1"):
        picture(tmp_path / "other" / f"{name}.jpg")
    message = run("folder", tmp_path / "other", "--out", tmp_path / "o", "--classes", fails=True)
    assert f": {tmp_path}/other/pets/Train, {tmp_path}/other/pets/Val." in message
    run("folder", tmp_path / "other" / "pets" / "Train", "--out", tmp_path / "o", "--classes")
    labels = {key: record["labels"] for key, record in json_of(tmp_path / "o").items()}
    assert labels == {"002_Laysan_Albatross_1": ["Laysan Albatross"], "n02085620-Chihuahua_1": ["Chihuahua"]}


def test_splits_of_one_name_are_not_merged(tmp_path):
    for name in ("a/train/cat/1", "b/train/cat/1", "c/train/train/cat/1"):
        picture(tmp_path / "mine" / f"{name}.jpg")
    message = run("folder", tmp_path / "mine", "--out", tmp_path / "out", "--classes", fails=True)
    found = ", ".join(f"{tmp_path}/mine/{name}/train" for name in "abc")
    assert f"{tmp_path / 'mine'} has several splits: prepare each as a set of its own: {found}." in message
    run("folder", tmp_path / "mine" / "c", "--out", tmp_path / "out", "--classes")
    assert json_of(tmp_path / "out")["train_train_cat_1"]["labels"] == ["cat"], "an archive in a folder of its name"


def test_images_that_differ_in_their_format_alone_have_keys_of_their_own(tmp_path):
    for name in ("1.jpg", "1.png", "1.JPG", "1_2.jpg", "a.b.jpg", "a_b.jpg"):
        picture(tmp_path / "mine" / "cat" / name, len(name))
    run("folder", tmp_path / "mine", "--out", tmp_path / "out", "--classes")
    keys = ["cat_1", "cat_1_2", "cat_1_2_2", "cat_1_3", "cat_a_b", "cat_a_b_2"]
    assert sorted(samples(tmp_path / "out")) == keys


def test_nouns_are_found_in_captions_of_json_too(tmp_path):
    picture(tmp_path / "mine" / "1.jpg")
    (tmp_path / "mine" / "1.json").write_text(json.dumps({"caption": "a dog on a sofa"}))
    run("folder", tmp_path / "mine", "--out", tmp_path / "out", "--nouns", "hanta")
    assert json_of(tmp_path / "out")["1"]["labels"] == ["dog", "sofa"]


def test_imagenets_splits_are_not_merged(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "in" / split / "n01440764" / f"{split}.jpg")
    message = run("imagenet", tmp_path / "in", "--out", tmp_path / "out", fails=True)
    both = ", ".join(str(tmp_path / "in" / split) for split in ("train", "val"))
    assert f"has several splits: prepare each as a set of its own: {both}." in message
    run("imagenet", tmp_path / "in" / "train", "--out", tmp_path / "out")


def test_img2dataset_is_read_in_place(tmp_path):
    for shard in range(3):
        record = {
            "caption": "a dog",
            "url": "https://example.org/x.jpg",
            "key": "k",
            "status": "success",
            "sha256": "0",
        }
        content = [
            {"__key__": f"{shard:05d}{i:04d}", "jpg": jpeg((9, 9, 9)), "txt": "a dog on a sofa", "json": record}
            for i in range(2 + shard)
        ]
        write_shard(tmp_path / f"{shard:05d}.tar", content)
        (tmp_path / f"{shard:05d}.parquet").touch()
        if shard != 2:
            stats = {
                "count": 9, "successes": 2 + shard, "failed_to_download": 7 - shard, "failed_to_resize": 0,
                "status_dict": {"success": 2 + shard, "HTTP Error 404: Not Found": 7 - shard},
            }  # fmt: skip
            (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    text = run("img2dataset", tmp_path)
    assert "9 samples in 3 shards" in text
    assert "Unfinished shards" in text
    manifest = read_manifest(tmp_path)
    assert manifest["skipped"] == {"img2dataset: HTTP Error 404: Not Found": 13, "unfinished shard": 1}
    assert len(samples(tmp_path)) == 9
    assert next(iter(samples(tmp_path).values()))["caption"] == "a dog on a sofa"
    run("img2dataset", tmp_path)
    assert read_manifest(tmp_path) == manifest
    damaged = tmp_path / "00000.tar"  # replaced by another of the same size, made earlier
    data = bytearray(damaged.read_bytes())
    data[600] ^= 1
    damaged.write_bytes(data)
    os.utime(damaged, (0, 0))
    run("img2dataset", tmp_path)
    assert read_manifest(tmp_path)["shards"][0]["sha256"] == sha256_of(damaged)
    assert "has no *.tar" in run("img2dataset", DATA, fails=True)


def test_img2dataset_is_counted_where_it_is(tmp_path, monkeypatch):
    bucket = fsspec.filesystem("memory")
    for shard in range(3):
        write_shard(tmp_path / "a.tar", [{"__key__": str(i), "jpg": b"x"} for i in range(2 + shard)])
        bucket.pipe_file(f"/bucket/laion/{shard:05d}.tar", (tmp_path / "a.tar").read_bytes())
        if shard != 2:
            stats = {"successes": 2 + shard, "status_dict": {"success": 2 + shard, "HTTP Error 404": 7 - shard}}
            bucket.pipe_file(f"/bucket/laion/{shard:05d}_stats.json", json.dumps(stats).encode())
    text = run("img2dataset", "memory://bucket/laion/")
    assert "9 samples in 3 shards" in text
    assert "13  img2dataset: HTTP Error 404" in text
    (tmp_path / "manifest.json").write_bytes(bucket.cat_file("/bucket/laion/manifest.json"))
    manifest = read_manifest(tmp_path)
    assert [row["samples"] for row in manifest["shards"]] == [2, 3, 4]
    assert manifest["skipped"] == {"img2dataset: HTTP Error 404": 13, "unfinished shard": 1}
    for shard in range(3):
        (tmp_path / f"{shard:05d}.tar").write_bytes(bucket.cat_file(f"/bucket/laion/{shard:05d}.tar"))
    (tmp_path / "a.tar").unlink()
    assert verify_set(tmp_path, 1, images=False)[0] == [], "without hashes, the rest is compared"
    assert "has no *.tar" in run("img2dataset", "memory://bucket/nothing", fails=True)
    assert "has no *.tar" in run("img2dataset", "memory://bucket/laion/00000.tar", fails=True), (
        "nothing is written in it"
    )
    monkeypatch.setattr("nxtp.data.shards.counts.read_index", failing(RemoteError("unreachable shard", "503")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))  # without those of before
    bucket.rm("/bucket/laion/manifest.json")
    text = run("img2dataset", "memory://bucket/laion", fails=True)
    assert "00002.tar cannot be read (unreachable shard × 1): nothing is written." in text, "before, it had no samples"
    assert not bucket.exists("/bucket/laion/manifest.json")


def test_openimages(tmp_path):
    images = tmp_path / "validation"
    for n, name in enumerate(("0001eeaf4aed83f9", "0004886b7d043cfd", "000595fe6fee6369")):
        picture(images / f"{name}.jpg", n)
    lines = [
        ("0001eeaf4aed83f9", 7, "Second  teller sees a cat."),
        ("0001eeaf4aed83f9", 3, "A dog on grass."),
        ("0004886b7d043cfd", 1, "A car."),
        ("ffff000000000000", 1, "An image that is not there."),
    ]
    narratives = tmp_path / "open_images_validation_localized_narratives.jsonl"
    narratives.write_text(
        "".join(
            json.dumps(
                {"dataset_id": "open_images", "image_id": image, "annotator_id": who, "caption": text, "traces": []}
            )
            + "\n"
            for image, who, text in lines
        )
    )
    out = tmp_path / "narratives"
    run("openimages", "--images", images, "--narratives", narratives, "--out", out)
    found = samples(out)
    assert sorted(found) == ["0001eeaf4aed83f9", "0004886b7d043cfd"]
    assert found["0001eeaf4aed83f9"]["caption"] == "A dog on grass. Second teller sees a cat."
    assert read_manifest(out)["skipped"] == {"missing image": 1}

    labels, classes = (
        tmp_path / "oidv7-val-annotations-human-imagelabels.csv",
        tmp_path / "oidv7-class-descriptions.csv",
    )
    rows = [
        ("0001eeaf4aed83f9", "/m/0bt9lr", "1"), ("0001eeaf4aed83f9", "/m/01yrx", "0"),
        ("0004886b7d043cfd", "/m/01yrx", "0"), ("000595fe6fee6369", "/m/01yrx", "1.0"),
    ]  # fmt: skip
    with open(labels, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageID", "Source", "LabelName", "Confidence"])
        writer.writerows([image, "verification", label, confidence] for image, label, confidence in rows)
    classes.write_text('LabelName,DisplayName\n/m/0bt9lr,Dog\n/m/01yrx,"Cat, domestic"\n')
    out = tmp_path / "labels"
    run("openimages", "--images", images, "--labels", labels, "--classes", classes, "--out", out)
    found = {key: sample["labels"] for key, sample in samples(out).items()}
    assert found == {"0001eeaf4aed83f9": ["Dog"], "000595fe6fee6369": ["Cat, domestic"]}
    assert read_manifest(out)["skipped"] == {"no label": 1}
    assert "--narratives" in run("openimages", "--images", images, "--out", out, fails=True)
    narratives.write_text('{"image_id": "x"}\n')
    assert "line 1: not a localized narrative" in run(
        "openimages", "--images", images, "--narratives", narratives, "--out", out, fails=True
    )


def test_visual_genome(tmp_path):
    source = tmp_path / "vg"
    url = "https://cs.stanford.edu/people/rak248/"
    meta = [
        {"image_id": n, "url": f"{url}{'VG_100K' if n != 2 else 'VG_100K_2'}/{n}.jpg", "width": 3} for n in (1, 2, 3)
    ]
    objects = [
        {"image_id": 1, "objects": [{"object_id": 5, "names": ["tree", "oak"]}, {"object_id": 6, "names": ["tree"]}]},
        {"image_id": 2, "objects": [{"object_id": 7, "names": ["man"]}]},
        {"image_id": 3, "objects": []},
    ]
    regions = [
        {"id": n, "regions": [{"region_id": 1, "image_id": n, "phrase": "a man. "}, {"phrase": "the sky is blue"}]}
        for n in (1, 2, 3)
    ]
    source.mkdir()
    for name, content in (("image_data", meta), ("objects", objects), ("region_descriptions", regions)):
        (source / f"{name}.json").write_text(json.dumps(content))
    for n in (1, 2, 3):
        picture(source / ("VG_100K" if n != 2 else "VG_100K_2") / f"{n}.jpg", n)
    run("visual_genome", source, "--out", tmp_path / "objects")
    assert {k: s["labels"] for k, s in samples(tmp_path / "objects").items()} == {"1": ["tree", "oak"], "2": ["man"]}
    assert read_manifest(tmp_path / "objects")["skipped"] == {"no text": 1}
    run("visual_genome", source, "--out", tmp_path / "regions", "--text", "regions")
    assert samples(tmp_path / "regions")["3"]["caption"] == "a man. the sky is blue"
    (source / "objects.json").write_text("[{}]")
    assert "not Visual Genome's files" in run("visual_genome", source, "--out", tmp_path / "x", fails=True)


def test_folder(tmp_path):
    source = tmp_path / "mine"
    picture(source / "a" / "one.v2.JPG")
    (source / "a" / "one.v2.txt").write_bytes("un café".encode("latin-1"))
    gif = io.BytesIO()
    Image.new("P", (40, 40), 3).save(gif, "GIF")
    (source / "two.gif").write_bytes(gif.getvalue())
    (source / "two.json").write_text('{"labels": ["flag"]}')
    picture(source / "three.png")
    run("folder", source, "--out", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert found["a_one_v2"]["caption"] == "un café"
    assert found["two"]["labels"] == ["flag"]
    assert Image.open(io.BytesIO(found["two"]["image"])).format == "PNG", "formats that shards do not hold become PNG"
    assert read_manifest(tmp_path / "out")["skipped"] == {"no caption": 1}


def test_folder_skips_what_training_would_skip(tmp_path):
    source = tmp_path / "mine"
    texts = {
        "string": '{"labels": "cat"}',
        "number": '{"labels": ["cat", 3]}',
        "nocaption": '{"caption": 5}',
        "deep": "[" * 100_000,
        "list": '["cat"]',
        "blank": '{"labels": [" "]}',
        "good": '{"labels": ["cat"]}',
    }
    for n, (name, text) in enumerate(texts.items()):
        picture(source / f"{name}.jpg", n)
        (source / f"{name}.json").write_text(text)
    for n in range(4):
        picture(source / f"mute{n}.jpg", n)
    (source / "blank.txt").write_text("a dog")
    picture(source / "long.jpg")
    (source / "long.txt").write_text("a dog " * 2_000_000)
    message = run("folder", source, "--out", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert {key: s["labels"] or s["caption"] for key, s in found.items()} == {"good": ["cat"], "blank": "a dog"}
    for part in (
        "labels not a list of strings × 2 (number.jpg, string.jpg)",
        "bad json × 2 (deep.jpg, list.jpg)",
        "no caption × 5 (mute0.jpg, mute1.jpg, mute2.jpg and 2 more)",
        f"oversized caption × 1 ({source / 'long.jpg'})",
        "2 samples in 1 shard,",
    ):
        assert part in message


# --- ImageNet --------------------------------------------------------------------------------------------------

WNIDS = ["n01440764", "n01443537", "n04099969"]


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def class_folders(tmp_path) -> Path:
    for wnid in WNIDS:
        for n in range(2):
            picture(tmp_path / "train" / wnid / f"{wnid}_{n}.JPEG", n + WNIDS.index(wnid) * 2)
    return tmp_path / "train"


def test_imagenet_folders_and_official_tar_are_the_same(class_folders, tmp_path):
    run("imagenet", class_folders, "--out", tmp_path / "folders" / "train")
    inner = {
        f"{wnid}.tar": tar_of({p.name: p.read_bytes() for p in sorted((class_folders / wnid).iterdir())})
        for wnid in WNIDS
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    run("imagenet", tmp_path / "ILSVRC2012_img_train.tar", "--out", tmp_path / "tar" / "train")
    found = samples(tmp_path / "folders" / "train")
    assert found == samples(tmp_path / "tar" / "train")
    assert found["n01440764_1"]["labels"] == ["tench", "Tinca tinca"]
    assert json_of(tmp_path / "tar" / "train")["n04099969_0"] == {
        "labels": ["rocking chair", "rocker"],
        "class": 765,
        "wnid": "n04099969",
        "crc32": zlib.crc32(found["n04099969_0"]["image"]),
    }
    run("imagenet", class_folders, "--out", tmp_path / "first", "--names", "first")
    assert samples(tmp_path / "first")["n04099969_0"]["labels"] == ["rocking chair"]
    order = list(found)
    assert order != sorted(order), "classes are mixed, whatever the window of the loader"


def test_imagenet_validation_with_each_kind_of_truth(tmp_path):
    from scipy.io import savemat

    flat = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg((n, 90, 20), seed=n) for n in (1, 2, 3)}
    (tmp_path / "val.tar").write_bytes(tar_of(flat))
    wnids = [WNIDS[2], WNIDS[0], WNIDS[2]]
    (tmp_path / "truth.txt").write_text("\n".join(wnids))
    rows = [f"ILSVRC2012_val_{n:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for n, wnid in enumerate(wnids, start=1)]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))
    synsets = np.zeros(3, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for row, wnid in zip(synsets, (WNIDS[2], WNIDS[1], WNIDS[0]), strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["words"] = {WNIDS[2]: 1, WNIDS[1]: 2, WNIDS[0]: 3}[wnid], wnid, "x"
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n3\n1\n",
    }
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_of(kit)))
    for truth in ("truth.txt", "LOC_val_solution.csv", "ILSVRC2012_devkit_t12.tar.gz"):
        out = tmp_path / f"out-{truth[:5]}"
        run("imagenet", tmp_path / "val.tar", "--truth", tmp_path / truth, "--out", out)
        assert {int(k[-1]): r["wnid"] for k, r in json_of(out).items()} == dict(enumerate(wnids, start=1)), truth
    assert "add --truth" in run("imagenet", tmp_path / "val.tar", "--out", tmp_path / "x", fails=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
    (tmp_path / "half.tar.gz").write_bytes((tmp_path / "ILSVRC2012_devkit_t12.tar.gz").read_bytes()[:-200])
    for truth in (DATA / "concepts.csv", tmp_path / "empty", tmp_path / "short.csv", tmp_path / "half.tar.gz"):
        message = run("imagenet", tmp_path / "val.tar", "--truth", truth, "--out", tmp_path / "x", fails=True)
        assert "does not contain the classes" in message, truth


def test_imagenet_variants(tmp_path, class_folders):
    picture(tmp_path / "v2" / "765" / "0af3f1b55de791c4436373.jpeg", 1)
    picture(tmp_path / "v2" / "0" / "0af3f1b55de791c4436373.jpeg", 2)
    run("imagenet", tmp_path / "v2", "--set", "v2", "--out", tmp_path / "out-v2")
    assert {k: r["class"] for k, r in json_of(tmp_path / "out-v2").items()} == {
        "765_0af3f1b55de791c4436373": 765,
        "0_0af3f1b55de791c4436373": 0,
    }
    assert "add --set v2" in run("imagenet", tmp_path / "v2", "--out", tmp_path / "x", fails=True)

    classes = imagenet_classes()
    for kind in ("a", "r"):
        wnid = classes[min(subset(f"imagenet_{kind}"))].wnid
        root = tmp_path / f"imagenet-{kind}"
        picture(root / wnid / "0.000116_digital clock _ digital clock_0.865662.jpg")
        (root / "README.txt").write_text("about")
        run("imagenet", root, "--set", kind, "--out", tmp_path / f"out-{kind}")
        (record,) = json_of(tmp_path / f"out-{kind}").values()
        assert record["wnid"] == wnid
        outside = next(c.wnid for c in classes if c.index not in subset(f"imagenet_{kind}"))
        picture(root / outside / "x.jpg")
        assert "is not among the 200" in run("imagenet", root, "--set", kind, "--out", tmp_path / "x", fails=True)

    picture(tmp_path / "sketch" / WNIDS[0] / "sketch_0.JPEG")
    run("imagenet", tmp_path / "sketch", "--set", "sketch", "--out", tmp_path / "out-sketch")
    assert list(json_of(tmp_path / "out-sketch")) == [f"{WNIDS[0]}_sketch_0"]

    for n in (1, 2, 3):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{n:08d}.JPEG", n)
    run("imagenet", tmp_path / "val", "--set", "real", "--out", tmp_path / "out-real")
    assert real_labels()[0] == ()
    found = json_of(tmp_path / "out-real")
    assert {int(k[-1]): tuple(r["classes"]) for k, r in found.items()} == {2: real_labels()[1], 3: real_labels()[2]}
    assert classes[real_labels()[1][0]].synonyms[0] in found["ILSVRC2012_val_00000002"]["labels"]
    assert read_manifest(tmp_path / "out-real")["skipped"] == {"no ReaL label": 1}
    assert "ReaL's labels belong" in run(
        "imagenet", class_folders, "--set", "real", "--out", tmp_path / "x", fails=True
    )

    root = tmp_path / "objectnet-1.0" / "images"
    original = picture(root / "air_freshener" / "0a.png", 4, format="PNG")
    picture(root / "Band Aid" / "1b.png", 5, format="PNG")
    (root.parent / "mappings").mkdir()
    (root.parent / "mappings" / "folder_to_objectnet_label.json").write_text('{"air_freshener": "Air freshener (can)"}')
    run("imagenet", root, "--set", "objectnet", "--crop-border", "2", "--out", tmp_path / "out-objectnet")
    found = samples(tmp_path / "out-objectnet")
    assert {tuple(s["labels"]) for s in found.values()} == {("air freshener (can)",), ("band aid",)}
    cropped, whole = (
        np.asarray(Image.open(io.BytesIO(data))) for data in (found["air_freshener_0a"]["image"], original)
    )
    assert np.array_equal(cropped, whole[2:-2, 2:-2])
    for damaged in (b"{", b"[5]", b"[]", b'{"air_freshener": null}', b"\xff", b"[" * 100_000):
        (root.parent / "mappings" / "folder_to_objectnet_label.json").write_bytes(damaged)
        message = run("imagenet", root, "--set", "objectnet", "--out", tmp_path / "x", fails=True)
        assert "folder_to_objectnet_label.json is not ObjectNet's table of labels (" in message

    picture(tmp_path / "other" / "cats" / "a.jpg")
    assert "the folder 'cats' is not a class" in run(
        "imagenet", tmp_path / "other", "--out", tmp_path / "x", fails=True
    )


def test_imagenet_names():
    classes = imagenet_classes()
    assert [c.index for c in classes] == list(range(1000))
    assert by_wnid()["n02510455"].labels("clip") == ["giant panda"]
    assert all(c.synonyms for c in classes)
    names = {c.labels("clip")[0] for c in classes}
    assert len(names) == 998  # CLIP's authors call two classes "missile" and two "sunglasses"
    assert len(subset("imagenet_a")) == len(subset("imagenet_r")) == 200
    assert len(real_labels()) == 50_000
    with pytest.raises(UserError, match="Did you mean 'synonyms'"):
        classes[0].labels("synonym")


def test_keys_with_dots(coco, tmp_path):
    path = coco / "annotations" / "captions_val2017.json"
    path.write_text(path.read_text().replace("000000000139", "v1.139"))
    picture(coco / "val2017" / "v1.139.jpg")
    run("coco", coco, "--out", tmp_path / "out", "--splits", "val")
    assert list(samples(tmp_path / "out" / "val")) == ["v1_139"]


@pytest.mark.parametrize("change", ['"caption": null', '"caption": 5', '"captions": "x"'])
def test_other_annotations_are_a_user_error(coco, tmp_path, change):
    path = coco / "annotations" / "captions_val2017.json"
    path.write_text(re.sub(r'"caption": "[^"]*"', change, path.read_text()))
    message = run("coco", coco, "--out", tmp_path / "out", "--splits", "val", fails=True)
    assert "does not contain COCO captions" in message


def test_openimages_tables_in_other_encodings(tmp_path):
    (tmp_path / "n.jsonl").write_bytes('{"image_id": "a", "annotator_id": 1, "caption": "caf\xe9"}\n'.encode("latin-1"))
    message = run(
        "openimages", "--images", tmp_path, "--narratives", tmp_path / "n.jsonl", "--out", tmp_path, fails=True
    )
    assert "line 1: not a localized narrative" in message


def test_a_negative_seed_is_one_line():
    result = CliRunner().invoke(importlib.import_module("scenes").main, ["--seed", "-1"])
    assert result.exit_code == 2
    assert "-1 is not in the range x>=0" in result.output


def test_img2dataset_where_nothing_can_be_written(tmp_path, monkeypatch):
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "jpg": b"x"}])
    monkeypatch.setattr("nxtp.runs.atomic.open", failing(PermissionError(13, "Permission denied")), raising=False)
    assert "manifest.json cannot be written there (Permission denied)" in run("img2dataset", tmp_path, fails=True)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("img2dataset.describe_shard", failing(AssertionError("read although it cannot be written")))
    assert "manifest.json cannot be written there" in run("img2dataset", tmp_path, fails=True)


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


SCRIPTS = sorted(p.stem for p in DATA.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_an_example(script):
    result = CliRunner().invoke(importlib.import_module(script).main, ["--help"])
    assert result.exit_code == 0
    assert f"nxtp prepare {script}" in result.output
    same = CliRunner().invoke(prepare, [script, "--help"]).output
    assert same.partition("\n")[2] == result.output.partition("\n")[2], "all but the usage"


def test_prepare_lists_the_scripts_without_importing_them(monkeypatch):
    for script in SCRIPTS:
        monkeypatch.delitem(sys.modules, f"nxtp.prepare.scripts.{script}", raising=False)
    result = CliRunner().invoke(prepare, ["--help"])
    assert re.findall(r"^  (\w+)  ", result.output, re.MULTILINE) == SCRIPTS
    assert "COCO captions 2017 as shards" in result.output
    assert not any(name.startswith("nxtp.prepare.scripts.") for name in sys.modules)
    result = CliRunner().invoke(prepare, ["cocoa"])
    assert result.exit_code == 2
    assert "No source 'cocoa'. Did you mean 'coco'?" in result.output


def test_prepare_writes_what_the_script_writes(coco, tmp_path):
    run("coco", coco, "--out", tmp_path / "script")
    arguments = ["coco", str(coco), "--out", str(tmp_path / "command"), "--workers", "2", "--shard-size", "5000"]
    assert CliRunner().invoke(prepare, arguments).exit_code == 0
    for split in ("train", "val"):
        assert contents(tmp_path / "command" / split) == contents(tmp_path / "script" / split)
    result = CliRunner().invoke(prepare, ["coco", str(tmp_path), "--out", str(tmp_path / "x")])
    assert isinstance(result.exception, UserError), "reported by `nxtp`, as for its other commands"
    assert "captions_train2017.json is missing" in str(result.exception)


def test_an_installed_wheel_prepares_as_the_scripts_do(tmp_path):
    """In an interpreter that sees the wheel alone: the same sources, options and help, and the same shards."""
    (wheel,) = WheelBuilder(str(DATA.parent)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    picture(tmp_path / "mine" / "cat" / "1.jpg")
    calls = {
        "folder": [str(tmp_path / "mine"), "--classes", "--workers", "1"],
        "scenes": ["--train", "2", "--val", "1", "--val-style", "1", "--workers", "1"],
    }
    code = f"""
import json, nxtp
from click.testing import CliRunner
from nxtp.prepare.commands import prepare
assert nxtp.__file__ == {str(tmp_path / "installed/nxtp/__init__.py")!r}
helps = {{name: CliRunner().invoke(prepare, [name, "--help"]).output for name in prepare.list_commands(None)}}
for name, arguments in {calls}.items():
    done = CliRunner().invoke(prepare, [name, *arguments, "--out", f"command/{{name}}"])
    assert done.exit_code == 0, (done.output, done.exception)
print(json.dumps(helps))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout)
    assert sorted(helps) == SCRIPTS
    for script, text in helps.items():
        result = CliRunner().invoke(importlib.import_module(script).main, ["--help"])
        assert text.partition("\n")[2] == result.output.partition("\n")[2], "all but the usage"
    for script, arguments in calls.items():
        out = tmp_path / "script" / script
        assert CliRunner().invoke(importlib.import_module(script).main, [*arguments, "--out", str(out)]).exit_code == 0
        for path in (path for path in out.rglob("*") if path.is_file()):
            assert path.read_bytes() == (tmp_path / "command" / script / path.relative_to(out)).read_bytes()


def test_the_wheel_contains_every_script():
    with open(DATA.parent / "pyproject.toml", "rb") as file:
        included = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for path in (*DATA.glob("*.py"), *DATA.glob("*.csv")):
        assert included[f"data/{path.name}"] == f"nxtp/prepare/scripts/{path.name}"
