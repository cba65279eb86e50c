"""Shifted variants of a set: what changes is the picture, and how."""

import io

import numpy as np
import pytest
import variants
from click.testing import CliRunner
from PIL import Image
from small_shards import jpeg, write_shards

from nxtp.data.shards.manifest import read_manifest
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.urls import expand_shards
from nxtp.prepare.writer import write_shard


def make(source, out, *arguments, fails=False):
    result = CliRunner().invoke(variants.main, [str(source), "--out", str(out), "--workers", "1", *arguments])
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def contents(directory):
    shards = IndexedShards(expand_shards(str(directory)))
    raws = [shards.read(i) for i in range(len(shards))]
    pixels = [np.asarray(Image.open(io.BytesIO(raw.image)).convert("RGB"), dtype=float) for raw in raws]
    return pixels, [(raw.caption, raw.labels) for raw in raws]


@pytest.mark.parametrize("kind", list(variants.KINDS))
def test_a_variant_changes_pictures_only_and_repeats(tmp_path, kind):
    source = write_shards(tmp_path / "s", [5, 3], labels=True)
    make(source, tmp_path / "a", "--kind", kind)
    make(source, tmp_path / "b", "--kind", kind)
    before, texts = contents(source)
    after, same_texts = contents(tmp_path / "a")
    assert same_texts == texts
    assert all(a.shape == b.shape and np.abs(a - b).mean() > 2 for a, b in zip(before, after, strict=True))
    assert all((a == b).all() for a, b in zip(after, contents(tmp_path / "b")[0], strict=True))
    assert "nothing to do" in make(source, tmp_path / "a", "--kind", kind)
    assert "overwrite" in make(source, tmp_path / "a", "--kind", kind, "--strength", "0.7", fails=True)


def test_kinds_do_what_they_say():
    rng = np.random.default_rng(0)
    grey = Image.new("RGB", (64, 48), (128, 128, 128))
    noisy = np.asarray(variants.alter(grey, "noise", 0.1, rng), dtype=float)
    assert noisy.std() == pytest.approx(25.5, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=1)

    half = Image.fromarray(np.repeat(np.arange(64)[None] // 32 * 255, 48, 0).astype(np.uint8)).convert("RGB")
    slope = np.asarray(variants.alter(half, "blur", 0.05, rng), dtype=float)[24, :, 0]
    assert (np.diff(slope) >= 0).all()
    assert 2.4 / 2 < ((slope > 16) & (slope < 239)).sum() / 2 < 2.4 * 3, "the edge is as wide as the radius says"

    sketch = np.asarray(variants.alter(half, "edges", 1.0, rng))
    assert (sketch[:, :28] == 255).all()
    assert (sketch[:, 36:] == 255).all()
    assert (sketch[5:-5, 31:33] < 128).any()


def test_samples_without_a_caption_or_a_picture(tmp_path):
    content = [{"__key__": "a", "jpg": jpeg((9, 90, 200))}, {"__key__": "b", "jpg": b"none", "txt": "a lemon"}]
    (tmp_path / "s").mkdir()
    write_shard(tmp_path / "s" / "a.tar", content)
    make(tmp_path / "s", tmp_path / "v", "--kind", "blur")
    assert contents(tmp_path / "v")[1] == [(None, None)]
    assert read_manifest(tmp_path / "v")["skipped"] == {"bad image": 1}


def test_a_strength_of_nothing_is_refused(tmp_path):
    source = write_shards(tmp_path / "s", [2])
    assert "--strength must be > 0, got 0" in make(
        source, tmp_path / "v", "--kind", "noise", "--strength", "0", fails=True
    )
    assert not (tmp_path / "v").exists()
