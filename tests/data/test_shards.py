"""Shards: what is written is read back, WebDataset reads the same, and every kind of damage is counted."""

import gc
import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset as wds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sites import serving, until

from nxtp.data.shards import tar_index
from nxtp.data.shards.cache import RemoteCache, RemoteError
from nxtp.data.shards.manifest import ShardInfo, manifest_hash, read_manifest, sha256_of, write_manifest
from nxtp.data.shards.reader import MAX_CAPTION_BYTES, IndexedShards, SampleError
from nxtp.data.shards.tar_index import IndexStore, LocalFile, index_shard
from nxtp.data.shards.urls import expand_shards
from nxtp.errors import UserError
from nxtp.prepare.writer import write_shard

SAMPLES = [
    {
        "__key__": f"{i:06d}",
        "jpg": bytes([i]) * (100 + 700 * i),
        "txt": f"a dog {i}",
        "json": {"labels": ["dog"], "id": i},
    }
    for i in range(10)
]


def tar(path: Path, members, format=tarfile.USTAR_FORMAT) -> str:
    """A tar of (name, bytes), without any of write_shard's checks."""
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def keys(path) -> list[str]:
    return index_shard(path).keys


def headers(path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as file:
        return file.getmembers()


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "a-000.tar"
    write_shard(path, SAMPLES)
    return path


# --- writing ---------------------------------------------------------------------------------------------------


def test_written_samples_are_read_back(shard):
    shards = IndexedShards([str(shard)])
    assert len(shards) == len(SAMPLES)
    assert not shards.skipped
    for i in np.random.default_rng(0).permutation(len(SAMPLES)).tolist():
        raw = shards.read(i)
        assert (raw.key, raw.shard) == (SAMPLES[i]["__key__"], str(shard))
        assert (raw.image, raw.caption, raw.labels) == (SAMPLES[i]["jpg"], SAMPLES[i]["txt"], ["dog"])


def test_same_samples_give_same_bytes(tmp_path, shard):
    other_order = [dict(reversed(sample.items())) for sample in SAMPLES]
    for sample in other_order:
        sample["json"] = dict(reversed(sample["json"].items()))
    info = write_shard(tmp_path / "again.tar", other_order)
    assert (tmp_path / "again.tar").read_bytes() == shard.read_bytes()
    assert info == ShardInfo("again.tar", len(SAMPLES), shard.stat().st_size, sha256_of(shard))
    for member in headers(shard):
        assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
        assert (member.uname, member.gname) == ("", "")


def test_any_key_is_read_back(tmp_path):
    names = ["a" * 300, "d/" * 200 + "x", "épée/日本", "../up", "/root", "a b\n"]
    write_shard(tmp_path / "a.tar", [{"__key__": name, "png": name.encode()} for name in names])
    shards = IndexedShards([str(tmp_path / "a.tar")])
    assert [(shards.read(i).key, shards.read(i).image) for i in range(len(shards))] == [(n, n.encode()) for n in names]


def test_shard_appears_only_when_complete(tmp_path, shard):
    before = shard.read_bytes()

    def failing():
        yield SAMPLES[0]
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_shard(shard, failing())
    assert shard.read_bytes() == before
    assert os.listdir(tmp_path) == [shard.name]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([SAMPLES[0], SAMPLES[0]], "'000000' comes twice"),
        ([{"__key__": "a.b", "jpg": b"x"}], "would not be read back"),
        ([{"__key__": "__a__/b", "jpg": b"x"}], "would not be read back"),
        ([{"__key__": "a", "JPG": b"x"}], "would not be read back"),
        ([{"__key__": "a", "txt": "no image"}], "must have one image"),
        ([{"__key__": "a", "jpg": b"x", "png": b"x"}], "must have one image"),
        ([{"__key__": "a", "jpg": 1}], "must be bytes, not int"),
    ],
)
def test_samples_that_would_be_lost_are_refused(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "bad.tar", samples)
    assert os.listdir(tmp_path) == []


def test_manifest_round_trip(tmp_path, shard):
    assert read_manifest(tmp_path) is None
    assert manifest_hash(tmp_path) is None
    infos = [write_shard(tmp_path / f"b-{i}.tar", SAMPLES[: i + 1]) for i in range(3)]
    path = write_manifest(
        tmp_path, infos, made_by={"script": "x", "seed": 0}, nouns={"name": "hanta"}, skipped={"no caption": 2}
    )
    first = manifest_hash(tmp_path)
    manifest = read_manifest(tmp_path)
    assert [ShardInfo(**row) for row in manifest["shards"]] == infos
    assert manifest["samples"] == 6
    assert manifest["bytes"] == sum(os.path.getsize(tmp_path / f"b-{i}.tar") for i in range(3))
    assert (manifest["made_by"], manifest["skipped"]) == ({"script": "x", "seed": 0}, {"no caption": 2})
    assert first == sha256_of(path)
    write_manifest(
        tmp_path, infos[::-1], made_by={"seed": 0, "script": "x"}, nouns={"name": "hanta"}, skipped={"no caption": 2}
    )
    assert manifest_hash(tmp_path) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "cannot be read"),
        (lambda m: b"\xff\xfe\xff", "cannot be read"),
        (lambda m: [], "is not a manifest"),
        (lambda m: m | {"shards": {}}, "is not a manifest"),
        (lambda m: m | {"shards": [{"name": "a"}]}, "is not a manifest"),
        (lambda m: m | {"samples": 3}, "totals do not add up"),
        (lambda m: {k: v for k, v in m.items() if k != "made_by"}, "is not a manifest"),
        (lambda m: m | {"format": 99}, "has format 99; this version reads up to 1"),
    ],
)
def test_malformed_manifest_is_a_user_error(tmp_path, change, message):
    path = write_manifest(tmp_path, [ShardInfo("a.tar", 1, 2, "f" * 64)], made_by={})
    changed = change(read_manifest(tmp_path))
    path.write_bytes(
        changed if isinstance(changed, bytes) else b"{" if changed == "{" else json.dumps(changed).encode()
    )
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


# --- finding ---------------------------------------------------------------------------------------------------


def test_expand_shards(tmp_path, monkeypatch):
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "notes.txt", ".a-2.tar.x.tmp", "sub/c-0.tar", "[odd] {x}/d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a0, a1, b0 = (str(tmp_path / name) for name in ("a-0.tar", "a-1.tar", "b-0.tar"))
    assert expand_shards(str(tmp_path)) == [a0, a1, b0]
    assert expand_shards(tmp_path) == [a0, a1, b0]
    assert expand_shards(f"{tmp_path}/a-*.tar") == [a0, a1]
    assert expand_shards(f"{tmp_path}/*") == [a0, a1, b0], "as in a remote store"
    assert expand_shards(f"{tmp_path}/a-{{0..1}}.tar") == [a0, a1]
    assert expand_shards(f"{tmp_path}/{{b,a}}-*.tar") == [a0, a1, b0]
    assert expand_shards([b0, f"{tmp_path}/a-?.tar", a0]) == [a0, a1, b0]
    assert expand_shards(f"file:{a0}") == [a0]
    assert expand_shards(str(tmp_path / "[odd] {x}")) == [str(tmp_path / "[odd] {x}" / "d.tar")]
    assert expand_shards("https://host/x-{00..01}.tar?a=*") == [f"https://host/x-0{i}.tar?a=*" for i in (0, 1)]
    assert expand_shards("pipe:cat x-{0,1}.tar") == ["pipe:cat x-0.tar", "pipe:cat x-1.tar"]
    monkeypatch.chdir(tmp_path)
    assert expand_shards("a-*.tar") == ["a-0.tar", "a-1.tar"]


def test_two_spellings_of_a_shard_are_one(tmp_path, shard):
    (tmp_path / "link").symlink_to(tmp_path)
    names = [str(shard), f"{tmp_path}/../{tmp_path.name}/{shard.name}", f"file:{shard}", str(tmp_path / "link")]
    assert len(expand_shards(names)) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none/here-*.tar", "no *.tar file found at 'none/here-*.tar'"),
        ("*", "no *.tar file found at '*'"),  # neither a file of another kind nor a directory is a shard
        (5, "give a directory, a glob, a URL, or a list of these, not 5."),
        (["a-0.tar", None], "not None."),
        ([""], "not ''."),
        ("missing.tar", "nothing found at 'missing.tar'"),
        ("a-{0..2}.tar", "nothing found at 'a-2.tar'"),
        ("a-{0..1.tar", "'a-{0..1.tar'"),
        (["a-0.tar", "gone"], "nothing found at 'gone'"),
        ("empty", "the directory empty contains no *.tar file. nxtp prepare folder makes shards"),
        ([], "list of shards is empty"),
    ],
)
def test_no_shards_names_what_was_asked(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "manifest.json").touch()
    for i in range(2 * (spec != "*")):
        (tmp_path / f"a-{i}.tar").touch()
    with pytest.raises(UserError) as error:
        expand_shards(spec)
    assert message in str(error.value)


# --- indexing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reading_equals_webdataset(tmp_path, format):
    deep = "d" * 90 + "/" + "e" * 90 + "/f"  # needs ustar's prefix, a GNU long name or a pax header
    first = tar(
        tmp_path / "a.tar",
        [
            ("__meta__", b"skipped"),
            ("x/0001.jpg", b"one"),
            ("x/0001.txt", b" a cat\n"),
            ("x/0002.JPEG", b"two"),
            ("x/0002.seg.png", b"another image"),
            ("x/0002.json", b'{"caption": "a dog", "labels": ["dog", "b"]}'),
            ("README", b"no extension"),
            ("../../x/0003.webp", b"three"),
            ("/etc/0004.png", b""),
            (f"{deep}.png", b"five" * 1000),
            (f"{deep}.txt", "épée".encode()),
            ("v1.0/img.jpg", b"six"),
        ],
        format,
    )
    second = tar(tmp_path / "b.tar", [("x/0001.jpg", b"seven"), ("x/0001.txt", b"a fly")], format)
    shards = IndexedShards([first, second])
    theirs = list(wds.WebDataset([first, second], shardshuffle=False, empty_check=False))
    assert len(shards) == len(theirs) == 7
    assert not shards.skipped
    for position, sample in enumerate(theirs):
        raw = shards.read(position)
        record = json.loads(sample.get("json", b"{}"))
        text = sample["txt"].decode().strip() if "txt" in sample else record.get("caption")
        image = next(sample[e] for e in ("jpg", "jpeg", "png", "webp") if e in sample)
        assert (raw.key, raw.shard) == (sample["__key__"], sample["__url__"])
        assert (raw.image, raw.caption, raw.labels) == (image, text, record.get("labels"))


def test_only_regular_files_count(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))
    shards = IndexedShards([str(path)])
    assert [shards.read(i).key for i in range(len(shards))] == ["a"]
    assert shards.skipped == {"link": 2}


def test_truncated_at_every_kind_of_place(tmp_path, shard):
    data, members = shard.read_bytes(), headers(shard)
    for i, member in enumerate(members[1:], start=1):
        sample, part = divmod(i, 3)
        for cut in (member.offset + 100, member.offset_data, member.offset_data + member.size - 1):
            if i == 3 and cut < member.offset_data:
                continue  # nothing tells yet that three members make a sample
            path = tmp_path / "cut.tar"
            path.write_bytes(data[:cut])
            index = index_shard(path)
            assert index.keys == [s["__key__"] for s in SAMPLES[:sample]], (sample, part, cut)
            lost = {"incomplete sample": 1} if part > 0 else {}
            assert index.skipped == Counter({"truncated shard": 1} | lost)


def test_truncated_between_samples_keeps_the_whole_ones(tmp_path, shard):
    members = headers(shard)
    path = tmp_path / "cut.tar"
    path.write_bytes(shard.read_bytes()[: members[12].offset])  # four samples, no end of archive
    assert keys(path) == [s["__key__"] for s in SAMPLES[:4]]
    assert index_shard(path).skipped == Counter({"truncated shard": 1})
    path.write_bytes(shard.read_bytes()[: members[11].offset])  # the fourth has no text
    assert keys(path) == [s["__key__"] for s in SAMPLES[:3]]
    assert index_shard(path).skipped == Counter({"truncated shard": 1, "incomplete sample": 1})


@pytest.mark.parametrize("field", [0, 124, 148, 156])  # name, size, checksum, type
def test_flipped_bit_in_a_header(tmp_path, shard, field):
    data = bytearray(shard.read_bytes())
    data[headers(shard)[12].offset + field] ^= 4
    path = tmp_path / "flipped.tar"
    path.write_bytes(data)
    assert keys(path) == [s["__key__"] for s in SAMPLES[:4]]
    assert index_shard(path).skipped == Counter({"corrupt shard": 1})


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty shard"),
        (bytes(10240), "empty shard"),
        (b"too short", "corrupt shard"),
        (b"<html>not found</html>" * 100, "corrupt shard"),
        (np.random.default_rng(0).bytes(4096), "corrupt shard"),
        (gzip.compress(bytes(10240), mtime=0), "compressed shard"),
    ],
    ids=["empty", "zeros", "short", "html", "noise", "gzip"],
)
def test_files_without_samples(tmp_path, content, kind):
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    assert (len(index_shard(path)), index_shard(path).skipped) == (0, Counter({kind: 1}))


def test_missing_shard_and_directory(tmp_path):
    assert index_shard(tmp_path / "gone.tar").skipped == Counter({"shard vanished": 1})
    assert index_shard(tmp_path).skipped == Counter({"unreadable shard": 1})


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_random_damage_raises_nothing_but_sample_faults(tmp_path, format):
    members = [(f"{'k' * 150}{i}.{ext}", b'{"labels": []}') for i in range(4) for ext in ("jpg", "txt", "json")]
    sound = Path(tar(tmp_path / "sound.tar", members, format)).read_bytes()
    path = tmp_path / "damaged.tar"
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = np.frombuffer(sound, np.uint8).copy()
        where = rng.integers(len(data), size=rng.integers(1, 30))
        data[where] ^= rng.integers(1, 256, size=len(where), dtype=np.uint8)
        path.write_bytes(data[: rng.integers(len(data)) if rng.random() < 0.3 else None].tobytes())
        shards = IndexedShards([str(path)], store=IndexStore(path))  # a file: 300 indexes need not be stored
        assert len(shards) == 4 or shards.skipped
        for i in range(len(shards)):
            with suppress(SampleError):
                shards.read(i)


def test_hostile_sizes(tmp_path):
    """A size of 8 GiB and more, a negative one, a pax size beyond the file: damage, not memory."""
    for name, size in (("binary.tar", 1 << 40), ("octal.tar", 0o77777777777)):
        info = tarfile.TarInfo("a.jpg")
        info.size = size
        (tmp_path / name).write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        assert index_shard(tmp_path / name).skipped == Counter({"truncated shard": 1})
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "-5"}
    (tmp_path / "pax.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    assert index_shard(tmp_path / "pax.tar").skipped == Counter({"corrupt shard": 1})


def test_first_of_duplicate_keys_is_kept(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"first"),
            ("a.txt", b"one"),
            ("a.jpg", b"again"),
            ("b.jpg", b"other"),
            ("a.jpg", b"third"),
            ("a.txt", b"three"),
        ],
    )
    shards = IndexedShards([path])
    assert [shards.read(i).image for i in range(len(shards))] == [b"first", b"other"]
    assert shards.read(0).caption == "one"
    assert shards.skipped == Counter({"duplicate key": 2})


def test_samples_without_image_are_counted(tmp_path):
    path = tar(tmp_path / "a.tar", [("a.txt", b"x"), ("b.jpg", b"x"), ("c.v2.jpg", b"x"), ("d.bmp", b"x")])
    assert keys(path) == ["b"]
    assert index_shard(path).skipped == Counter({"no image": 3})


def test_names_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as file:
        for name in ("caf\xe9.jpg", "caf\xe8.jpg"):
            file.addfile(tarfile.TarInfo(name))
    assert keys(tmp_path / "a.tar") == ["caf\\xe9", "caf\\xe8"]


# --- every kind of tar member ------------------------------------------------------------------------------------


def block(kind: bytes, name: str, size: int = 0, more: bytes = b"") -> bytes:
    """A tar header as it stands on disk; ``more`` replaces its end, where formats differ."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    header[345 : 345 + len(more)] = more
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(header)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(kind: bytes, records: dict[str, str]) -> bytes:
    data = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(str(n)) + len(rest))
        data += str(length).encode() + rest
    return block(kind, "pax", len(data)) + padded(data)


def sparse(name: str, extensions: int) -> bytes:
    """An old GNU sparse member of 600 stored bytes, the rest holes; with blocks of further holes in between."""
    tail = bytes(41 + 96) + bytes([extensions > 0]) + b"%011o\0" % 5000  # struct: holes, is_extended, real size
    blocks = b"".join(bytes(504) + bytes([i + 1 < extensions]) + bytes(7) for i in range(extensions))
    return block(b"S", name, 600, tail) + blocks + padded(b"s" * 600)


def member(kind: str, number: int, size: int) -> bytes:
    """A member of any kind with a name of its own, as a tar contains it."""
    name, data = f"{number:03d}.jpg", bytes([65 + number % 26]) * size
    plain = block(b"0", name, size) + padded(data)
    if kind in "0\x007":
        return block(kind.encode(), name, size) + padded(data)
    if kind in "LK":
        return block(kind.encode(), "././@LongLink", 10) + padded(f"L{number:03d}.jpg\0\0".encode()) + plain
    if kind in "xX":
        return pax(kind.encode(), {"path": f"p{number:03d}.jpg/"}) + plain
    if kind == "x size":
        return pax(b"x", {"size": str(size)}) + block(b"0", name, 7) + padded(data)
    if kind == "xLx":
        return pax(b"x", {"path": f"p{number:03d}.jpg"}) + member("L", number, size)
    if kind == "Lx":
        return block(b"L", "L", 10) + padded(f"L{number:03d}.jpg\0\0".encode()) + member("x", number, size)
    if kind == "g":
        return pax(b"g", {"comment": "of a commit"}) + plain
    if kind == "S":
        return sparse(name, number % 3)
    if kind == "pax sparse":
        told = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": "900"}
        stored = padded(b"1\n0\n100\n") + b"s" * 100
        return pax(b"x", told) + block(b"0", f"GNUSparseFile.0/{name}", len(stored)) + padded(stored)
    if kind == "5":
        return block(b"5", f"d{number}.jpg/")
    if kind == "old directory":
        return block(b"\0", f"d{number}.jpg/", size)
    if kind in "12346":  # no data, whatever the size says
        return block(kind.encode(), name, size)
    return block(kind.encode(), name, size) + padded(data)  # unknown to tar: its data are skipped


KINDS = [*"0\x001234567LKxXgSNVMDAZ", "x size", "xLx", "Lx", "pax sparse", "old directory"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([0, 1, 511, 512, 513, 1300])), min_size=1))
@example([(kind, 1300) for kind in KINDS])
def test_every_kind_of_member_is_used_as_webdataset_uses_it_or_counted(chosen):
    """Random sequences of all types: our names are tarfile's, and what is not used is counted."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "a.tar")
        path.write_bytes(b"".join(member(kind, i, size) for i, (kind, size) in enumerate(chosen)) + bytes(1024))
        with tarfile.open(path) as file:
            every = [(info, info.isreg() and file.extractfile(info).read()) for info in file]
        index = index_shard(path)
        plain = {i.name.removesuffix(".jpg"): data for i, data in every if i.isreg() and not i.issparse()}
        assert index.keys == list(plain)
        lost = sum(not info.isdir() for info, _ in every) - len(plain)
        assert sum(index.skipped.values()) == (lost or index.skipped["empty shard"])
        shards = IndexedShards([str(path)], store=IndexStore(path))
        assert [shards.read(i).image for i in range(len(shards))] == list(plain.values())


def test_what_is_no_regular_file_is_counted_by_kind(tmp_path):
    (tmp_path / "a.tar").write_bytes(
        b"".join(member(kind, i, 0) for i, kind in enumerate(["1", "2", "3", "6", "S", "pax sparse", "V", "5", "0"]))
        + bytes(1024)
    )
    index = index_shard(tmp_path / "a.tar")
    assert index.keys == ["008"]
    assert index.skipped == {"link": 2, "special file": 2, "sparse file": 2, "unknown member": 1}


def test_names_of_global_headers_and_signed_checksums_are_tarfiles(tmp_path):
    header = bytearray(block(b"0", "\u00e9.jpg"))
    total = sum(header[:148]) + 8 * 32 + sum(header[156:]) - 256 * sum(b > 127 for b in header[:148])
    header[148:156] = b"%06o\0 " % total  # as old tars of Sun have it
    for content in (bytes(header), pax(b"g", {"path": "shared.jpg"}) + block(b"0", "own.jpg")):
        (tmp_path / "a.tar").write_bytes(content + bytes(1024))
        index = index_shard(tmp_path / "a.tar")
        assert ([f"{key}.jpg" for key in index.keys], index.skipped) == (
            [i.name for i in headers(tmp_path / "a.tar")],
            {},
        )


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (pax(b"x", {"path": "lost.jpg"}), "corrupt shard"),  # a header of nothing
        (pax(b"g", {"size": "5"}) + member("0", 1, 9), "corrupt shard"),
        (block(b"x", "pax", 20) + padded(b"no record at all\n"), "corrupt shard"),
        (member("0", 1, 9) + bytes(1024) + member("0", 2, 9), "data behind the end"),
        (sparse("a.jpg", 2)[:1024], "truncated shard"),
    ],
    ids=["header of nothing", "size of all members", "damaged header", "two archives in one", "sparse map cut off"],
)
def test_what_a_reader_would_lose_is_counted(tmp_path, content, kind):
    (tmp_path / "a.tar").write_bytes(content + bytes(1024 if kind != "truncated shard" else 0))
    assert index_shard(tmp_path / "a.tar").skipped == {kind: 1}


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "caption", "labels"),
    [
        ({"txt": "une épée".encode()}, "une épée", None),
        ({"txt": "une épée".encode("latin-1")}, "une épée", None),
        ({"txt": b"\xef\xbb\xbfa dog\r\n"}, "a dog", None),
        ({"txt": b" \n"}, None, None),
        ({"txt": b"from txt", "json": b'{"caption": "from json"}'}, "from txt", None),
        ({"txt": b"", "json": b'{"caption": "from json"}'}, "from json", None),
        ({"json": b'{"caption": null, "labels": null, "width": 5}'}, None, None),
        ({"json": b'{"labels": []}'}, None, []),
        ({"json": b'{"labels": ["hot dog", "\\ud800"]}'}, None, ["hot dog", "?"]),
        ({}, None, None),
    ],
)
def test_texts(tmp_path, members, caption, labels):
    path = tar(tmp_path / "a.tar", [("a.jpg", b"x")] + [(f"a.{ext}", data) for ext, data in members.items()])
    raw = IndexedShards([path]).read(0)
    assert (raw.caption, raw.labels) == (caption, labels)


@pytest.mark.parametrize(
    ("extension", "data", "kind"),
    [
        ("json", b"{", "corrupt json"),
        ("json", b"\xff\xff", "corrupt json"),
        ("json", b"[" * 100_000, "corrupt json"),
        ("json", b'["dog"]', "corrupt json"),
        ("json", b'{"labels": "dog, cat"}', "bad labels"),
        ("json", b'{"labels": ["dog", 3]}', "bad labels"),
        ("txt", b"a" * (MAX_CAPTION_BYTES + 1), "oversized caption"),
    ],
)
def test_bad_member_is_a_sample_fault(tmp_path, extension, data, kind):
    path = tar(tmp_path / "a.tar", [("a.jpg", b"x"), (f"a.{extension}", data), ("b.jpg", b"y")])
    shards = IndexedShards([path])
    with pytest.raises(SampleError) as error:
        shards.read(0)
    assert (error.value.kind, error.value.key, error.value.shard) == (kind, "a", path)
    assert shards.read(1).image == b"y"


@pytest.mark.parametrize(("between", "reads"), [(0, 1), (7_000, 1), (90_000, 3)])
def test_members_that_are_neighbours_are_read_at_once(tmp_path, monkeypatch, between, reads):
    members = [(f"{key}.{name}", bytes(between)) for key in "ab" for name in ("json", "npy", "txt", "npz", "jpg")]
    content = {"json": b'{"labels": ["dog"]}', "txt": b"a dog", "jpg": b"pixels"}
    members = [(name, content.get(name[2:], data)) for name, data in members]
    shards = IndexedShards([tar(tmp_path / "a.tar", members)])
    shards.read(0)
    pread, calls = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *place: calls.append(place) or pread(*place))
    raw = shards.read(1)
    assert (raw.key, raw.image, raw.caption, raw.labels) == ("b", b"pixels", "a dog", ["dog"])
    assert len(calls) == reads
    assert sum(size for _, size, _ in calls) < 20_000 + 10_000


def test_sample_fault_is_pickled():
    fault = pickle.loads(pickle.dumps(SampleError("corrupt json", "000001", "a.tar")))
    assert (fault.kind, fault.key, fault.shard) == ("corrupt json", "000001", "a.tar")
    assert str(fault) == "corrupt json: 000001 in a.tar"


def test_shards_that_change_under_the_reader(tmp_path):
    paths = [tmp_path / f"{name}.tar" for name in ("cut", "gone", "other")]
    for path in paths:
        write_shard(path, SAMPLES)
    shards = IndexedShards([str(path) for path in paths])
    last = len(SAMPLES) - 1
    assert shards.read(last).image == SAMPLES[last]["jpg"]  # opens the first shard
    os.truncate(paths[0], headers(paths[0])[-3].offset_data + 5)
    paths[1].unlink()
    write_shard(paths[2], SAMPLES[:1])
    kinds = []
    for position in (last, len(SAMPLES), 2 * len(SAMPLES)):
        with pytest.raises(SampleError) as error:
            shards.read(position)
        kinds.append(error.value.kind)
    assert kinds == ["truncated member", "shard vanished", "shard changed"]


def test_other_content_under_the_same_headers_is_noticed_by_its_time(shard):
    shards, status = IndexedShards([str(shard)]), shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"a dog 1", b"a cat 1"))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(SampleError, match="shard changed"):
        shards.read(1)


def test_one_line_of_samples_over_many_shards(tmp_path):
    sizes = [3, 0, 5, 1, 0]
    for i, size in enumerate(sizes):
        write_shard(tmp_path / f"{i}.tar", SAMPLES[:size])
    (tmp_path / "5.tar").write_bytes(b"no tar at all")
    shards = IndexedShards(expand_shards(tmp_path))
    assert shards.sizes.tolist() == [*sizes, 0]
    assert shards.skipped == Counter({"empty shard": 2, "corrupt shard": 1})
    read = [shards.read(i) for i in range(len(shards))]
    assert [Path(raw.shard).stem for raw in read] == list("000222223")
    assert [raw.key for raw in read] == [s["__key__"] for n in sizes for s in SAMPLES[:n]]
    assert [shards.shard_of(i) for i in range(len(shards))] == [raw.shard for raw in read]
    for position in (-1, len(shards)):
        with pytest.raises(IndexError):
            shards.read(position)


def test_a_spread_is_over_a_bounded_number_of_shards(tmp_path):
    for i in range(50):
        write_shard(tmp_path / f"{i:02d}.tar", SAMPLES[: 10 * (i % 5 > 0)])
    shards = IndexedShards(expand_shards(tmp_path))
    for most in (1, 31, 100, 199):
        spread = shards.spread(most)
        assert len(set(spread)) == len(spread) == most
        assert len({shards.shard_of(position) for position in spread}) <= max(32, most // 5 + 1)
    assert [shards.shard_of(p)[-6:-4] for p in (spread[0], spread[-1])] == ["01", "49"]
    assert shards.spread(400) == shards.spread(1000) == list(range(400))


def read_all(shards: IndexedShards) -> list[bytes]:
    return [shards.read(i).image for i in range(len(shards))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(shard, method):
    shards = IndexedShards([str(shard)])
    expected = read_all(shards)  # opens the file here first
    assert read_all(pickle.loads(pickle.dumps(shards))) == expected
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        read = pool.map(IndexedShards.read, [shards] * len(shards), range(len(shards)), timeout=60)
        assert [raw.image for raw in read] == expected


def test_few_files_stay_open(tmp_path):
    for i in range(40):
        write_shard(tmp_path / f"{i:02d}.tar", SAMPLES[:1])
    shards = IndexedShards(expand_shards(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert read_all(shards) == [SAMPLES[0]["jpg"]] * 40
    assert before == 0 or len(os.listdir("/proc/self/fd")) - before <= 16


# --- kept indexes ----------------------------------------------------------------------------------------------


def test_an_index_is_kept_until_the_shard_changes(tmp_path, shard, monkeypatch):
    store, calls = IndexStore(tmp_path / "index"), []
    monkeypatch.setattr("nxtp.data.shards.counts.index_shard", lambda path: calls.append(path) or index_shard(path))
    for _ in range(3):
        shards = IndexedShards([str(shard)], store=store)
        assert [shards.read(i).key for i in range(len(shards))] == [s["__key__"] for s in SAMPLES]
    assert len(calls) == 1
    write_shard(shard, SAMPLES[:4])
    assert len(IndexedShards([str(shard)], store=store)) == 4
    assert len(calls) == 2
    shard.unlink()
    gone = IndexedShards([str(shard)], store=store)
    assert (len(gone), gone.skipped) == (0, Counter({"shard vanished": 1}))


def test_a_replacement_of_the_same_size_and_time_is_not_read_at_old_offsets(tmp_path, shard):
    store, status = IndexStore(tmp_path / "index"), shard.stat()
    IndexedShards([str(shard)], store=store)
    others = [{**s, "__key__": f"b{i:05d}"} for i, s in enumerate(reversed(SAMPLES))]
    write_shard(shard, others)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shard.stat().st_size == status.st_size
    stale = IndexedShards([str(shard)], store=store)
    for position in range(len(stale)):
        with pytest.raises(SampleError, match="shard changed"):
            stale.read(position)
    again = IndexedShards([str(shard)], store=store)
    assert read_all(again) == [s["jpg"] for s in others], "indexed anew at the next start"


@pytest.mark.parametrize("size", ["the same", "another"])
def test_a_fetched_replacement_is_not_read_at_old_offsets(tmp_path, site, size):
    root, url, _ = site
    store, urls = IndexStore(tmp_path / "index"), [f"{url}/r-0.tar"]
    read_all(IndexedShards(urls, RemoteCache(tmp_path / "cache"), store))
    others = [{**s, "__key__": f"b{i:06d}"} for i, s in enumerate(reversed(SAMPLES))]
    others = others if size == "the same" else others[:7]
    write_shard(root / "r-0.tar", others)
    with pytest.raises(SampleError, match="shard changed"):
        IndexedShards(urls, RemoteCache(tmp_path / "other"), store).read(0)
    again = IndexedShards(urls, RemoteCache(tmp_path / "other"), store)
    assert [again.read(i).image for i in range(len(others))] == [s["jpg"] for s in others]


def test_faults_and_odd_keys_are_kept_too(tmp_path):
    path = tar(
        tmp_path / "a.tar", [("b\udcff.jpg".encode("utf-8", "surrogateescape").decode("latin-1"), b"x"), ("é.txt", b"")]
    )
    store = IndexStore(tmp_path / "index")
    first, second = IndexedShards([path], store=store), IndexedShards([path], store=store)
    assert first.skipped == second.skipped == Counter({"no image": 1})
    assert first.read(0) == second.read(0)


def test_without_a_place_for_indexes_nothing_is_lost_and_nothing_kept_in_memory(tmp_path, shard, caplog):
    (tmp_path / "file").write_text("no directory")
    shutil.copy(shard, tmp_path / "b.tar")
    shards = IndexedShards(expand_shards(tmp_path), store=IndexStore(tmp_path / "file" / "index"))
    content = pickle.dumps(shards)
    assert SAMPLES[3]["__key__"].encode() not in content
    assert read_all(pickle.loads(content)) == [s["jpg"] for s in SAMPLES] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"Indexes of shards cannot be stored in {tmp_path / 'file' / 'index'} (Not a directory): each process will "
        "read the headers of every shard again. Set data.index_dir."
    ]


@pytest.mark.parametrize(
    ("before", "now", "indexed"),
    [
        ("a.jpg b.jpg", "a.jpg b.jpg", 1),
        ("a.jpg b.jpg", "a.jpg c.jpg", 2),
        ("a.jpg b.jpg", "a.jpg b.jpg c.jpg", 2),
        ("a.jpg b.txt c.jpg", "a.jpg b.jpg c.jpg", 2),
    ],
)
def test_a_copy_of_a_shard_with_another_time_keeps_its_index(tmp_path, monkeypatch, before, now, indexed):
    path, store, calls = tmp_path / "a.tar", IndexStore(tmp_path / "index"), []
    made = tar_index._Samples  # of each shard that is indexed
    monkeypatch.setattr(tar_index, "_Samples", lambda: calls.append(1) or made())
    for time, names in enumerate((before, now, now)):
        tar(path, [(name, b"x") for name in names.split()])
        os.utime(path, ns=(time, min(time, 1)))
        shards = IndexedShards([str(path)], store=store)
        assert [shards.read(i).key + ".jpg" for i in range(len(shards))] == [n for n in names.split() if "jpg" in n]
    assert len(calls) == indexed


def test_indexes_are_bounded_on_disk(tmp_path):
    for i in range(8):
        write_shard(tmp_path / f"{i}.tar", SAMPLES)
    urls, directory = expand_shards(tmp_path), tmp_path / "index"
    IndexedShards(urls[:7], store=IndexStore(directory))
    kept = list(directory.glob("*.safetensors"))
    size = kept[0].stat().st_size
    torn, new = (directory / f".{'0' * 32}.safetensors.{name}.tmp" for name in ("torn", "new"))
    for other in (torn, new, directory / "model.safetensors"):
        other.write_bytes(bytes(size * 9))
    for path in (*kept, torn, directory / "model.safetensors"):
        os.utime(path, (1, 1))
    IndexedShards(urls[:7], store=IndexStore(directory)).read(33)
    store = IndexStore(directory, 3.5 * size)
    IndexedShards(urls[7:], store=store)
    found = [store.head(url, None) is not None for url in urls]
    assert (sum(found), found[3], found[7]) == (3, True, True), "the one that was read, and the new one"
    others = {torn, new, directory / "model.safetensors"}
    assert {path for path in directory.iterdir() if path in others} == others - {torn}
    assert read_all(IndexedShards(urls, store=store)) == [s["jpg"] for s in SAMPLES] * 8


def test_a_damaged_index_is_made_again(tmp_path, shard):
    store = IndexStore(tmp_path / "index")
    IndexedShards([str(shard)], store=store)
    (kept,) = (tmp_path / "index").iterdir()
    for damage in (b"", b"nonsense" * 9, kept.read_bytes()[:-40]):
        kept.write_bytes(damage)
        assert len(read_all(IndexedShards([str(shard)], store=store))) == len(SAMPLES)


def test_images_are_checked_against_their_checksum(tmp_path):
    good, bad = b"pixels" * 99, b"pixelz" * 99
    record = {"crc32": zlib.crc32(good)}
    write_shard(tmp_path / "a.tar", [{"__key__": k, "jpg": d, "json": record} for k, d in (("a", good), ("b", bad))])
    shards = IndexedShards([str(tmp_path / "a.tar")])
    assert shards.read(0).image == good
    with pytest.raises(SampleError, match="damaged image"):
        shards.read(1)


# --- remote shards ---------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    root = tmp_path / "site"
    root.mkdir()
    infos = []
    for i in range(6):
        samples = [{**s, "__key__": f"{i}{s['__key__']}"} for s in SAMPLES]
        infos.append(write_shard(root / f"r-{i}.tar", samples))
    write_manifest(root, infos, made_by={})
    with serving(root) as (url, handler):
        yield root, url, handler


def test_remote_shards_are_fetched_when_they_are_read(tmp_path, site):
    root, url, handler = site
    urls = [f"{url}/r-{i}.tar" for i in range(6)]
    store = IndexStore(tmp_path / "index")
    shards = IndexedShards(urls, RemoteCache(tmp_path / "cache"), store)
    assert len(shards) == 60
    assert handler.asked == ["manifest.json"], "counted by the manifest"
    assert shards.read(25).key == "2000005"
    assert shards.read(26).image == SAMPLES[6]["jpg"]
    assert handler.asked == ["manifest.json", "r-2.tar"]
    (root / "manifest.json").unlink()
    assert len(IndexedShards(urls[2:3], RemoteCache(tmp_path / "cache"), store)) == 10
    assert [name for name in handler.asked if name.endswith(".tar")] == ["r-2.tar"], "the index is kept"


def stored(cache: Path) -> int:
    """Bytes of the whole shards in a cache, from which another thread may delete."""
    total = 0
    for path in cache.glob("*.tar"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_cache_is_bounded(tmp_path, site):
    root, url, handler = site
    size = (root / "r-0.tar").stat().st_size
    cache = RemoteCache(tmp_path / "cache", limit=int(2.5 * size))
    shards = IndexedShards([f"{url}/r-{i}.tar" for i in range(6)], cache, IndexStore(tmp_path / "index"))
    for turn in range(2):
        assert [shards.read(i).key[0] for i in range(0, 60, 5)] == [str(i // 10) for i in range(0, 60, 5)], turn
        until(lambda: stored(tmp_path / "cache") <= 2.5 * size)  # deleted behind a transfer's last byte
    ahead = shards.prefetch([0, 1])
    for i in (0, 1):
        ahead.reached(i)  # three quarters of this cache are one shard
        until(cache.path_of(f"{url}/r-{i}.tar").exists)
    again = IndexedShards([f"{url}/r-{i}.tar" for i in range(6)], cache, IndexStore(tmp_path / "index"))
    before = len(handler.asked)
    assert (again.read(0).key, again.read(10).key) == ("0000000", "1000000")
    assert len(handler.asked) == before, "prefetched, and kept as the most recently used"


class Emptied(RemoteCache):
    """A cache that another process trims between a fetch and the opening of its file, once a file."""

    def __init__(self, directory):
        super().__init__(directory)
        self.emptied = set()

    def fetch(self, url, *, background=False):
        super().fetch(url)
        if url not in self.emptied:
            self.emptied.add(url)
            self.path_of(url).unlink()


@pytest.mark.parametrize("counted", [True, False])
def test_a_file_that_others_trim_is_fetched_again(tmp_path, site, counted):
    root, url, _ = site
    if not counted:
        (root / "manifest.json").unlink()
    cache = Emptied(tmp_path / "cache")
    shards = IndexedShards([f"{url}/r-{i}.tar" for i in range(3)], cache, IndexStore(tmp_path / "index"))
    assert len(shards) == 30
    cache.emptied.clear()
    assert [shards.read(i).key[0] for i in range(0, 30, 10)] == ["0", "1", "2"]


def test_remote_faults_are_counted_once_tried(tmp_path, site):
    root, url, handler = site
    handler.stall = ("r-1.tar",)
    (root / "r-2.tar").unlink()
    write_shard(root / "r-3.tar", SAMPLES[:4])
    shards = IndexedShards(
        [f"{url}/r-{i}.tar" for i in range(4)],
        RemoteCache(tmp_path / "cache", read_timeout=0.5, retries=0),
        IndexStore(tmp_path / "index"),
    )
    kinds = Counter()
    for position in range(40):
        try:
            shards.read(position)
            kinds["read"] += 1
        except SampleError as fault:
            kinds[fault.kind] += 1
    assert kinds == {"read": 14, "stalled shard": 10, "unreachable shard": 10, "missing sample": 6}
    assert handler.asked.count("r-1.tar") == 1, "not tried again for every sample"


def test_remote_commands_are_fetched_once(tmp_path, shard):
    cache, store = RemoteCache(tmp_path / "cache", retries=0), IndexStore(tmp_path / "index")
    urls = [f"pipe:cat {shard}", "pipe:false"]
    shards = IndexedShards(urls, cache, store)
    assert len(shards) == len(SAMPLES)
    assert shards.read(3).shard == urls[0]
    assert shards.skipped == Counter({"unreachable shard": 1})
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    shard.unlink()
    assert len(IndexedShards(urls[:1], cache, store)) == len(SAMPLES)
    stalled = IndexedShards(
        [f"pipe:head -c 9 {tmp_path}/index/*; sleep 30"],
        RemoteCache(tmp_path / "c", read_timeout=0.3, retries=0),
        store,
    )
    assert stalled.skipped == Counter({"stalled shard": 1})


def test_no_command_is_run_that_was_not_given(tmp_path, shard):
    url = f"pipe:cat {shard}; echo http://host/x | tee -a {tmp_path}/ran >/dev/null; : /a"
    IndexedShards([url], RemoteCache(tmp_path / "cache"), IndexStore(tmp_path / "index"))
    assert (tmp_path / "ran").read_text().count("http") == 1


def test_remote_shards_need_a_cache_and_a_known_store(tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_dir, --cache-dir"):
        IndexedShards(["https://host/a.tar"])
    with pytest.raises(UserError, match=r"ftp9://host/manifest.json cannot be opened"):
        IndexedShards(["ftp9://host/a.tar"], RemoteCache(tmp_path))


def test_a_store_whose_driver_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://b/manifest\.json cannot be opened .*gcsfs.*: pip install 'nxtp\[gcs"):
        IndexedShards(["gs://b/a.tar"], RemoteCache(tmp_path))


def test_any_store_of_fsspec_can_be_read(tmp_path, shard):
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/a.tar", shard.read_bytes())
    shards = IndexedShards(["memory://bucket/a.tar"], RemoteCache(tmp_path / "cache"), IndexStore(tmp_path / "index"))
    assert read_all(shards) == [s["jpg"] for s in SAMPLES]
    gone = IndexedShards(["memory://bucket/b.tar"], RemoteCache(tmp_path / "cache"), IndexStore(tmp_path / "index"))
    assert gone.skipped == Counter({"unreachable shard": 1})


def test_forked_workers_fetch_after_their_parent_has(tmp_path, site):
    """A forked process does not have the thread in which its parent's transfers run."""
    _, url, _ = site
    shards = IndexedShards([f"{url}/r-{i}.tar" for i in range(2)], RemoteCache(tmp_path / "cache"))
    assert shards.read(0).key == "0000000"
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(IndexedShards.read, shards, 10).result(60).key == "1000000"


def test_a_truncated_transfer_is_not_kept(tmp_path, site):
    _, url, handler = site

    def truncated(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"x" * 100)

    handler.do_GET = truncated
    with pytest.raises(RemoteError, match="unreachable shard"):
        RemoteCache(tmp_path / "cache", read_timeout=1, retries=1).fetch(f"{url}/r-0.tar")
    assert list((tmp_path / "cache").glob("*.tar*")) == []


def test_a_shard_that_nothing_refers_to_is_closed_without_a_warning(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    file = LocalFile(tmp_path / "a.tar")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del file
        gc.collect()
    assert [warning for warning in told if "a.tar" in str(warning.message)] == []
