"""Samples damaged in every way: training ends with exactly the undamaged ones seen, the others counted."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY_OVERRIDES, call_nxtp, jpeg, serving

from nxtp.data.shards.manifest import write_manifest
from nxtp.prepare.writer import write_shard

pytestmark = pytest.mark.costly

GOOD = 8  # sound samples in each of the damaged shards
WATCH = """
import json, os
import lightning as L

class Watch(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open("seen.jsonl", "a") as file:
            file.write(json.dumps(batch.keys) + "\\n")
        if batch_idx == 3 and os.path.exists("train/vanish.tar"):
            os.remove("train/vanish.tar")
"""


def content(key: str, number: int = 0) -> dict[str, bytes]:
    """A sound sample, its image's checksum beside it."""
    image = jpeg((40, 160, 60), seed=number)
    return {"jpg": image, "txt": b"a leaf and a stone", "json": json.dumps({"crc32": zlib.crc32(image)}).encode()}


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes | int]]]) -> None:
    """Any members under any names; a number stands for so many zero bytes, which take no room on the disk."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = data if isinstance(data, int) else len(data)
                file.write(info.tobuf(tarfile.GNU_FORMAT))
                if isinstance(data, int):
                    file.seek(data, os.SEEK_CUR)
                else:
                    file.write(data)
                file.seek(-(-info.size // 512) * 512 - info.size, os.SEEK_CUR)
        file.write(bytes(1024))


def bomb() -> bytes:
    """A PNG of 40,000 × 40,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def flipped(members: dict[str, bytes], number: int) -> dict[str, bytes]:
    image = bytearray(members["jpg"])
    at = int(np.random.default_rng(number).integers(8 * len(image)))
    image[at // 8] ^= 1 << at % 8
    return members | {"jpg": bytes(image)}


@pytest.fixture(params=[24, pytest.param(104, marks=pytest.mark.slow)])  # the second one is a drill
def damaged(tmp_path, request):
    """(directory of local shards, directory of remote ones, keys of the undamaged samples, expected counts)"""
    number = request.param  # of samples in each way: a whole number of batches
    local, remote = tmp_path / "train", tmp_path / "remote"
    sound: set[str] = set()
    image = jpeg((40, 160, 60))

    def good(kind: str) -> list[tuple[str, dict[str, bytes]]]:
        keys = [f"good-{kind}-{n}" for n in range(GOOD)]
        sound.update(keys)
        return [(key, content(key, n)) for n, key in enumerate(keys)]

    changes = {
        "no_image_bytes": lambda m, n: m | {"jpg": b""},
        "flip": flipped,
        "not_an_image": lambda m, n: {"jpg": b"%PDF-1.7 this is no JPEG", "txt": m["txt"]},
        "no_caption": lambda m, n: {"jpg": image},
        "long_caption": lambda m, n: {"jpg": image, "txt": 10_000_000},
        "bomb": lambda m, n: {"png": bomb(), "txt": m["txt"]},
    }
    for kind, change in changes.items():
        bad = [(f"{kind}-{n}", change(content("", n), n)) for n in range(number)]
        write_tar(local / f"{kind}.tar", good(kind) + bad)
    unknown = [(f"tiff-{n}", {"tiff": image, "txt": b"a leaf"}) for n in range(number)]
    write_tar(local / "extension.tar", good("extension") + unknown)
    twice = [(f"twice-{n % number}", content("", n)) for n in range(2 * number)]
    sound.update(f"twice-{n}" for n in range(number))
    write_tar(local / "twice.tar", twice)
    (local / "zero.tar").touch()

    # odd, but sound
    odd = [(f"../../odd-{n}", content("", n)) for n in range(GOOD)] + [
        (f"/etc/odd-{n}", content("")) for n in range(GOOD)
    ]
    latin = [(f"latin-{n}", content("") | {"txt": "une feuille, a leaf, café".encode("latin-1")}) for n in range(GOOD)]
    sound.update(key for key, _ in odd + latin)
    write_tar(local / "odd.tar", odd + latin)

    cut = good("cut")
    write_tar(local / "cut.tar", cut + [(f"cut-{n}", content("", n)) for n in range(number)])
    with tarfile.open(local / "cut.tar") as tar:
        os.truncate(local / "cut.tar", tar.getmembers()[3 * GOOD].offset_data + 100)

    write_tar(local / "vanish.tar", [(f"vanish-{n}", content("", n)) for n in range(number)])
    remote.mkdir()
    rows = [write_shard(remote / "stall.tar", ({"__key__": f"s{n}", "jpg": image} for n in range(number)))]
    write_manifest(remote, rows, made_by={})
    counts = {
        "bad image": 2 * number,
        "damaged image": 2 * number,  # other bytes than their checksum says
        "no caption": number,
        "oversized caption": number,
        "shard vanished": number,
        "stalled shard": number,
        "no image": number,
        "duplicate key": number,
        "empty shard": 1,
        "truncated shard": 1,
    }
    return local, remote, sound, counts


def test_training_sees_exactly_the_undamaged_samples(tmp_path, damaged, record_property):
    _, remote, sound, counts = damaged
    record_property("damaged samples and shards, each counted", sum(counts.values()))
    (tmp_path / "watch.py").write_text(WATCH)
    with serving(remote, stall=("stall.tar",)) as (url, _):
        done = call_nxtp(
            *("train", "name=r", *TINY_OVERRIDES, "export=last", "seed=4"),
            f"data.train=[train, {url}/stall.tar]",
            *(
                "data.cache_dir=cache",
                "data.read_timeout=0.5",
                "data.retries=1",
                "data.max_skip_fraction=1",
                "data.shuffle_window=0",
            ),
            *("data.batch_size=8", "data.num_workers=0", "trainer.max_epochs=1"),
            "+callbacks.watch._target_=watch.Watch",
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    seen = Counter(key for line in (tmp_path / "seen.jsonl").read_text().splitlines() for key in json.loads(line))
    assert set(seen) == sound
    assert set(seen.values()) == {1}
    assert record["samples_skipped"] == counts
    assert record["samples_seen"] == len(sound)
    assert record["status"] == "finished"
    assert not list(tmp_path.parent.glob("odd-*")), "names are only keys"


def test_a_bounded_share_only(tmp_path):
    bad = [(f"bad-{n}", {"jpg": b"nothing", "txt": b"a leaf"}) for n in range(30)]
    write_tar(tmp_path / "train" / "a.tar", [(f"good-{n}", content("", n)) for n in range(170)] + bad)
    command = ["train", *TINY_OVERRIDES, "data.train=train", "trainer.max_epochs=1"]
    command += ["data.batch_size=20", "data.num_workers=0", "export=last"]
    refused = call_nxtp(*command, "name=a", cwd=tmp_path)
    assert refused.returncode == 1
    assert "more than data.max_skip_fraction = 0.1" in refused.stderr.splitlines()[-1]
    allowed = call_nxtp(*command, "name=b", "data.max_skip_fraction=0.5", cwd=tmp_path)
    assert allowed.returncode == 0, allowed.stderr[-2000:]
    assert "bad image × 30" in allowed.stderr
    assert io.StringIO(allowed.stderr).read().count("Traceback") == 0
