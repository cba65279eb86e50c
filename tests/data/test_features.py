"""Features of a frozen encoder: the same training as from images, and a store that cannot be mistaken for another."""

import hashlib
import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY_OVERRIDES, call_nxtp, curve, jpeg, nxtp_runs, sample, write_shards
from torch import nn

from nxtp.data.features.store import LOCK, META, FeatureStore, FeatureWriter, Meta, fingerprint, image_key
from nxtp.errors import UserError
from nxtp.model.encoder import EncoderConfig
from nxtp.prepare.writer import write_shard

pytestmark = pytest.mark.costly

FROZEN = [
    "optim.trainable.encoder=none",
    "data.train=train",
    *TINY_OVERRIDES,
    "data.num_workers=0",
    "data.batch_size=8",
]
TRAINING = ["trainer.max_epochs=1", "trainer.log_every_n_steps=1", "optim.lr=3e-3", "+data.val.val=val"]
ONLY_FIRST = """import os
from nxtp.data import mixture
if os.environ["LOCAL_RANK"] == "1":
    mixture.expand_shards = mixture.listed_counts = None
"""
CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """32 samples, one that is no image among them, and their features as float32 and float16."""
    root = tmp_path_factory.mktemp("features")
    write_shards(root / "train", [16, 15], labels=True)
    write_shard(root / "train" / "zz.tar", [{"__key__": "bad", "jpg": b"no image", "json": {"labels": ["rose"]}}])
    write_shards(root / "val", [9], labels=True)
    for dtype in ("float32", "float16"):
        here(root, "features", *FROZEN, f"data.features={dtype}", f"features_dtype={dtype}")
    return root


def train(root, name: str, *overrides: str, ranks: int = 1) -> Path:
    command = ["train", f"name={name}", *FROZEN, *TRAINING, *overrides]
    if ranks == 1:
        here(root, *command)
    else:
        nxtp_runs(*command, cwd=root, ranks=ranks)
    return root / "runs" / name


def here(root, *arguments: str, code: int = 0) -> str:
    """A command in this process; what it printed."""
    done = call_nxtp(*arguments, cwd=root)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def refused(root, *overrides: str) -> str:
    """The message of a training that does not start."""
    return here(root, "train", "name=refused", *FROZEN, *TRAINING, *overrides, code=1)


def record(run) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def exact(root):
    return train(root, "exact", "data.features=float32")


def test_training_from_features_is_training_from_images(root, exact):
    images, half = train(root, "images"), train(root, "half", "data.features=float16")
    assert curve(exact) == pytest.approx(curve(images), rel=1e-6)
    assert curve(half) == pytest.approx(curve(images), rel=2e-3)
    assert curve(half) != curve(exact)
    assert record(exact)["samples_skipped"] == record(images)["samples_skipped"] == {"bad image": 1}
    for name in ("val/loss", "val/recall@10"):
        assert record(exact)["metrics"][name] == pytest.approx(record(images)["metrics"][name], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])  # reads as ddp does
def test_two_ranks_share_the_features(root, exact, strategy):
    two = ["data.features=float32", f"trainer={strategy}", *CPU, "data.batch_size=4"]
    assert curve(train(root, strategy, *two, ranks=2)) == pytest.approx(curve(exact), rel=1e-5)


def test_a_part_of_the_data_needs_a_part_of_the_features(root):
    """And what is there is not computed again."""
    fraction = [*FROZEN, "data.fraction=0.25", "data.features=some"]
    assert "8 images computed, 0 before" in here(root, "features", *fraction)
    assert "24 images computed, 8 before" in here(root, "features", *FROZEN, "data.features=some")
    assert len(FeatureStore(root / "some")) == 32
    assert "0 images computed, 32 before" in here(root, "features", *FROZEN, "data.features=some")
    assert not (root / "runs" / "features").exists()


def test_a_part_of_a_mixture_has_the_images_that_training_reads(root):
    sources = "data.train={a: {shards: train/part-00000.tar}, b: {shards: train/part-00001.tar}}"
    part = [*FROZEN, sources, "data.fraction=0.5", "data.features=mixed"]
    assert "16 images computed, 0 before" in here(root, "features", *part)
    here(root, "train", "name=mixed", *part, "data.max_skip_fraction=0", "trainer.max_epochs=1")
    assert record(root / "runs" / "mixed")["samples_skipped"] == {}


def test_two_ranks_compute_one_store(root):
    """Each a share of what is missing; the images are listed by the first one."""
    (root / "only_first.py").write_text(ONLY_FIRST)
    two = [*FROZEN, "data.features=ranks", "features_dtype=float32", "data.val_batch_size=8"]
    here(root, "features", *two, "data.fraction=0.25")
    assert "24 images computed, 8 before" in nxtp_runs("features", *two, cwd=root, ranks=2, NXTP_IMPORT="only_first")
    one, store = FeatureStore(root / "float32"), FeatureStore(root / "ranks")
    assert len(store) == 32
    assert len(store.parts) == 3
    for number in range(31):
        image = sample(number)["jpg"]
        assert np.allclose(store.read(image), one.read(image), atol=1e-6)


def test_ranks_write_parts_of_their_own(tmp_path):
    meta, numbers = Meta("e", 2, 3, "float16"), iter(range(9))
    for ranks in (3, 2):
        writers = [FeatureWriter(tmp_path, meta, (rank, ranks)) for rank in range(ranks)]
        for writer in (writers[1], writers[0], writers[-1], writers[1]):
            writer.write([image_key(b"%d" % next(numbers))], np.zeros((1, 2, 3)), np.array([False]))
            newest = max(int(part.name[5:]) for part in tmp_path.glob("part-*"))
            assert newest % ranks == writer.share[0], "another rank may write at the same time"
        del writers, writer
    store = FeatureStore(tmp_path)
    assert len(store) == len(store.parts) == 8
    assert all(image_key(b"%d" % number) in store for number in range(8))


def test_images_that_have_no_features_are_counted(root):
    write_shards(root / "more", [16, 16, 8], labels=True)
    run = train(root, "more", "data.features=float32", "data.train=more", "data.max_skip_fraction=1")
    assert record(run)["samples_skipped"]["no features"] == 9


def test_features_that_do_not_fit_are_refused(root):
    exact = "data.features=float32"
    assert "optim.trainable.encoder=none" in refused(root, exact, "optim.trainable.encoder=all")
    assert "another encoder" in refused(root, exact, "seed=1")  # and other settings: below
    assert "16 tokens of width 32" in refused(root, exact, "model.encoder.image_size=64")
    assert "No features in 'nowhere'" in refused(root, "data.features=nowhere")
    assert "data.features is not set" in here(root, "features", *FROZEN, code=1)
    assert "another encoder or dtype" in here(root, "features", *FROZEN, exact, code=1)


def test_a_resumed_run_has_the_checkpoints_encoder(root, exact):
    """Not the one that its seed would give."""
    here(root, "features", *FROZEN, "seed=1", "data.max_samples=8", "data.features=seed1")
    resumed = [f"resume={exact / 'checkpoints' / 'last.ckpt'}", "seed=1", "trainer.max_epochs=2"]
    assert "another encoder" in refused(root, *resumed, "data.features=seed1")
    train(root, "goes_on", *resumed, "data.features=float32", "trainer.max_steps=5")


def test_a_damaged_store_is_reported(root):
    shutil.copytree(root / "float32", root / "damaged")
    tokens = next((root / "damaged").glob("part-*/tokens.npy"))
    store, whole = FeatureStore(root / "damaged"), tokens.read_bytes()
    tokens.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"tokens\.npy.*cannot be read"):  # cut short under a run
        store.read(sample(30)["jpg"])
    message = refused(root, "data.features=damaged", "data.num_workers=1")
    assert "part-000000' is damaged" in message.splitlines()[-1]
    values = np.load(root / "float32" / "part-000000" / "tokens.npy")
    np.save(tokens, values[:-1])
    with pytest.raises(UserError, match=r"damaged.*not those of 32 images"):
        FeatureStore(root / "damaged")
    (root / "damaged" / META).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        FeatureStore(root / "damaged")


def test_a_store_is_read_by_the_bytes_of_an_image(tmp_path):
    writer = FeatureWriter(tmp_path, Meta("e", 2, 3, "float16"))
    images = [jpeg((i, 0, 0)) for i in range(5)]
    values = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    writer.write([image_key(i) for i in images[:2]], values[:2], np.array([False, False]))
    writer.write([image_key(i) for i in images[2:]], values[2:], np.array([False, True, False]))
    store = FeatureStore(tmp_path)
    assert len(store) == 5
    assert [store.read(image) is None for image in images] == [False, False, False, True, False]
    assert np.array_equal(store.read(images[4]), values[4])
    with pytest.raises(KeyError):
        store.read(b"another")


def test_a_store_of_before_resize_modes_has_the_same_encoder():
    statistics = {"quick_gelu": False, "image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    before = {"name": None, "vision": {"layers": 2}, "depth": None, **statistics}
    config = EncoderConfig(**before, interpolation="bicubic", resize_mode="shortest")
    encoder = SimpleNamespace(config=config, visual=nn.Identity())
    assert fingerprint(encoder) == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    config.resize_mode = "squash"
    assert fingerprint(encoder) != hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()


def test_an_encoder_of_other_settings_is_another():
    config = EncoderConfig(vision={"layers": 2})
    changed = [{"resize_mode": "squash"}, {"interpolation": "bilinear"}, {"mean": (0, 0, 0)}, {"quick_gelu": True}]
    encoders = [SimpleNamespace(config=replace(config, **c), visual=nn.Identity()) for c in ({}, *changed)]
    assert len({fingerprint(encoder) for encoder in encoders}) == 1 + len(changed)


def test_features_that_will_not_fit_are_not_begun(tmp_path):
    writer = FeatureWriter(tmp_path, Meta("e", 256, 1024, "float16"))
    with pytest.raises(UserError, match=r"need .* GB .* are free"):
        writer.check_room(10**12)


def test_what_cannot_be_a_store_is_reported_in_one_line(root):
    (root / "file").write_text("")
    message = here(root, "features", *FROZEN, "data.features=file", code=1)
    assert "cannot be written" in message.splitlines()[-1]
    assert "No features in 'file'" in refused(root, "data.features=file").splitlines()[-1]
    message = here(root, "features", *FROZEN, "data.features=other", "features_dtype=floats32", code=1)
    assert "Did you mean 'float32'?" in message
    assert not (root / "other").exists()


def test_one_process_at_a_time_writes(tmp_path):
    meta = Meta("e", 2, 3, "float16")
    writer = FeatureWriter(tmp_path, meta)
    with pytest.raises(UserError, match="Another nxtp features"):
        FeatureWriter(tmp_path, meta)
    del writer
    FeatureWriter(tmp_path, meta)


def test_a_store_may_have_more_parts_than_a_process_may_have_files(tmp_path):
    writer = FeatureWriter(tmp_path, Meta("e", 2, 3, "float16"))
    for number in range(60):
        tokens = np.full((1, 2, 3), number, np.float32)
        writer.write([image_key(b"%d" % number)], tokens, np.array([False]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 20, hard))
    try:
        store = FeatureStore(tmp_path)
        read = [store.read(b"%d" % number)[0, 0].item() for number in range(60)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read == list(range(60))


@pytest.mark.parametrize("free", [10_000, 30_000])
def test_a_full_disk_leaves_no_half_part(root, free):
    """Of 33 kB; also where only the last of them find no room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        message = here(root, "features", *FROZEN, f"data.features=full{free}", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written" in message.splitlines()[-1]
    assert sorted(path.name for path in (root / f"full{free}").iterdir()) == [LOCK, META]
