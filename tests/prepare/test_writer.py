"""The writer that all preparation scripts share: the same bytes, resumed, repaired, never two at once."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image
from small_shards import contents, json_of, picture, sample, samples
from webdataset.writer import TarWriter

from nxtp.data.shards.manifest import read_manifest
from nxtp.errors import UserError
from nxtp.prepare.items import Item, write_items
from nxtp.prepare.options import WriterOptions
from nxtp.prepare.writer import UNFINISHED, Skip, write_set, write_shard


@pytest.fixture
def items(tmp_path) -> list[Item]:
    source = tmp_path / "source"
    return [Item(f"{n:03d}", str(source / f"{n}.jpg"), "a dog") for n in range(20) if picture(source / f"{n}.jpg", n)]


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


def test_a_resize_that_no_jpeg_can_hold_is_skipped(tmp_path):
    Image.new("1", (140_000, 40)).save(tmp_path / "long.png")
    picture(tmp_path / "good.jpg")
    items = [Item("long", str(tmp_path / "long.png"), "x"), Item("good", str(tmp_path / "good.jpg"), "x")]
    manifest = write_items(tmp_path / "s", items, made_by={}, options=WriterOptions(resize=20))
    assert manifest["skipped"] == {"longer than 65,500 pixels after --resize": 1}
    assert list(samples(tmp_path / "s")) == ["good"]
