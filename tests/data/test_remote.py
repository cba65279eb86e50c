"""Remote shards: what is listed, what arrives in spite of faults, and who fetches what."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import numpy as np
import pytest
from sites import FAULTS, serving, until
from small_shards import sample

from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.mixture import open_set
from nxtp.data.sampler import ElasticBatchSampler
from nxtp.data.shards.cache import RemoteCache, RemoteFile, _lock
from nxtp.data.shards.manifest import write_manifest
from nxtp.data.shards.prefetch import Prefetcher
from nxtp.data.shards.reader import IndexedShards, SampleError
from nxtp.data.shards.remote import RemoteError
from nxtp.data.shards.tar_index import IndexStore
from nxtp.data.shards.urls import expand_shards
from nxtp.data.transforms import ImageTransform
from nxtp.errors import UserError
from nxtp.model.tokenizer import train_tokenizer
from nxtp.prepare.writer import write_shard

SHARDS, SAMPLES = 10, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Samples with labels: a worker that loaded a tagger for their captions would end seconds after its loader."""
    root, infos = tmp_path_factory.mktemp("site"), []
    for i in range(SHARDS):
        samples = [sample(SAMPLES * i + n, labels=True) for n in range(SAMPLES)]
        infos.append(write_shard(root / f"r-{i}.tar", samples))
    write_manifest(root, infos, made_by={})
    return root


def opened(url, tmp_path, number=SHARDS, *, limit=None, read_timeout=0.3, retries=3):
    cache = RemoteCache(tmp_path / "cache", limit, read_timeout, retries)
    return IndexedShards([f"{url}/r-{i}.tar" for i in range(number)], cache, IndexStore(tmp_path / "index"))


KEYS = [f"{number:06d}" for number in range(SHARDS * SAMPLES)]


def test_transient_faults_lose_no_sample(root, tmp_path):
    """Each kind of fault, once or three times in a row: as often as it is tried again."""
    faults = {f"r-{i}.tar": (FAULTS[i % 5], 1 + 2 * (i // 5)) for i in range(SHARDS)}
    with serving(
        root, fault=lambda name, times: faults[name][0] if times <= faults.get(name, ("", 0))[1] else None
    ) as (
        url,
        handler,
    ):
        shards = opened(url, tmp_path)
        prefetch = shards.prefetch(range(SHARDS))
        assert [shards.read(i).key for i in range(len(shards))] == KEYS
        prefetch.close()
    assert all(handler.asked.count(name) == 1 + times for name, (_, times) in faults.items())
    assert any(asked != "bytes=0-" for asked in handler.ranges), "a transfer continues where it was"


def test_more_faults_than_retries_are_reported_once_to_all(root, tmp_path):
    with serving(root, fault=lambda name, times: "503" if name == "r-1.tar" else None) as (url, handler):
        first, second = opened(url, tmp_path, 2, retries=2), opened(url, tmp_path, 2, retries=2)
        for shards in (first, second):
            with pytest.raises(SampleError, match="unreachable shard"):
                shards.read(SAMPLES)
            assert shards.read(0).key == KEYS[0]
        assert handler.asked.count("r-1.tar") == 3, "by the first alone"
        later = opened(url, tmp_path, 2)
        handler.fault = staticmethod(lambda name, times: None)
        assert later.read(SAMPLES).key == KEYS[SAMPLES], "what failed for an earlier run is tried again"


def test_the_first_sample_is_read_while_its_shard_arrives(root, tmp_path):
    with serving(root, held=threading.Event()) as (url, handler):
        handler.held.set()
        shards = opened(url, tmp_path, 1)
        handler.held.clear()
        assert shards.read(0).key == KEYS[0], "of a shard without an index, the half of which has been sent"
        assert list((tmp_path / "cache").glob("*.tar")) == []
        handler.held.set()
        assert [shards.read(n).key for n in range(SAMPLES)] == KEYS[:SAMPLES]
        usage = shards.cache.take_usage()
    assert usage["reads"] == 1 + SAMPLES
    assert 0 < usage["hits"] < usage["reads"]
    assert usage["bytes"] == (root / "r-0.tar").stat().st_size


def test_ranks_share_transfers(root, tmp_path):
    """Four that read the same at the same time fetch each shard once; one that stalls holds none of the others."""
    stalled = range(3 * SAMPLES, 4 * SAMPLES)
    others_read = threading.Barrier(5)
    with serving(root, stall=("r-3.tar",), latency=0.01) as (url, handler):
        ranks = [opened(url, tmp_path, retries=0, read_timeout=60) for _ in range(4)]
        kinds: list[Counter] = [Counter() for _ in ranks]

        def read(rank: int) -> None:
            prefetch = ranks[rank].prefetch(range(SHARDS))
            for position in [*range(stalled.start), *range(stalled.stop, len(KEYS))]:
                kinds[rank][ranks[rank].read(position).key == KEYS[position]] += 1
            others_read.wait(30)
            try:
                ranks[rank].read(stalled[-1])
            except SampleError as error:
                kinds[rank][error.kind] += 1
            prefetch.close()

        threads = [threading.Thread(target=read, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        others_read.wait(30)
        handler.stopped.set()
        for thread in threads:
            thread.join()
    assert kinds == 4 * [Counter({True: len(KEYS) - SAMPLES, "unreachable shard": 1})]
    assert all(handler.asked.count(f"r-{i}.tar") == 1 for i in range(SHARDS))


def test_a_transfer_of_a_frozen_process_is_taken_over(root, tmp_path):
    """Such as of a run stopped by Ctrl-Z that shares the cache: each sample waited for it, and was lost."""
    with serving(root) as (url, _):
        shards = opened(url, tmp_path, 1, retries=0, read_timeout=0.3)
        shard, cache = f"{url}/r-0.tar", shards.cache
        path, part = cache.path_of(shard), cache.path_of(shard).with_suffix(".part")
        part.parent.mkdir()
        lock, file = _lock(part.with_suffix(".lock")), part.open("wb", buffering=0)
        file.write(b"half")
        assert [shards.read(n).key for n in range(SAMPLES)] == KEYS[:SAMPLES]
        part.write_bytes(b"of a third one")
        file.seek(0)
        cache._transfer(shard, lock, file)  # it goes on
        assert path.read_bytes() == (root / "r-0.tar").read_bytes()


def test_a_web_page_is_no_shard(root, tmp_path, caplog):
    (root / "login.html").write_text("<html>")
    config = DataConfig(cache_dir=str(tmp_path / "cache"), index_dir=str(tmp_path / "index"), retries=0)
    with serving(root) as (url, _):
        for name in ("login.html?of=a.tar", "nope.tar"):
            with pytest.raises(UserError, match=r"cannot be had \(unreachable shard × 1\)"):
                open_set("train", f"{url}/{name}", config)
    assert "a web page came in its place: check the address, and proxies" in caplog.text
    assert f"{url}/nope.tar: unreachable shard: not found" in caplog.text


def test_a_failure_is_one_line_for_all_processes(tmp_path, monkeypatch):
    """A reason too long for the note made every process fetch again, as fast as it could, for minutes."""
    tried = []

    def received(url, *_):
        tried.append(url)
        raise RuntimeError("é\n" + "é" * 300)
        yield

    monkeypatch.setattr("nxtp.data.shards.remote._chunks", received)
    cache = RemoteCache(tmp_path, None, 0.3, 0)
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"^unreachable shard: é é+$"):
            RemoteFile(cache, "https://x/a.tar").read(1, 0)
    assert len(tried) == 1


class Noted:
    def __init__(self):
        self.orders = []

    def __call__(self, shards):
        self.orders.append(shards)
        return self

    def reached(self, index):
        pass

    def close(self):
        pass


def test_nodes_share_the_shards_of_a_window_out():
    """data.nodes=split: every step has the same samples; a node reads a part of the shards, which it has prefetched."""
    options = {"shuffle": True, "shuffle_window": 8000, "world": 8}

    def steps(nodes: int) -> list[list]:
        ranks = [ElasticBatchSampler([500] * 32, 32, rank=rank, nodes=nodes, **options) for rank in range(8)]
        for rank in ranks:
            rank.prefetch = noted[rank.rank]
        return [[batch for _, batch in rank] for rank in ranks]

    noted = [Noted() for _ in range(8)]
    split, shared = steps(4), steps(1)
    for parts in zip(*split, *shared, strict=True):
        assert sorted(np.concatenate(parts[:8])) == sorted(np.concatenate(parts[8:]))
    for node in range(4):
        read = set((np.concatenate([np.concatenate(split[rank]) for rank in (2 * node, 2 * node + 1)]) // 500).tolist())
        assert len(read) <= 16
        assert len(read - set(noted[2 * node].orders[0])) <= 1
        assert len(set(noted[2 * node].orders[0])) <= 16
    assert set(noted[0].orders[1]) == set(range(32))


class Slow:
    """A cache of files of 100 bytes that fetches one when it is allowed to."""

    def __init__(self, directory, limit):
        self.directory, self.limit, self.fetched, self.go = directory, limit, [], threading.Semaphore(0)

    def path_of(self, url):
        return self.directory / url.rsplit("/", 1)[1]

    def fetch(self, url):
        self.fetched.append(url)
        self.go.acquire()
        self.path_of(url).write_bytes(bytes(100))


def test_a_prefetch_is_as_far_ahead_as_the_cache_holds(tmp_path):
    urls = [f"x://{i:02}" for i in range(100)]
    cache = Slow(tmp_path, 2000)
    prefetch = Prefetcher(cache, urls)
    until(lambda: len(cache.fetched) == 8)
    assert sorted(cache.fetched) == urls[:8], "by eight threads"
    cache.go.release(100)
    until(lambda: len(list(tmp_path.iterdir())) == 15)
    assert sorted(cache.fetched) == urls[:15], "three quarters of the cache"
    prefetch.reached(20)
    until(lambda: len(list(tmp_path.iterdir())) == 30)
    assert sorted(cache.fetched)[15:] == urls[20:35], "what the reader has behind it is passed over, nothing else"
    prefetch.close()


def test_a_local_error_is_fatal(root, tmp_path):
    with serving(root) as (url, _):
        shards = opened(url, tmp_path, 2)
        cache, full = shards.cache.directory, shards.cache.path_of(f"{url}/r-0.tar").with_suffix(".part")
        cache.mkdir()
        full.symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"r-0\.tar cannot be written: No space left.*data\.cache_dir"):
            shards.read(0)
        full.symlink_to("/dev/full")
        data = WebDatasetDataModule(
            DataConfig(
                train=shards.urls,
                cache_dir=str(cache),
                index_dir=str(tmp_path),
                batch_size=4,
                num_workers=1,
                shuffle_window=0,
            ),
            train_tokenizer(["stone"], vocab_size=400),
            transform=ImageTransform(32),
            num_image_tokens=16,
        )
        with pytest.raises(UserError, match=r"^[^\n]*r-0\.tar cannot be written: [^\n]*$"):  # of a worker: in one line
            list(data.train_dataloader())
        (tmp_path / "file").touch()
        blocked = RemoteCache(tmp_path / "file" / "cache")
        with pytest.raises(UserError, match="cannot be written: Not a directory"):
            blocked.fetch(f"{url}/r-0.tar")


def test_what_killed_transfers_left_is_not_read_and_removed(root, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nxtp")
    with serving(root) as (url, _):
        shards = opened(url, tmp_path, 2)
        parts = [shards.cache.path_of(f"{url}/r-{i}.tar").with_suffix(".part") for i in (0, 1)]
        parts[0].parent.mkdir()
        for part in parts:
            part.write_bytes(b"x" * 100_000)
        assert [shards.read(n).key for n in range(SAMPLES)] == KEYS[:SAMPLES]
        until(lambda: not parts[1].exists())
    assert f"{parts[1]}: an unfinished transfer is removed (100000 bytes)." in caplog.text


@pytest.mark.parametrize("url", ["https://host/laion", "https://host/laion/", "http://host/laion/*.tar"])
def test_web_servers_list_nothing(url):
    with pytest.raises(UserError, match=r"a web server lists nothing.*'http.*/laion/\{00000\.\.00331\}\.tar'"):
        expand_shards(url)


# --- S3 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(root):
    """The shards in s3://bucket/laion of a server that is started here, and in two directories of s3://bucket/sets."""
    s3fs = pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        for path in sorted(root.iterdir()):
            store.pipe_file(f"bucket/laion/{path.name}", path.read_bytes())
        for name in ("a", "b"):
            store.pipe_file(f"bucket/sets/{name}/r.tar", (root / "r-0.tar").read_bytes())
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_directories_and_globs_in_s3(bucket):
    every = [f"{bucket}/laion/r-{i}.tar" for i in range(SHARDS)]
    assert expand_shards(f"{bucket}/laion") == expand_shards(f"{bucket}/laion/") == every
    assert expand_shards(f"{bucket}/laion/*.tar") == expand_shards(f"{bucket}/laion/*") == every
    assert expand_shards(f"{bucket}/laion/r-[12].tar") == every[1:3]
    assert expand_shards(f"{bucket}/{{laion,sets/a}}") == [*every, f"{bucket}/sets/a/r.tar"]
    assert expand_shards(f"{bucket}/laion/r-{{1..2}}.tar") == every[1:3]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bucket/lion", r"no \*\.tar file found at s3://bucket/lion\."),
        ("bucket/laion/*.zip", r"no \*\.tar file found at s3://bucket/laion/\*\.zip\."),
        ("bucket/sets", r"found at s3://bucket/sets\. It has the directories a, b: name one of these\."),
        ("nobody/laion", r"no \*\.tar file found at s3://nobody/laion. There is nothing at all: check the names"),
    ],
)
def test_a_source_of_nothing_in_s3_is_an_error(bucket, root, tmp_path, path, message):
    """Before, the URL of a directory was one shard without samples: a mixture trained on the other sources."""
    mixture = {"a": {"shards": str(root)}, "laion": {"shards": f"s3://{path}"}}
    with pytest.raises(UserError, match=message):
        open_set("train", mixture, DataConfig(cache_dir=str(tmp_path), index_dir=str(tmp_path)))


def test_shards_in_s3_are_read(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("nxtp.data.shards.remote.PART", 9000)  # several ranges each
    config = DataConfig(cache_dir=str(tmp_path / "cache"), index_dir=str(tmp_path / "index"))
    shards = open_set("train", f"{bucket}/laion", config).shards
    assert not (tmp_path / "cache").exists(), "counted by the manifest"
    assert [shards.read(i).key for i in range(len(shards))] == KEYS


def test_validation_deletes_nothing_that_training_has_fetched_ahead(root, tmp_path):
    limit = 8 * (root / "r-0.tar").stat().st_size / 1e9
    with serving(root) as (url, handler):
        specs = {"train": f"{url}/r-{{0..3}}.tar", "val": f"{url}/r-{{4..9}}.tar"}
        config = DataConfig(
            train=specs["train"],
            val={"val": specs["val"]},
            cache_dir=str(tmp_path / "cache"),
            cache_gb=limit,
            index_dir=str(tmp_path / "index"),
        )
        train, val = (open_set(name, spec, config).shards for name, spec in specs.items())
        prefetch = train.prefetch(range(4))
        until(lambda: len(list(train.cache.directory.glob("*.tar"))) == 4)
        assert [val.read(i).key for i in range(len(val))] == KEYS[4 * SAMPLES :]
        assert [train.read(i).key for i in range(len(train))] == KEYS[: 4 * SAMPLES]
        prefetch.close()
    assert {handler.asked.count(f"r-{i}.tar") for i in range(SHARDS)} == {1}
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= 1e9 * limit
