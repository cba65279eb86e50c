"""`data.transforms`: of training images only, and a function of (seed, epoch, sample) alone."""

import random
import re

import numpy as np
import pytest
import torch
from helpers import composed, shard_data, write_shards
from PIL import Image

from nxtp.config import conf_dir
from nxtp.data.augmentation import Augmentation
from nxtp.data.config import DataConfig
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.urls import expand_shards
from nxtp.data.transforms import ImageTransform
from nxtp.errors import UserError
from nxtp.prepare.writer import write_shard

CROP = {
    "crop": {"_target_": "torchvision.transforms.v2.RandomResizedCrop", "size": 32},
    "flip": {"_target_": "torchvision.transforms.v2.RandomHorizontalFlip"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [12, 12])


def pixels(loader, epoch: int = 0) -> dict[str, torch.Tensor]:
    loader.sampler.set_epoch(epoch)
    return {key: image for batch in loader for key, image in zip(batch.keys, batch.images, strict=True)}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in one if key in two and torch.equal(one[key], two[key])}


def test_by_default_pixels_are_those_of_prediction(root, tmp_path):
    assert composed(tmp_path).data.transforms is None
    shards, transform = IndexedShards(expand_shards(root)), ImageTransform(32)
    expected = {raw.key: transform(raw.image) for raw in map(shards.read, range(24))}
    assert same(pixels(shard_data(str(root)).train_dataloader()), expected) == set(expected)


def test_a_sample_has_the_same_pixels_for_any_workers_ranks_and_after_a_resume(root):
    data = shard_data(str(root), {"v": str(root)}, transforms=CROP)
    once = pixels(data.train_dataloader(), epoch=1)
    plain = pixels(shard_data(val={"v": str(root)}).val_dataloader()[0])
    assert len(same(once, plain)) < 3
    assert same(pixels(data.val_dataloader()[0]), plain) == set(plain), "validation has none"
    assert same(pixels(shard_data(str(root), transforms=CROP, num_workers=2).train_dataloader(), 1), once) == set(once)
    half = data.loader("train", str(root), training=True, share=(1, 2))
    assert len(same(pixels(half, 1), once)) == 12
    rest = data.loader("train", str(root), training=True)
    rest.load_state_dict({"epoch": 1, "samples": 8})
    assert len(same(pixels(rest, 1), once)) == 16
    assert len(same(pixels(data.train_dataloader(), epoch=2), once)) < 3
    assert len(same(pixels(shard_data(str(root), transforms=CROP, seed=1).train_dataloader(), 1), once)) < 3


@pytest.mark.parametrize(
    "option", sorted({path.stem for path in (conf_dir() / "transforms").glob("*.yaml")} - {"none"})
)
def test_every_shipped_option_changes_images(tmp_path, option):
    cfg = composed(tmp_path, f"transforms={option}", "model.encoder.image_size=48")
    augmentation = Augmentation(cfg.data.transforms)
    image = Image.effect_noise((90, 60), 50).convert("RGB")
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    changed = [augmentation(image, seed, "a in b") for seed in range(8)]
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert len({each.tobytes() for each in changed}) == (2 if option == "flip" else 8)
    assert {each.size for each in changed} == ({(90, 60)} if option == "flip" else {(48, 48)})
    assert augmentation(image, 3, "a in b").tobytes() == changed[3].tobytes()


def test_a_step_may_be_removed_and_any_class_added(tmp_path):
    own = "+data.transforms.blur={_target_: torchvision.transforms.v2.GaussianBlur, kernel_size: 3}"
    cfg = composed(tmp_path, "transforms=crop", "data.transforms.crop=null", own)
    assert list(Augmentation(cfg.data.transforms).steps) == ["data.transforms.flip", "data.transforms.blur"]


def test_mistakes_name_the_step_and_the_sample(root):
    with pytest.raises(UserError, match=r"^data\.transforms\.flip cannot be instantiated"):
        shard_data(str(root), transforms={"flip": {"_target_": "torchvision.transforms.v2.RandomHorizontalFlap"}})
    small = {"cut": {"_target_": "torchvision.transforms.v2.RandomCrop", "size": 64}}
    message = rf"^data\.transforms\.cut failed on 0000\d\d in {re.escape(str(root))}/part-0000\d\.tar: ValueError: "
    with pytest.raises(UserError, match=message):
        next(iter(shard_data(str(root), transforms=small).train_dataloader()))
    tensor = {"tensor": {"_target_": "torchvision.transforms.v2.PILToTensor"}}
    with pytest.raises(UserError, match="must return an RGB image of Pillow, got Tensor"):
        next(iter(shard_data(str(root), transforms=tensor).train_dataloader()))
    with pytest.raises(UserError, match="use transforms=none"):
        DataConfig(features="here", transforms=CROP)


def test_skipped_samples_are_named(tmp_path, root):
    write_shard(tmp_path / "a.tar", [{"__key__": f"bad{n}", "jpg": b"no", "txt": "a lemon"} for n in range(4)])
    batch = next(iter(shard_data(str(tmp_path)).train_dataloader()))
    assert re.fullmatch(rf"bad\d in {tmp_path}/a\.tar: not an image in a known format", batch.examples["bad image"])
    good = next(iter(shard_data(str(root)).train_dataloader()))
    assert all(re.fullmatch(rf"[\d, ]+ in {root}/part-0000\d\.tar", name) for name in good.names)
