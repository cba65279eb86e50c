"""`nxtp data show` and `nxtp data verify`, as a user runs them, on sound and on damaged shards."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.cells import cell_len
from small_shards import jpeg, sample, write_shards

from nxtp.data.shards.manifest import write_manifest
from nxtp.errors import UserError
from nxtp.inference.figures import _LABELS, _fitted, _lines, _width
from nxtp.prepare.commands import data
from nxtp.prepare.writer import UNFINISHED, write_shard


def run(*arguments, code=0):
    result = CliRunner().invoke(data, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def mixed(tmp_path):
    """Twelve samples, four of which cannot be used."""
    odd = [
        {"__key__": "none", "jpg": jpeg((9, 9, 9))},
        {"__key__": "mute", "jpg": jpeg((9, 9, 9)), "txt": "very slowly"},
        {"__key__": "bad", "jpg": b"nothing", "txt": "a rose"},
        {"__key__": "lie", "jpg": jpeg((9, 9, 9)), "txt": "a rose", "json": {"crc32": 1}},
        {"__key__": "$x$ [red]", "jpg": jpeg((9, 9, 9), size=48), "txt": "a $20 rose, a 日本 lemon $x_", "json": {}},
        {"__key__": "own", "png": jpeg((9, 9, 9)), "json": {"labels": ["Rose", "grand piano"]}},
    ]
    write_shard(tmp_path / "b.tar", odd)
    write_shards(tmp_path, [6])
    return tmp_path


def test_show_counts_and_draws(mixed, tmp_path):
    out = tmp_path / "sheet.png"
    result = run("show", mixed, "--out", out, "--images", 8)
    text = result.stdout
    assert "12 samples, 12 of them read" in text
    assert "bad image × 1, damaged image × 1, no caption × 1, no labels × 1" in text
    assert "Given labels: 1" in text
    assert "grand piano" in text
    with Image.open(out) as sheet:
        assert sheet.width == 1000, "two rows of four"
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 500
    numbers = json.loads(run("show", mixed, "--json", "--images", 0).stdout)
    assert numbers["labels_per_image"] == {"0": 2, "2": 7, "3": 1}
    assert dict(numbers["labels"]["most_frequent"])["stone"] == 6
    assert numbers["labels"]["given"] == 1
    stopped = run("show", mixed, "--json", "--images", 0, "--stop-nouns", "lemon,stone").stdout
    assert "stone" not in dict(json.loads(stopped)["labels"]["most_frequent"])
    assert numbers["widths"] == {"min": 32, "lower": 32, "median": 32, "upper": 32, "max": 48}
    assert numbers["formats"] == {"JPEG": 10}


def test_show_reads_a_spread_of_a_large_set(tmp_path):
    write_shards(tmp_path, [30, 30])
    numbers = json.loads(run("show", tmp_path, "--json", "--images", 0, "--samples", 10).stdout)
    assert (numbers["samples"], numbers["samples_read"]) == (60, 10)


def test_verify_finds_what_differs(tmp_path):
    write_shards(tmp_path, [3, 3, 3, 3])
    assert "12 samples in 4 shards" in run("verify", tmp_path).stdout
    (tmp_path / "part-00000.tar").unlink()
    damaged = tmp_path / "part-00001.tar"
    damaged.write_bytes(damaged.read_bytes().replace(b"stone", b"stove"))
    with (tmp_path / "part-00002.tar").open("ab") as file:
        file.write(bytes(512))
    write_shard(tmp_path / "new.tar", [sample(50)])
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "settings.json").touch()
    message = run("verify", tmp_path, code=1).stderr
    for line in (
        "part-00000.tar: missing",
        "part-00001.tar: another SHA-256 than in the manifest",
        "part-00002.tar: 10,752 bytes; the manifest says 10,240",
        "new.tar: not in the manifest",
        "the preparation was interrupted",
    ):
        assert line in message
    assert "part-00003" not in message


def test_verify_can_decode_the_images(tmp_path):
    bad, lie = {"__key__": "bad", "jpg": b"nothing", "txt": "a rose"}, sample(1) | {"json": {"crc32": 7}}
    rows = [write_shard(tmp_path / "a.tar", [sample(0), bad, lie])]
    write_manifest(tmp_path, rows, made_by={})
    run("verify", tmp_path)
    message = run("verify", tmp_path, "--images", code=1).stderr
    assert "a.tar: bad: not an image in a known format" in message
    assert "a.tar: 000001: damaged image" in message


def test_verify_wants_a_manifest_and_stays_in_its_directory(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(0)])
    result = CliRunner().invoke(data, ["verify", str(tmp_path)])
    assert "has no manifest.json" in str(result.exception)
    info = write_shard(tmp_path / "set" / "b.tar", [sample(0)])
    write_manifest(tmp_path / "set", [info], made_by={})
    path = tmp_path / "set" / "manifest.json"
    path.write_text(path.read_text().replace("b.tar", "../a.tar"))
    assert "not a file name" in run("verify", tmp_path / "set", code=1).stderr


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_directory_above_the_shards_names_those_that_hold_some(tmp_path, command):
    for name in ("train", "val"):
        write_shards(tmp_path / "set" / name, [2])
    (tmp_path / "set" / "empty").mkdir()
    result = CliRunner().invoke(data, [command, str(tmp_path / "set")])
    assert isinstance(result.exception, UserError)
    assert "Shards are in its train, val: name one of these." in str(result.exception)


def test_verify_takes_a_single_shard(tmp_path):
    write_shards(tmp_path, [3, 2])
    whole, damaged = (tmp_path / f"part-0000{n}.tar" for n in (0, 1))
    damaged.write_bytes(damaged.read_bytes().replace(b"stone", b"stove"))
    assert "3 samples in 1 shard, 10.2 kB, all as in the manifest." in run("verify", whole).stdout
    assert "another SHA-256 than in the manifest" in run("verify", damaged, code=1).stderr
    write_shard(tmp_path / "new.tar", [sample(50)])
    assert "new.tar: not in the manifest" in run("verify", tmp_path / "new.tar", code=1).stderr


def test_verify_names_the_file_that_has_no_manifest(tmp_path):
    (tmp_path / "bad.jpg").touch()
    result = CliRunner().invoke(data, ["verify", str(tmp_path / "bad.jpg")])
    assert str(result.exception).startswith(f"{tmp_path / 'bad.jpg'} has no manifest.json beside it")


def test_show_reports_a_missing_directory_before_it_reads(tmp_path):
    write_shards(tmp_path, [2])
    result = CliRunner().invoke(data, ["show", str(tmp_path), "--out", str(tmp_path / "none" / "sheet.png")])
    assert isinstance(result.exception, UserError)
    assert "there is no directory" in str(result.exception)
    assert "2 samples" not in result.output


def test_looking_at_shards_imports_no_heavy_library(tmp_path):
    write_shards(tmp_path, [2], labels=True)
    program = """if True:
        import sys
        from nxtp.prepare.commands import data
        try:
            data(sys.argv[1:])
        finally:
            print(sorted({"torch", "webdataset", "matplotlib", "hydra", "nltk"} & {*sys.modules}))
    """
    for command in (["show", "--images", "0"], ["verify"]):
        done = subprocess.run([sys.executable, "-c", program, *command, tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[]\n")


def test_a_negative_seed_is_one_line(tmp_path):
    write_shards(tmp_path, [2])
    assert "-1 is not in the range" in run("show", tmp_path, "--seed", -1, code=2).stderr


@pytest.mark.parametrize(
    "text", ["W" * 200, "WIDE MMMM WWWW LETTERS " * 9, "写真" * 60, "a dog", "i" * 200, "a dog on a sofa " * 40]
)
def test_texts_of_a_sheet_stay_in_their_cell(text):
    figure = Figure(dpi=100)
    FigureCanvasAgg(figure)
    lines = _fitted(figure, text, 225, _LABELS)
    assert max(_width(figure, line, _LABELS) for line in lines.split("\n")) <= 225
    assert lines.count("\n") <= 1
    assert lines.endswith("…") or lines.replace("\n", "") == text


def test_a_sheets_lines_are_filled_before_they_are_cut():
    assert _lines("x" * 100, 2, width=30) == "x" * 30 + "\n" + "x" * 29 + "…"
    assert _lines("a dog on a sofa", 2) == "a dog on a sofa"
    assert max(cell_len(line) for line in _lines("写真写真写真 — ein Mädchen & a café table " * 3, 2).split("\n")) <= 36
