"""Opening a set: ranks agree or nothing starts; counts beside shards are believed, and checked when they are read."""

import json
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import fsspec
import numpy as np
import pyarrow
import pytest
from helpers import TINY_OVERRIDES, call_nxtp
from pyarrow import parquet
from small_shards import sample, write_shards
from torch.distributed import HashStore

from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.mixture import open_set
from nxtp.data.sampler import ElasticBatchSampler
from nxtp.data.shards import counts, remote
from nxtp.data.shards.cache import RemoteCache
from nxtp.data.shards.counts import count_shards, listed_counts
from nxtp.data.shards.manifest import ShardInfo, manifest_text, write_manifest
from nxtp.data.shards.remote import ForwardFile, Pace, RemoteError
from nxtp.data.shards.tar_index import IndexStore, ShardIndex, index_shard
from nxtp.data.transforms import ImageTransform
from nxtp.distributed import rendezvous
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError
from nxtp.model.tokenizer import train_tokenizer
from nxtp.prepare.writer import write_shard


@pytest.fixture
def bucket():
    """A remote store in memory."""
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/bucket", recursive=True) if store.exists("/bucket") else None


def on_ranks(world: int, work, running: bool = True) -> list:
    """``work`` of each of the ranks, or what it raised."""
    store = HashStore()

    def one(rank: int):
        try:
            return work(Ranks(store, rank, world, running=running, timeout=timedelta(seconds=20)))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


# --- ranks agree -----------------------------------------------------------------------------------------------


@pytest.fixture
def flaky(bucket, monkeypatch):
    """300 remote shards: how often the headers of each were read, and how probably that fails."""
    read: Counter = Counter()
    failing: Counter = Counter()  # "" is any
    lock, chance = threading.Lock(), random.Random(0)

    def read_index(url, cache):
        with lock:
            read[url] += 1
            if chance.random() < failing[url] + failing[""]:
                raise RemoteError("unreachable shard", "503")
        number = int(url[-7:-4])
        return ShardIndex([f"{number}-{i}" for i in range(20 + number % 7)], np.zeros((20 + number % 7, 7), np.int64))

    monkeypatch.setattr(counts, "read_index", read_index)
    return read, failing


SPEC = "memory://bucket/{000..299}.tar"


def test_64_ranks_of_8_workers_have_one_epoch_whatever_cannot_be_read(tmp_path, flaky):
    read, failing = flaky
    failing[""] = 0.03
    config = DataConfig(cache_dir=str(tmp_path), index_dir=str(tmp_path), allow_missing_shards=True)
    sets = on_ranks(64, lambda ranks: open_set("train", SPEC, config, ranks))
    assert len(read) == 300
    assert set(read.values()) == {1}, "the work is shared out"
    assert len({opened.fingerprint for opened in sets}) == 1
    shards = sets[0].shards
    assert 0 < shards.skipped["unreachable shard"] < 30

    def plan(opened, batch_size, rank=0, world=1):
        return ElasticBatchSampler(
            opened.shards.sizes, batch_size, shuffle=True, sources=opened.sources, rank=rank, world=world
        )

    steps = [run.tolist() for _, run in plan(sets[0], 64 * 4)]
    seen = [[None] * 64 for _ in steps]
    for rank, opened in enumerate(sets):
        batches = [run.tolist() for _, run in plan(opened, 4, rank, 64)]
        for worker in range(8):
            for step, batch in zip(range(worker, len(batches), 8), batches[worker::8], strict=True):
                seen[step][rank] = batch
    assert [[position for batch in step for position in batch] for step in seen] == steps
    together = [position for step in steps for position in step]
    assert len(set(together)) == len(together) > len(shards) - 64 * 4


def test_a_shard_that_cannot_be_had_ends_all_ranks_with_its_name(tmp_path, flaky, caplog):
    _, failing = flaky
    failing["memory://bucket/007.tar"] = 1
    config = DataConfig(cache_dir=str(tmp_path), index_dir=str(tmp_path))
    (error,) = set(on_ranks(8, lambda ranks: open_set("train", SPEC, config, ranks)))
    assert "memory://bucket/007.tar: unreachable shard: 503" in caplog.text, "and why"
    assert error.startswith(
        "data.train: 1 of 300 shards cannot be had (unreachable shard × 1): memory://bucket/007.tar. Restore them; "
        "data.allow_missing_shards=true"
    )
    failing.update({f"memory://bucket/{i:03d}.tar": 1 for i in range(40)})
    config = DataConfig(cache_dir=str(tmp_path), index_dir=str(tmp_path), allow_missing_shards=True)
    (error,) = set(on_ranks(8, lambda ranks: open_set("train", SPEC, config, ranks)))
    assert "40 of 300 shards cannot be had" in error, "more than data.max_skip_fraction"


@pytest.mark.parametrize("running", [True, False])
def test_an_error_of_one_rank_is_one_of_all(running):
    def work(items):
        if "c" in items:
            raise UserError("no c")
        return [item * 2 for item in items]

    letters = list("abcdefg")
    found = on_ranks(3, lambda ranks: ranks.share_out("x", letters, lambda own: [2 * item for item in own]), running)
    assert found == [["aa", "bb", "cc", "dd", "ee", "ff", "gg"]] * 3
    assert on_ranks(3, lambda ranks: ranks.share_out("x", letters, work), running) == ["no c"] * 3


@pytest.mark.parametrize("bad", [0, 1])
def test_what_fails_on_one_rank_is_said_on_all(bad):
    def work(items):
        if items[0] == bad:
            raise UserError(f"no {bad}")
        return items

    assert on_ranks(2, lambda ranks: ranks.share_out("x", [0, 1, 2], work)) == [f"no {bad}"] * 2


def test_a_rank_that_dies_while_it_counts_ends_the_others(monkeypatch):
    """Only the death of the first rank closes the store: the others were waited for for two days."""
    monkeypatch.setattr(rendezvous, "_SILENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(rendezvous, "_BEAT", timedelta(seconds=0.02))
    slow = threading.Event()

    def work(ranks):
        if ranks.rank == 2:
            slow.wait(20)  # it works for longer than one may be silent
            return "dead"
        if ranks.rank == 1:
            return ranks.share_out("x", [1, 2, 3], lambda own: [slow.wait(0.5)])
        try:
            return ranks.share_out("x", [1, 2, 3], list)
        finally:
            slow.set()

    assert on_ranks(3, work) == [error := "Rank 2 has ended, or stands still: see its output.", error, "dead"]


def test_a_rank_that_does_not_come_is_not_waited_for_in_vain():
    with pytest.raises(RuntimeError, match="timeout"):
        Ranks(HashStore(), 0, 2, timeout=timedelta(seconds=0.05))


def test_a_run_is_not_resumed_over_another_set(tmp_path):
    write_shards(tmp_path / "train", [8, 8, 8], labels=True)
    command = ["train", "name=a", "data.train=train", *TINY_OVERRIDES, "data.batch_size=4", "data.num_workers=0"]
    assert call_nxtp(*command, "trainer.max_steps=2", cwd=tmp_path).returncode == 0
    config = DataConfig()
    before = open_set("train", str(tmp_path / "train"), config).plan
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert open_set("train", str(tmp_path / "elsewhere"), config).plan == before, "the same in another place"
    (tmp_path / "elsewhere").rename(tmp_path / "train")
    (tmp_path / "train" / "part-00002.tar").unlink()
    (tmp_path / "train" / "manifest.json").unlink()
    longer = [*command, "trainer.max_steps=3", "resume=runs/a/checkpoints/last.ckpt"]
    done = call_nxtp(*longer, cwd=tmp_path)
    assert done.returncode == 1
    assert "data.train was 3 shards of 24 samples (" in done.stderr.splitlines()[-1]
    assert "and is 2 shards of 16 samples (" in done.stderr.splitlines()[-1]
    assert call_nxtp(*longer, "data.allow_changed_shards=true", cwd=tmp_path).returncode == 0


def test_a_validation_set_has_another_name_than_the_training_set(tmp_path):
    """Before, it was validated on the training set, and its loss was logged over that of training."""
    write_shards(tmp_path / "a", [4])
    done = call_nxtp("train", "name=a", "data.train=a", "+data.val.train=b", *TINY_OVERRIDES, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        "error: data.val.train: 'train' is the training set: give the validation set another name.\n",
    )
    done = call_nxtp("train", "name=a", "data.train=b", "data.val=null", *TINY_OVERRIDES, cwd=tmp_path)
    assert "nothing found at 'b'" in done.stderr, "no validation sets is no error"


def test_an_unfinished_copy_is_not_taken_for_the_set(tmp_path, bucket, monkeypatch):
    """Its manifest lists all shards: before, a mixture trained on those that had come, without a word."""
    write_shards(tmp_path / "a", [4, 4, 4])
    (tmp_path / "a" / "part-00001.tar").unlink()
    for path in (tmp_path / "a").iterdir():
        bucket.pipe_file(f"/bucket/a/{path.name}", path.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (f"{tmp_path}/a/", "~/a", f"file://{tmp_path}/a", "memory://bucket/a"):
        config = DataConfig(cache_dir=str(tmp_path / "cache"))
        errors = on_ranks(2, lambda ranks, place=place, config=config: open_set("train", {"x": place}, config, ranks))
        assert errors == [errors[0]] * 2
        assert f"the manifest of {place} lists 1 shard that it does not contain: part-00001.tar." in errors[0]
        assert len(open_set("train", f"{place.rstrip('/')}/*.tar", config)) == 8
        config.allow_missing_shards = True
        assert len(open_set("train", place, config)) == 8
    write_shards(tmp_path / "whole", [4])
    (tmp_path / "whole" / "link.tar").symlink_to(tmp_path / "a" / "part-00002.tar")
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    for place in (tmp_path / "a", "memory://bucket/a"):  # one of several directories, or a path
        with pytest.raises(UserError, match=f"the manifest of {place} lists 1 shard .* part-00001.tar"):
            open_set("train", [str(tmp_path / "whole"), place], config)
    write_shards(tmp_path / "b", [4])
    (tmp_path / "link.tar").symlink_to(tmp_path / "b" / "part-00000.tar")
    assert len(open_set("train", [tmp_path / "link.tar", tmp_path / "b"], config)) == 4, "under another name"


def test_shards_of_one_name_in_several_directories_are_told_apart(tmp_path):
    """Their order is that of the directories' names: one that is renamed changes every position behind it."""
    for name in ("set/x1", "set/x2"):
        write_shards(tmp_path / name, [4])
    before = open_set("train", f"{tmp_path}/set/*/*.tar", DataConfig()).plan
    (tmp_path / "set").rename(tmp_path / "moved")
    assert open_set("train", f"{tmp_path}/moved/*/*.tar", DataConfig()).plan == before
    (tmp_path / "moved" / "x1").rename(tmp_path / "moved" / "x3")
    assert open_set("train", f"{tmp_path}/moved/*/*.tar", DataConfig()).plan != before


# --- counts beside shards --------------------------------------------------------------------------------------


def img2dataset(number: int) -> bytes:
    return json.dumps({"count": 9, "successes": number, "status_dict": {"success": number, "404": 9 - number}}).encode()


def table(number: int) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"status": ["success"] * number + ["failed_to_download"]}), sink)
    return sink.getvalue().to_pybytes()


SIZES = [2, 3, 4]
LISTS = {
    "manifest.json": lambda: manifest_text(
        [ShardInfo(f"{i}.tar", n, 10240, "") for i, n in enumerate(SIZES)], made_by={}
    ),
    "sizes.json": lambda: json.dumps({f"{i}.tar": n for i, n in enumerate(SIZES)}).encode(),
    "index.json": lambda: json.dumps(
        {"shardlist": [{"url": f"x/{i}.tar", "nsamples": n} for i, n in enumerate(SIZES)]}
    ).encode(),
}
EACH = {"{}_stats.json": img2dataset, "{}.parquet": table}


@pytest.mark.parametrize("kind", [*LISTS, *EACH])
def test_counts_beside_shards_are_believed_here_and_there(tmp_path, bucket, kind):
    files = {kind.format(i): EACH[kind](n) for i, n in enumerate(SIZES)} if kind in EACH else {kind: LISTS[kind]()}
    files |= {f"{i}.tar": bytes(10240) for i in range(3)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        bucket.pipe_file(f"/bucket/{name}", content)
    cache = RemoteCache(tmp_path / "cache")
    for place in (str(tmp_path), "memory://bucket"):
        found = listed_counts([f"{place}/{i}.tar" for i in range(3)], cache)
        assert list(found.values()) == SIZES, place
    bucket.pipe_file(f"/bucket/{kind.format(0)}", b"[{")
    (tmp_path / kind.format(0)).write_bytes(b"[{")
    damaged = listed_counts([f"{tmp_path}/0.tar", "memory://bucket/0.tar"], cache)
    assert damaged == {}, "it is not believed"


def test_a_manifest_of_other_shards_is_not_believed(tmp_path):
    infos = [write_shard(tmp_path / f"{i}.tar", [sample(n) for n in range(3)]) for i in range(2)]
    write_manifest(tmp_path, infos, made_by={})
    write_shard(tmp_path / "1.tar", [sample(n) for n in range(40)])
    assert listed_counts([str(tmp_path / f"{i}.tar") for i in range(2)], None) == {str(tmp_path / "0.tar"): 3}
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": -1, "1.tar": "many"}))
    (tmp_path / "manifest.json").unlink()
    assert listed_counts([str(tmp_path / f"{i}.tar") for i in range(2)], None) == {}


@pytest.mark.parametrize("number", ["1" + 30 * "0", "Infinity", "-3", "0", "NaN", "1e999", "9e18"])
def test_an_impossible_number_of_samples_is_not_believed(tmp_path, number):
    """Before: a traceback; of 0 samples, a shard that nobody looked at again."""
    size = write_shard(tmp_path / "0.tar", [sample(n) for n in range(3)]).bytes
    rows = f'{{"shards": [{{"name": "0.tar", "samples": {number}, "bytes": {size}}}]}}'
    for name, content in {
        "manifest.json": rows,
        "sizes.json": f'{{"0.tar": {number}}}',
        "index.json": f'{{"shardlist": [{{"url": "0.tar", "nsamples": {number}}}]}}',
        "0_stats.json": f'{{"successes": {number}}}',
    }.items():
        (tmp_path / name).write_text(content)
        assert listed_counts([str(tmp_path / "0.tar")], None) == {}, name
        (tmp_path / name).unlink()


def test_a_remote_shard_without_samples_is_looked_at_again(tmp_path, bucket):
    """What a first start found empty, half written or a proxy's page may have come since."""
    cache, store = RemoteCache(tmp_path / "cache"), IndexStore(tmp_path / "index")
    for content, kind in ((b"<html>", "corrupt shard"), (b"", "empty shard")):
        bucket.pipe_file("/bucket/a.tar", content)
        assert count_shards(["memory://bucket/a.tar"], cache, store) == [(0, {kind: 1})]
    write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)])
    bucket.pipe_file("/bucket/a.tar", (tmp_path / "a.tar").read_bytes())
    assert count_shards(["memory://bucket/a.tar"], cache, store) == [(3, {})]


def test_another_number_of_samples_than_promised_is_counted(tmp_path):
    for name, size in (("fewer", 3), ("more", 6)):
        write_shard(tmp_path / f"{name}.tar", [sample(n, labels=True) for n in range(size)])
    (tmp_path / "sizes.json").write_text(json.dumps({"fewer.tar": 5, "more.tar": 4}))
    config = DataConfig(train=str(tmp_path), batch_size=9, num_workers=0, index_dir=str(tmp_path / "index"))
    tokenizer = train_tokenizer(["rose", "stone"], vocab_size=300)
    data = WebDatasetDataModule(config, tokenizer, transform=ImageTransform(32), num_image_tokens=4)
    (batch,) = data.loader("train", config.train, training=True)
    assert (len(batch), batch.samples_read) == (7, 9)
    assert batch.skipped == Counter({"missing sample": 2, "unlisted sample": 2})
    assert str(tmp_path / "more.tar") in batch.examples["unlisted sample"]
    assert data.open("train", None).plan == open_set("train", str(tmp_path), config).plan, "also when it is indexed"


def test_headers_are_read_without_what_is_between_them(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(remote, "PART", 2048)
    path = tmp_path / "a.tar"
    write_shard(path, [{"__key__": f"{i}", "jpg": bytes([i]) * 20_000, "txt": "a dog"} for i in range(8)])
    bucket.pipe_file("/bucket/a.tar", path.read_bytes())
    transferred = []
    cat = type(bucket).cat_file
    monkeypatch.setattr(type(bucket), "cat_file", lambda *a, **k: transferred.append(cat(*a, **k)) or transferred[-1])
    index = index_shard("", ForwardFile("memory://bucket/a.tar", Pace(1.0), 0))
    local = index_shard(path)
    assert (index.keys, index.rows.tolist(), index.stamp[0]) == (local.keys, local.rows.tolist(), local.stamp[0])
    assert sum(map(len, transferred)) < path.stat().st_size / 4
    store, cache = IndexStore(tmp_path / "index"), RemoteCache(tmp_path / "cache")
    transferred.clear()
    for _ in range(2):
        assert count_shards(["memory://bucket/a.tar"], cache, store) == [(8, {})]
    assert sum(map(len, transferred)) < path.stat().st_size / 4, "the second time the index is there"
    assert not (tmp_path / "cache").exists(), "nothing is fetched"
    monkeypatch.setattr(remote, "PART", 1 << 22)
    assert index_shard("", ForwardFile("memory://bucket/a.tar", Pace(1.0), 0)).keys == local.keys


def test_a_local_shard_that_is_listed_is_indexed_once_when_it_is_read(tmp_path, monkeypatch):
    write_shards(tmp_path / "a", [5, 5])
    indexed = []
    monkeypatch.setattr("nxtp.data.shards.reader.index_shard", lambda path: indexed.append(path) or index_shard(path))
    config = DataConfig(index_dir=str(tmp_path / "index"))
    shards = open_set("train", str(tmp_path / "a"), config).shards
    assert len(shards) == 10
    assert not indexed
    with ThreadPoolExecutor(4) as pool:
        assert {raw.key for raw in pool.map(shards.read, range(10))} == {f"{i:06d}" for i in range(10)}
    assert sorted(indexed) == shards.urls
