"""The examples of docs/extending.md, run with the commands that the page gives."""

import csv
import re
import runpy
import shlex
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest
from helpers import call_nxtp, run_nxtp
from small_shards import picture, write_shards

from nxtp.errors import UserError
from nxtp.eval.metrics import own_metrics
from nxtp.runs.record import read_record

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text()
SECTIONS = {
    title: re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.M | re.S)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
RUNS = Path("runs/debug/smoke")
# What an example must have left behind, beyond a run that ends.
RESULTS = {
    "Metric": lambda cwd: 0 <= read_record(cwd / RUNS / "phrases")["metrics"]["val/phrases"] <= 1,
    "Callback": lambda cwd: any(
        row.get("train/projection_norm")
        for row in csv.DictReader((cwd / RUNS / "norm/csv/version_0/metrics.csv").open())
    ),
    "Dataset": lambda cwd: read_record(cwd / RUNS / "birds")["data"]["train"]["samples"] == 16,
}


def test_every_part_has_an_example():
    assert list(SECTIONS) == [
        "Encoder",
        "Decoder",
        "Tokenizer",
        "Metric",
        "Callback",
        "Optimiser and schedule",
        "Dataset",
    ]
    assert all({language for language, _, _ in blocks} >= {"python", "sh"} for blocks in SECTIONS.values())


@pytest.mark.slow  # each takes seconds; together, below, they are one run
@pytest.mark.parametrize("section", list(SECTIONS))
def test_an_example_runs(section, tmp_path):
    place(tmp_path, section)
    for line in commands(section):
        run(line, tmp_path)
    assert RESULTS.get(section, bool)(tmp_path)


def test_examples_run_together(tmp_path):
    """Every part of one's own in one run, by the overrides that the page gives; its model predicts and is evaluated."""
    place(tmp_path, *SECTIONS)
    lines = [line for section in SECTIONS for line in commands(section)]
    words = [shlex.split(line) for line in lines]
    runs = [given for given in words if "train" in given]
    assert len(runs) == len(SECTIONS)
    modules = ",".join(given[0].partition("=")[2] for given in runs if given[0].startswith("NXTP_IMPORT="))
    overrides = {o.partition("=")[0]: o for given in runs for o in given[given.index("train") + 1 :]}
    del overrides["data.train"]  # of all examples but the data set's
    for given in words:
        if given[0] == "python":
            run(shlex.join(given), tmp_path)
    run(shlex.join([f"NXTP_IMPORT={modules}", "nxtp", "train", *overrides.values(), "name=phrases"]), tmp_path)
    for name in ("norm", "birds", "strides"):
        (tmp_path / RUNS / name).symlink_to("phrases")
    assert all(holds(tmp_path) for holds in RESULTS.values())
    for given in words:
        if "predict" in given or "evaluate" in given:
            run(shlex.join([f"NXTP_IMPORT={modules}", *given[given.index("nxtp") :]]), tmp_path)


def place(tmp_path: Path, *sections: str) -> None:
    """What the page's commands find in their directory: the examples' files and some pictures."""
    write_shards(tmp_path / "data/shards/mine", [16])
    picture(tmp_path / "photo.jpg")
    names = [picture(tmp_path / f"pictures/{i}.jpg", i) and f"{i}.jpg,robin,ringed\n" for i in range(16)]
    (tmp_path / "pictures/birds.csv").write_text("file,species,remark\n" + "".join(names))
    for _, name, content in (block for section in sections for block in SECTIONS[section]):
        if name:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)


def commands(section: str) -> list[str]:
    return "".join(content for language, _, content in SECTIONS[section] if language == "sh").splitlines()


def test_a_module_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NXTP_IMPORT", "nowhere")
    done = call_nxtp("describe", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: NXTP_IMPORT: 'nowhere' cannot be imported: No module named 'nowhere'\n"


def test_a_metric_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"metrics.own must be a torchmetrics Metric, got Counter"):
        own_metrics({"own": {"_target_": "collections.Counter"}}, "metrics")


def run(line: str, cwd: Path) -> None:
    """A command of the page."""
    words = shlex.split(line)
    environment = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program, *arguments = words
    if program == "python":
        with chdir(cwd), mock.patch.object(sys, "argv", arguments):
            runpy.run_path(arguments[0], run_name="__main__")
        return
    assert program == "nxtp"
    done = run_nxtp(*arguments, cwd=cwd, **environment)
    assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
