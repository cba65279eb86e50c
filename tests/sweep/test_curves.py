"""docs/curves.py, as a user runs it."""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))

from curves import curves, rows_of


@pytest.fixture
def runs(tmp_path):
    """Two runs; the first was resumed ten times, and did not log the speed."""
    for name, version, lines in (
        ("deep", 2, ["step,train/loss", "9,3.5", "19,2.5"]),
        ("deep", 10, ["step,train/loss,val/loss", "29,1.5,", "29,,1.25"]),
        ("flat", 0, ["step,train/loss,perf/images_per_s", "9,3,70", "19,2,71"]),
    ):
        folder = tmp_path / name / "csv" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "multirun.yaml").touch()
    return [tmp_path / "deep", tmp_path / "flat"]


def run(*arguments):
    return CliRunner().invoke(curves, [str(argument) for argument in arguments], standalone_mode=False)


def test_curves_of_several_runs_share_their_panels(runs, tmp_path):
    assert [row["step"] for row in rows_of(runs[0])] == ["9", "19", "29", "29"]
    out = tmp_path / "new" / "curves.svg"
    everything = sorted(tmp_path.glob("*"))  # runs/depth/*
    done = run(*everything, "--metrics", "train/loss,perf/images_per_s", "--out", out)
    assert done.exception is None, done.exception
    first = out.read_bytes()
    for text in (">train/loss<", ">perf/images_per_s<", ">deep<", ">flat<"):
        assert text in first.decode()
    run(*runs, "--metrics", "train/loss,perf/images_per_s", "--out", out)
    assert out.read_bytes() == first, "the same runs give the same picture"
    assert run(runs[0], "--metrics", "val/loss", "--out", tmp_path / "one.png").exception is None


def test_what_cannot_be_drawn_is_one_line(runs, tmp_path):
    assert run(tmp_path).exit_code == 1
    unknown = run(runs[0], "--metrics", "train/los")
    assert unknown.exit_code == 1
    assert "no run logged 'train/los'. Did you mean 'train/loss'?" in unknown.stderr
