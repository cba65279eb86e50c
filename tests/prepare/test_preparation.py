"""The preparation scripts on tiny stand-ins of each source's own files, and the writer that they share."""

import csv
import gzip
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from PIL import Image
from small_shards import jpeg, sample
from webdataset.writer import TarWriter

from nxtp.data.labels.imagenet import by_wnid, imagenet_classes, real_labels, subset
from nxtp.data.shards.manifest import read_manifest, sha256_of
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.urls import expand_shards
from nxtp.errors import UserError
from nxtp.prepare.commands import prepare
from nxtp.prepare.items import Item, write_items
from nxtp.prepare.options import WriterOptions
from nxtp.prepare.writer import UNFINISHED, Skip, write_set, write_shard

DATA = Path(__file__).parents[2] / "data"


def run(script: str, *arguments, fails: bool = False) -> str:
    """Run a script's command in this process; what it printed."""
    result = CliRunner().invoke(importlib.import_module(script).main, [str(a) for a in arguments] + ["--workers", "1"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def samples(directory: Path) -> dict[str, dict]:
    """Key → what a sample holds, after the reader and the manifest agree on their number."""
    shards = IndexedShards(expand_shards(directory))
    assert not shards.skipped
    assert read_manifest(directory)["samples"] == len(shards)
    raws = [shards.read(i) for i in range(len(shards))]
    return {raw.key: {"image": raw.image, "caption": raw.caption, "labels": raw.labels} for raw in raws}


def json_of(directory: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))
    return found


def picture(path: Path, number: int = 0, **save) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    if save:
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, **save)
    else:
        path.write_bytes(jpeg((90, 20 * number % 255, 30), seed=number))
    return path.read_bytes()


# --- sources ---------------------------------------------------------------------------------------------------


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

    run("coco", coco, "--out", tmp_path / "separate", "--separate", "--splits", "val", "--nouns", "textblob")
    assert sorted(samples(tmp_path / "separate" / "val")) == ["000000000139_0", "000000000139_1"]
    assert samples(tmp_path / "separate" / "val")["000000000139_0"]["labels"] == ["dog", "number", "sofa"]
    assert read_manifest(tmp_path / "separate" / "val")["nouns"]["backend"] == "textblob"


def test_coco_without_annotations(tmp_path):
    (tmp_path / "annotations").mkdir()
    assert "captions_train2017.json is missing" in run("coco", tmp_path, "--out", tmp_path / "o", fails=True)
    (tmp_path / "annotations" / "captions_train2017.json").write_text('{"images": [{"id": 1}]}')
    assert "does not contain COCO captions" in run("coco", tmp_path, "--out", tmp_path / "o", fails=True)
    assert not list((tmp_path).glob("o/*")), "nothing half-written"


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


def test_folder_leaves_out_what_training_would_skip(tmp_path):
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
    told = run("folder", source, "--out", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert {key: s["labels"] or s["caption"] for key, s in found.items()} == {"good": ["cat"], "blank": "a dog"}
    for part in (
        "labels not a list of strings × 2 (number.jpg, string.jpg)",
        "bad json × 2 (deep.jpg, list.jpg)",
        "no caption × 5 (mute0.jpg, mute1.jpg, mute2.jpg and 2 more)",
        f"oversized caption × 1 ({source / 'long.jpg'})",
        "2 samples in 1 shard,",
    ):
        assert part in told


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
    assert "does not contain the classes" in run(
        "imagenet", tmp_path / "val.tar", "--truth", DATA / "concepts.csv", "--out", tmp_path / "x", fails=True
    )


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

    picture(tmp_path / "other" / "cats" / "a.jpg")
    assert "the folder 'cats' is not a class" in run(
        "imagenet", tmp_path / "other", "--out", tmp_path / "x", fails=True
    )


def test_imagenet_names():
    classes = imagenet_classes()
    assert [c.index for c in classes] == list(range(1000))
    assert by_wnid()["n02510455"].labels("clip") == ["giant panda"]
    assert all(c.synonyms for c in classes)
    assert len({c.clip_name for c in classes}) == 998  # CLIP's authors call two classes "missile" and two "sunglasses"
    assert len(subset("imagenet_a")) == len(subset("imagenet_r")) == 200
    assert len(real_labels()) == 50_000
    with pytest.raises(UserError, match="Did you mean 'synonyms'"):
        classes[0].labels("synonym")


# --- the shared writer -----------------------------------------------------------------------------------------


@pytest.fixture
def items(tmp_path) -> list[Item]:
    source = tmp_path / "source"
    return [Item(f"{n:03d}", str(source / f"{n}.jpg"), "a dog") for n in range(20) if picture(source / f"{n}.jpg", n)]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_any_number_of_workers_writes_the_same(tmp_path, items):
    for workers in (1, 3):
        write_items(
            tmp_path / str(workers) / "s", items, made_by={}, options=WriterOptions(shard_size=6, workers=workers)
        )
    assert contents(tmp_path / "1" / "s") == contents(tmp_path / "3" / "s")
    assert len(contents(tmp_path / "1" / "s")) == 4 + 1


def test_a_second_run_does_nothing_and_a_lost_shard_is_written_again(tmp_path, items, capsys):
    out, options = tmp_path / "s", WriterOptions(shard_size=6)
    items = [*items, Item("gone", str(tmp_path / "gone.jpg"), "x")]
    write_items(out, items, made_by={}, options=options)
    before, times = contents(out), {p: p.stat().st_mtime_ns for p in out.iterdir()}
    write_items(out, items, made_by={}, options=options)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    assert "nothing to do" in capsys.readouterr().err
    damage(out / "s-00003.tar")  # the only one that differs
    write_items(out, items, made_by={}, options=options)
    message = capsys.readouterr().err
    assert "1 shard missing or damaged, written again: s-00003.tar" in message
    assert "nothing to do" not in message
    assert contents(out) == before
    assert (out / "s-00000.tar").stat().st_mtime_ns == times[out / "s-00000.tar"], "the others are kept"
    (out / "s-00001.tar").unlink()
    damage(out / "s-00002.tar")
    write_items(out, items, made_by={}, options=options)
    assert contents(out) == before, "missing and damaged shards are written again, with the same counts"


def damage(path: Path) -> None:
    """The same size, other bytes."""
    with open(path, "r+b") as file:
        file.seek(700)
        file.write(b"XXXX")


def test_other_options_are_refused_unless_asked(tmp_path, items):
    out = tmp_path / "s"
    write_items(out, items, made_by={"script": "a"}, options=WriterOptions(shard_size=6))
    with pytest.raises(UserError, match=r"other options \(shard_size\)"):
        write_items(out, items, made_by={"script": "a"}, options=WriterOptions(shard_size=7))
    with pytest.raises(UserError, match=r"other options \(source\)"):
        write_items(out, items[:-1], made_by={"script": "a"}, options=WriterOptions(shard_size=6))
    assert not (out / UNFINISHED).exists(), "a refused run leaves nothing"
    write_items(out, items, made_by={"script": "a"}, options=WriterOptions(shard_size=50, overwrite=True))
    assert [p.name for p in out.glob("*.tar")] == ["s-00000.tar"]
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="shards of unknown origin"):
        write_items(out, items, made_by={"script": "a"}, options=WriterOptions(shard_size=50))


def make_plain(item: Item) -> dict:
    return {"__key__": item.key, "jpg": Path(item.image).read_bytes()}


def test_a_failed_run_continues(tmp_path, items):
    out, options = tmp_path / "s", WriterOptions(shard_size=6)
    made = []

    def make(item):
        if len(made) == 14:
            raise KeyboardInterrupt
        made.append(item)
        return make_plain(item)

    def make_all(item):
        made.append(item)
        return make_plain(item)

    with pytest.raises(KeyboardInterrupt):
        write_set(out, items, make, made_by={}, options=options)
    assert read_manifest(out) is None
    assert (out / UNFINISHED).is_dir()
    assert sorted(p.name for p in out.glob("*.tar")) == ["s-00000.tar", "s-00001.tar"]
    with pytest.raises(UserError, match=r"other options \(script\)"):
        write_set(out, items, make_all, made_by={"script": "other"}, options=options)
    (out / UNFINISHED / "s-00002.tar.json").write_text('{"torn')
    made.clear()
    write_set(out, items, make_all, made_by={}, options=options)
    assert made == items[12:], "finished shards are kept"
    assert not (out / UNFINISHED).exists()
    assert len(samples(out)) == 20


def test_a_set_with_shards_without_samples_is_finished(tmp_path, items):
    out, options, made = tmp_path / "s", WriterOptions(shard_size=1), []

    def make(item):
        made.append(item)
        if item is items[3]:
            raise Skip("tested")
        return {"__key__": item.key, "jpg": b"x"}

    for _ in range(2):
        assert write_set(out, items, make, made_by={}, options=options)["samples"] == 19
    assert made == items, "each once"


class Killed(BaseException):
    """Raised in place of SIGKILL."""


@pytest.mark.parametrize("before", ["unfinished", "finished", "other options"])
def test_a_kill_at_any_change_of_the_directory_loses_nothing(tmp_path, items, before, monkeypatch):
    """A run ends before or after any one of its renames and deletions; the next run continues."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # for disks that lose power; slow
    out, options = tmp_path / "s", WriterOptions(shard_size=4, overwrite=before == "other options")
    items = items[:9]

    def stop(item):
        if item is items[7]:
            raise KeyboardInterrupt
        return make_plain(item)

    def killed(function, state):
        def call(*arguments, **keywords):
            state["calls"] += 1
            if state["calls"] > state["last"]:
                raise Killed  # nothing is cleaned up either
            result = function(*arguments, **keywords)
            if state["calls"] == state["last"] and state["after"]:
                state["last"] = 0
                raise Killed
            return result

        return call

    write_set(tmp_path / "sound" / "s", items, make_plain, made_by={}, options=options)
    sound = contents(tmp_path / "sound" / "s")
    for last, after in ((last, after) for last in range(1, 40) for after in (False, True)):
        if before == "finished":
            write_set(out, items, make_plain, made_by={}, options=options)
            (out / "s-00001.tar").unlink()
            damage(out / "s-00002.tar")
        elif before == "unfinished":
            with pytest.raises(KeyboardInterrupt):
                write_set(out, items, stop, made_by={}, options=options)
        else:
            write_set(out, items, make_plain, made_by={"other": 1}, options=WriterOptions(shard_size=5))
        finished = False
        with monkeypatch.context() as patch:
            state = {"calls": 0, "last": last, "after": after}
            for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (Path, "unlink")):
                patch.setattr(module, name, killed(getattr(module, name), state))
            with suppress(Killed):
                write_set(out, items, make_plain, made_by={}, options=options)
                finished = True
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if is_finished(path, sound)}
        write_set(out, items, make_plain, made_by={}, options=options)
        assert contents(out) == sound, (last, after)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), (last, after)
        shutil.rmtree(out)
        if finished:
            assert last > 4
            return
    raise AssertionError("a run changes its directory more often than expected")


def is_finished(shard: Path, sound: dict[str, bytes]) -> bool:
    """Whether a shard is as it is to be, and its JSON or the manifest says so."""
    known = (shard.parent / UNFINISHED / f"{shard.name}.json").exists() or (shard.parent / "manifest.json").exists()
    return known and shard.read_bytes() == sound.get(shard.name)


def test_nothing_of_an_unfinished_set_with_other_options_is_used(tmp_path, items):
    def skip_first_shard(item):
        if item in items[:6]:
            raise Skip("tested")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / "s", items, skip_first_shard, made_by={"n": 1}, options=WriterOptions(shard_size=6))
    options = WriterOptions(shard_size=6, overwrite=True)
    assert write_set(tmp_path / "s", items, make_plain, made_by={"n": 2}, options=options)["samples"] == 20


def test_a_shard_is_what_webdataset_writes(tmp_path):
    rows = [sample(n, labels=n % 2 == 0) for n in range(3)] + [{"__key__": 40 * "写真", "png": b"x" * 5000, "txt": ""}]
    write_shard(tmp_path / "a.tar", rows)
    same = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
    with open(tmp_path / "b.tar", "wb") as file, TarWriter(file, encoder=False, compress=False, **same) as tar:
        for row in rows:
            text = {"json": json.dumps(row["json"], separators=(",", ":")).encode()} if "json" in row else {}
            tar.write(row | {"txt": row["txt"].encode()} | text)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


SCRIPT = """
import os, sys, time
from nxtp.prepare.options import WriterOptions
from nxtp.prepare.writer import write_set
def make(n):
    while n >= 150 and not os.path.exists(sys.argv[2]):
        time.sleep(0.01)
    return {"__key__": f"{n:04d}", "jpg": b"x" * n}
if __name__ == "__main__":
    write_set(sys.argv[1], range(300), make, made_by={}, options=WriterOptions(shard_size=20, workers=2))
"""


def test_a_killed_run_ends_with_its_workers_and_continues(tmp_path):
    script, out, go = tmp_path / "script.py", tmp_path / "s", tmp_path / "go"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script, out, go], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.tar"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(workers, timeout=30)
    for orphan in left:
        orphan.kill()
    assert not left
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert 5 <= len(kept) < 15
    go.touch()
    again = subprocess.run([sys.executable, script, out, go], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert len(after) == 15
    changed = [name for name in kept if after[name] != kept[name]]
    assert len(changed) <= 2, "except for shards, one per worker, whose JSON was not written yet"
    assert read_manifest(out)["samples"] == 300
    assert not [p for p in out.iterdir() if p.name.startswith(".")], "nothing hidden is left"


def test_out_that_cannot_be_written_is_a_user_error(tmp_path, items):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose another --out"):
        write_items(tmp_path / "file" / "s", items, made_by={})


def test_two_runs_do_not_write_one_set(tmp_path, items):
    out = tmp_path / "s"

    def make(item):
        with pytest.raises(UserError, match="another process"):
            write_set(out, items, make, made_by={})
        raise Skip("tested")

    with pytest.raises(
        UserError, match=r"no item of the source can be used. Skipped: tested × 20 \(.*0.jpg, .* and 17 more\)"
    ):
        write_set(out, items, make, made_by={})


def test_resize_keeps_the_ratio_and_small_images(tmp_path):
    source = tmp_path / "source"
    small = picture(source / "small.jpg", 1, format="JPEG")
    Image.new("RGB", (200, 100), "red").save(source / "large.png")
    items = [Item(p.stem, str(p), "x") for p in sorted(source.iterdir())]
    write_items(tmp_path / "s", items, made_by={}, options=WriterOptions(resize=50, quality=90))
    found = samples(tmp_path / "s")
    assert found["small"]["image"] == small
    image = Image.open(io.BytesIO(found["large"]["image"]))
    assert (image.format, image.size) == ("JPEG", (100, 50))
    assert read_manifest(tmp_path / "s")["made_by"]["quality"] == 90


def test_bad_images_are_counted(tmp_path):
    source = tmp_path / "source"
    picture(source / "good.jpg")
    (source / "text.jpg").write_text("no image")
    (source / "empty.jpg").touch()
    (source / "cut.jpg").write_bytes(picture(source / "good2.jpg", 2, format="JPEG")[:-200])
    items = [Item(p.stem, str(p), "x") for p in sorted(source.iterdir())] + [
        Item("none", str(source / "none.jpg"), "x")
    ]
    kinds = {"bad image": 1, "empty image": 1, "missing image": 1}
    assert write_items(tmp_path / "s", items, made_by={})["skipped"] == kinds
    checked = write_items(tmp_path / "c", items, made_by={}, options=WriterOptions(check=True))
    assert checked["skipped"] == kinds | {"bad image": 2}
    with pytest.raises(UserError, match="The source has 6 keys more than once, the first is"):
        write_items(tmp_path / "d", items + items, made_by={})
    with pytest.raises(UserError, match="gives no sample"):
        write_items(tmp_path / "e", [], made_by={})


def test_odd_texts_and_keys_are_written_as_they_can_be_read(tmp_path):
    source = tmp_path / "source"
    picture(source / "a.jpg")
    rows = [("v1.2/b", "caf\ud800"), ("caf\udce9", "x"), ("a\nb", "y")]
    items = [Item(key, str(source / "a.jpg"), text, {"of": text}) for key, text in rows]
    write_items(tmp_path / "s", items, made_by={})
    found = samples(tmp_path / "s")
    assert {key: s["caption"] for key, s in found.items()} == {"v1_2_b": "caf?", "caf_": "x", "a_b": "y"}
    assert json_of(tmp_path / "s")["v1_2_b"]["of"] == "caf?"
    with pytest.raises(UserError, match="The source has 1 key more than once, the first is 'v1_2'"):
        write_items(tmp_path / "t", [Item("v1.2", "x"), Item("v1_2", "x")], made_by={})


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
    told = run("coco", coco, "--out", tmp_path / "out", "--splits", "val", fails=True)
    assert "does not contain COCO captions" in told


def test_openimages_tables_in_other_encodings(tmp_path):
    (tmp_path / "n.jsonl").write_bytes('{"image_id": "a", "annotator_id": 1, "caption": "caf\xe9"}\n'.encode("latin-1"))
    told = run("openimages", "--images", tmp_path, "--narratives", tmp_path / "n.jsonl", "--out", tmp_path, fails=True)
    assert "line 1: not a localized narrative" in told


def test_a_negative_seed_is_one_line():
    result = CliRunner().invoke(importlib.import_module("scenes").main, ["--seed", "-1"])
    assert result.exit_code == 2
    assert "-1 is not in the range x>=0" in result.output


def test_img2dataset_where_nothing_can_be_written(tmp_path, monkeypatch):
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "jpg": b"x"}])
    monkeypatch.setattr("tempfile.NamedTemporaryFile", failing(PermissionError(13, "Permission denied")))
    assert "manifest.json cannot be written there (Permission denied)" in run("img2dataset", tmp_path, fails=True)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("img2dataset.describe_shard", failing(AssertionError("read although it cannot be written")))
    assert "manifest.json cannot be written there" in run("img2dataset", tmp_path, fails=True)


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def test_a_resize_that_no_jpeg_can_hold_is_left_out(tmp_path):
    Image.new("1", (140_000, 40)).save(tmp_path / "long.png")
    picture(tmp_path / "good.jpg")
    items = [Item("long", str(tmp_path / "long.png"), "x"), Item("good", str(tmp_path / "good.jpg"), "x")]
    manifest = write_items(tmp_path / "s", items, made_by={}, options=WriterOptions(resize=20))
    assert manifest["skipped"] == {"longer than 65,500 pixels after --resize": 1}
    assert list(samples(tmp_path / "s")) == ["good"]


SCRIPTS = sorted(p.stem for p in DATA.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_shows_an_example(script):
    result = CliRunner().invoke(importlib.import_module(script).main, ["--help"])
    assert result.exit_code == 0
    assert f"python data/{script}.py" in result.output
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
    assert result.exit_code == 1
    assert "captions_train2017.json is missing" in result.output


def test_the_wheel_contains_every_script():
    with open(DATA.parent / "pyproject.toml", "rb") as file:
        included = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for path in (*DATA.glob("*.py"), *DATA.glob("*.csv")):
        assert included[f"data/{path.name}"] == f"nxtp/prepare/scripts/{path.name}"
