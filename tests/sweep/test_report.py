"""nxtp report: records of runs → results.csv, table and plot."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from click.testing import CliRunner

from nxtp.errors import UserError
from nxtp.eval.hits import Hits
from nxtp.eval.metrics import ExactMatch
from nxtp.sweep.report import records as rec
from nxtp.sweep.report.command import differing, generated, report
from nxtp.sweep.report.comparison import _difference, _groups, interval
from nxtp.sweep.report.hits import chance
from nxtp.sweep.report.plot import svg
from nxtp.sweep.report.spec import Plot, Spec

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SPEC = """
columns: {blocks kept: model.decoder.depth, which: model.decoder.blocks}
metrics: {val/recall@10: recall@10, run.wall_time_s: time (s)}
paper:
  - {where: {blocks kept: 2, which: first}, metric: val/recall@10, value: 0.731, source: Table A.5}
plot: {x: blocks kept, y: [val/recall@10], lines: which}
"""


def record(depth=1, which="first", seed=0, sweep="depth/laptop", recall=None, **changes):
    recall = 0.5 + 0.05 * depth + 0.01 * seed + (0.02 if which == "spread" else 0) if recall is None else recall
    made = {
        "name": f"model.decoder.blocks={which},model.decoder.depth={depth},seed={seed}",
        "config": {
            "model": {"decoder": {"depth": depth, "blocks": which}},
            "data": {"train": "data/shards/x", "cache_dir": "/home/someone/cache", "seed": seed},
            "trainer": {"accelerator": "cpu", "max_steps": 300, "num_nodes": 3},
            "logger": {"csv": {"save_dir": "/home/someone/runs"}},
            "callbacks": {"best": {"dirpath": "/home/someone/runs"}},
        },
        "overrides": ["data.train=/home/someone/x"],
        "seed": seed,
        "sweep": sweep,
        "command": "train",
        "status": "finished",
        "started": f"2026-01-0{1 + depth}T{12 * (which == 'spread') + seed:02}:00:00+00:00",
        "wall_time_s": 100.0 + seed,
        "samples_seen": 9600,
        "parameters": {"total": 1000 * depth},
        "monitor": "val/recall@10",
        "metrics": {"val/recall@10": recall, "train/loss": 0.5},
        "process": {"host": "somehost", "pid": 4711},
        "format": 3,
    }
    return made | changes


def write(runs, made, directory=None):
    folder = runs / made["sweep"] / (directory or made["name"])
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(made))


@pytest.fixture
def study(tmp_path):
    """Three seeds, two lines, a published value."""
    folder = tmp_path / "experiments" / "depth"
    folder.mkdir(parents=True)
    (folder / "report.yaml").write_text(SPEC)
    (folder / "README.md").write_text("# Depth\n\n<!-- table -->\n<!-- /table -->\n\nEnd.\n")
    for depth in (1, 2):
        for which in ("first", "spread"):
            for seed in range(3):
                write(tmp_path / "runs", record(depth, which, seed))
    return folder


def run(folder, *options):
    runs = folder.parent.parent / "runs"
    return CliRunner().invoke(report, [str(folder), "--runs", str(runs), *options])


def test_table_has_means_and_spreads_and_published_values_apart_from_laptop_rows(study):
    assert run(study).exit_code == 0
    readme = (study / "README.md").read_text()
    assert "| size | blocks kept | which | recall@10 | recall@10, published | time (s) |" in readme
    assert "| laptop | 2 | first | 0.610 ± 0.010 (3) |  | 101 ± 1 (3) |" in readme
    assert "| paper | 2 | first |  | 0.731 (Table A.5) |  |" in readme
    assert readme.endswith("<!-- /table -->\n\nEnd.\n")


def test_a_study_without_a_readme_or_runs_is_an_error_that_names_what_is_missing(study):
    (study / "README.md").unlink()
    error = run(study).exception
    assert isinstance(error, UserError)
    assert "README.md' is missing: create it with the lines <!-- table --> and <!-- /table -->" in str(error)
    (study / "report.yaml").write_text("columns: {which: which}\nmetrics: {val/recall@10: recall@10}\n")
    shutil.rmtree(study.parent.parent / "runs")
    error = run(study).exception
    assert isinstance(error, UserError)
    assert "depth: no finished run of a sweep name=depth/laptop or depth/full" in str(error)


def test_published_value_stands_in_the_full_row(study):
    write(study.parent.parent / "runs", record(2, sweep="depth/full", recall=0.7, started="2026-02-01"))
    (study / "report.yaml").write_text(SPEC.replace("blocks kept: 2,", "blocks kept: 2.0,"))
    run(study)
    readme = (study / "README.md").read_text()
    assert "| full | 2 | first | 0.700 | 0.731 (Table A.5) | 100 |" in readme
    assert "| paper |" not in readme


def test_csv_has_a_row_for_each_run_and_published_value(study):
    run(study)
    lines = (study / "results.csv").read_text().splitlines()
    assert lines[0].startswith("size,sweep,run,blocks kept,which,seed,run.parameters.total,run.samples_seen")
    assert len(lines) == 1 + 12 + 1
    assert lines[-1].startswith("paper,,,2,first,,")


def test_records_hold_no_paths_hosts_or_processes(study):
    run(study)
    content = (study / "records.jsonl").read_text()
    for word in ("/home", "somehost", "4711", "someone", "num_nodes", "callbacks", "logger"):
        assert word not in content
    assert '"max_steps": 300' in content
    assert '"data/shards/x"' in content


def test_again_gives_the_same_bytes_without_the_runs(study):
    run(study)
    before = {p.name: p.read_bytes() for p in study.iterdir()}
    (study.parent.parent / "runs").rename(study.parent.parent / "gone")
    for name in ("results.csv", "plot.svg"):
        (study / name).unlink()
    assert run(study).exit_code == 0
    assert {p.name: p.read_bytes() for p in study.iterdir()} == before


def test_check_changes_nothing_and_names_what_differs(study):
    run(study)
    assert run(study, "--check").exit_code == 0
    (study / "results.csv").write_text("edited")
    done = run(study, "--check")
    assert done.exit_code == 1
    assert "results.csv" in done.output
    assert "plot.svg" not in done.output
    assert (study / "results.csv").read_text() == "edited"


def test_json_is_one_object_with_the_means(study):
    done = run(study, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["study"], found["metrics"]["val/recall@10"]) == ("depth", "recall@10")
    assert sorted(found["changed"]) == ["README.md", "plot.svg", "records.jsonl", "results.csv"]
    laptop = next(line for line in found["lines"] if line["columns"] == {"blocks kept": "2", "which": "first"})
    assert (laptop["size"], laptop["values"]["val/recall@10"]["n"]) == ("laptop", 3)
    assert laptop["values"]["val/recall@10"]["mean"] == pytest.approx(0.61)
    (study / "results.csv").write_text("edited")
    done = run(study, "--check", "--json")
    assert (done.exit_code, json.loads(done.stdout)["changed"]) == (1, ["results.csv"])
    assert (study / "results.csv").read_text() == "edited"


def test_a_run_done_again_replaces_its_record(study):
    run(study)
    file = next((study.parent.parent / "runs").glob("**/*depth=1,seed=0/run.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {"val/recall@10": 0.123}}))
    run(study)
    lines = (study / "records.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert sum("0.123" in line for line in lines) == 1


def test_a_run_of_other_settings_replaces_a_record_aloud(study):
    run(study)
    file = next((study.parent.parent / "runs").glob("**/*depth=1,seed=0/run.json"))
    again = json.loads(file.read_text())
    again["config"]["trainer"]["max_steps"] = 600
    file.write_text(json.dumps(again))
    assert (
        "replaces trainer.max_steps=300 by 600 of records.jsonl; with another name= both are kept" in run(study).stderr
    )
    assert "replaces" not in run(study).stderr


def test_a_record_of_a_later_run_is_kept(study):
    """Here is a run of yesterday; the records come from the one that another machine did again today."""
    run(study)
    later = (study / "records.jsonl").read_text().replace('"started": "2026', '"started": "2027')
    (study / "records.jsonl").write_text(later)
    done = run(study)
    assert (study / "records.jsonl").read_text() == later
    assert done.stderr.count("records.jsonl has a run that was started later, which counts") == 12


def test_plot_has_words_and_no_date(study):
    run(study)
    picture = (study / "plot.svg").read_text()
    for word in ("blocks kept", "recall@10", "which: spread", "paper"):
        assert word in picture
    assert "dc:date" not in picture


def test_columns_that_vary_unseen_tell_bars_apart(study):
    """Else bars of one place are drawn over each other."""
    (study / "report.yaml").write_text(SPEC.split("plot:")[0] + "plot: {kind: bar, x: which, y: [val/recall@10]}")
    run(study)
    picture = (study / "plot.svg").read_text()
    assert "blocks kept: 1" in picture
    assert "blocks kept: 2" in picture


def test_a_plot_of_some_arms(study):
    plot = "plot: {kind: bar, x: which, y: [val/recall@10], where: {%s: 1}}"
    (study / "report.yaml").write_text(SPEC.split("paper:")[0] + plot % "blocks kept")
    run(study)
    picture = (study / "plot.svg").read_text()
    assert "blocks kept" not in picture, "only one value is left"
    assert picture.count(">spread</text>") == 1
    (study / "report.yaml").write_text(SPEC.split("paper:")[0] + plot % "blocks")
    assert "plot, where: unknown 'blocks'. Did you mean 'blocks kept'?" in str(run(study).exception)


def test_a_plot_of_laptop_runs_alone_says_so(study):
    (study / "report.yaml").write_text(SPEC.split("paper:")[0] + "plot: {x: blocks kept, y: [val/recall@10]}")
    run(study)
    assert "recall@10 (laptop size)" in (study / "plot.svg").read_text()


BAD = {
    "older": (record(3, format=1), "an older format"),
    "newer": (record(3, format=9), "a newer format"),
    "failed": (record(3, status="failed"), "failed, not finished"),
    "yesterday": (record(3, started="yesterday"), "started is 'yesterday', no time"),
    "many": (record(3, other_cores="many"), "other_cores is 'many', no number"),
    "lacks": ({k: v for k, v in record(3).items() if k != "config"}, "lacks config"),
    "twice": (record(1), "two runs are named"),
}


@pytest.mark.parametrize(("made", "line"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_told_in_a_line_and_the_rest_reported(study, made, line):
    write(study.parent.parent / "runs", made, "bad")
    done = run(study)
    assert done.exit_code == 0
    assert done.stderr.count("note:") == 1
    assert line in done.stderr
    assert len((study / "records.jsonl").read_text().splitlines()) == 12


def test_another_studys_record_is_told(study):
    folder = study.parent.parent / "runs" / "depth" / "laptop" / "strange"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record(3, sweep="other/laptop")))
    done = run(study)
    assert "a run of other/laptop, not of depth" in done.stderr
    assert "other" not in (study / "records.jsonl").read_text()


def test_no_json_and_nan_are_told_and_blank(study):
    runs = study.parent.parent / "runs"
    write(runs, record(3, recall=float("nan")))
    (runs / "depth" / "laptop" / "half").mkdir()
    (runs / "depth" / "laptop" / "half" / "run.json").write_text('{"name": ')
    done = run(study)
    assert done.exit_code == 0
    assert "val/recall@10 is nan; left blank" in done.stderr
    assert "half/run.json: not JSON" in done.stderr
    assert "| laptop | 3 | first |  |  | 100 |" in (study / "README.md").read_text()
    assert "NaN" not in (study / "records.jsonl").read_text()


def test_only_published_values_are_shown_and_nothing_at_all_fails(study):
    (study.parent.parent / "runs").rename(study.parent.parent / "gone")
    done = run(study)
    assert done.exit_code == 0
    assert "no finished run" in done.stderr
    assert "0.731 (Table A.5)" in (study / "README.md").read_text()
    (study / "report.yaml").write_text("metrics: {val/loss: loss}")
    assert isinstance(run(study).exception, UserError)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("colums: {}", "Did you mean 'columns'"),
        (SPEC.replace("lines: which", "lines: whch"), "Did you mean 'which'"),
        (SPEC.replace("lines: which", "line: which"), "Did you mean 'plot.lines'"),
        (SPEC.replace("value: 0.731", "value: much"), "could not be converted to Float"),
        ("- a list", "must be a mapping"),
        (SPEC.replace("which: model", "size: model"), "'size' is a column of the table already"),
        (SPEC.replace("time (s)", "recall@10"), "'recall@10' is a column of the table already"),
        (SPEC + "names: {which: {first: <!-- /table -->}}", "cannot be in a table"),
        (SPEC.replace("value: 0.731", "value: .inf"), r"val/recall@10 is inf, no finite number"),
        (SPEC + "over: []", "over and metrics need an entry each"),
    ],
)
def test_report_yaml_is_checked(tmp_path, content, told):
    (tmp_path / "report.yaml").write_text(content)
    with pytest.raises(UserError, match=told):
        Spec.read(tmp_path / "report.yaml")


def test_any_directory_of_runs(study):
    directory = study.parent.parent / "runs" / "depth" / "laptop"
    write(directory.parent.parent, record(), f"{record()['name']}/wandb/offline-run-1/files")
    done = CliRunner().invoke(report, [str(directory)])
    assert done.exit_code == 0
    assert "note" not in done.stderr, "W&B's copy of a record is no second run"
    header = (directory / "results.csv").read_text().splitlines()[0]
    assert header.startswith("size,sweep,run,model.decoder.depth,model.decoder.blocks,seed,run.")
    assert (directory / "plot.svg").is_file()


def test_a_sweep_without_report_yaml_is_not_told_of_one(tmp_path):
    """Its times, all that could be drawn, were measured beside other work."""
    for depth in (1, 2):
        write(tmp_path, record(depth, sweep="mine") | {"metrics": {}, "monitor": None, "other_cores": 1.0})
    done = CliRunner().invoke(report, ["mine", "--runs", str(tmp_path)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.output.endswith("mine: results.csv\n")


def test_what_was_swept_comes_before_what_follows_from_it(tmp_path):
    """The decoder's number of layers is an interpolation of its depth, and stands before it in the configuration."""
    for depth in (1, 2, 4):
        made = record(depth, sweep="mine") | {"name": f"model.decoder.depth={depth}"}
        made["config"]["model"] = {"decoder": {"config": {"num_hidden_layers": depth}, "depth": depth}}
        write(tmp_path, made)
    done = CliRunner().invoke(report, ["mine", "--runs", str(tmp_path)])
    assert done.exit_code == 0
    assert done.output.endswith("mine: results.csv, plot.svg\n")
    header = (tmp_path / "mine" / "results.csv").read_text().splitlines()[0]
    assert header.startswith("size,sweep,run,model.decoder.depth,seed,run.")
    assert ">model.decoder.depth</text>" in (tmp_path / "mine" / "plot.svg").read_text()


def test_an_unknown_study_is_told_with_where_it_was_searched(study, monkeypatch):
    monkeypatch.chdir(study.parent.parent)
    error = CliRunner().invoke(report, ["dpth"]).exception
    assert isinstance(error, UserError)
    assert str(error).startswith("No study 'dpth' in experiments or ")
    assert str(error).endswith("Did you mean 'depth'? Runs are in runs/NAME.")


class FakeRun:
    """Of a run of wandb.Api what is read: its files."""

    def __init__(self, name, content):
        self.name, self.id, self.content = name, f"id-{name}", content

    def files(self, names):
        return [SimpleNamespace(name="run.json")] if names == ["run.json"] and self.content is not None else []

    def file(self, name):
        def download(root, replace):
            (Path(root) / name).write_text(self.content)
            return (Path(root) / name).open()

        return SimpleNamespace(download=download)


def test_records_from_wandb(study, monkeypatch):
    runs = [FakeRun("a", json.dumps(record(4))), FakeRun("b", None), FakeRun("c", '{"name": '), FakeRun("d", "{}")]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs={"me/mine": runs}.__getitem__))
    monkeypatch.setattr("nxtp.runs.secrets.has_key", lambda: True)
    done = run(study, "--wandb", "me/mine")
    assert "| laptop | 4 | first |" in (study / "README.md").read_text()
    assert "note: me/mine, run 'b' (id-b): no run.json; skipped" in done.stderr
    assert "note: me/mine, run 'c' (id-c): not JSON" in done.stderr
    assert "note: me/mine, run 'd' (id-d): an older format" in done.stderr


def test_a_wandb_project_needs_a_key_and_must_exist(monkeypatch):
    monkeypatch.setattr("nxtp.runs.secrets.has_key", lambda: False)
    with pytest.raises(UserError, match="needs a key"):
        rec.from_wandb("us/nxtp")

    def runs(project):
        raise wandb.errors.CommError("not found")

    monkeypatch.setattr("nxtp.runs.secrets.has_key", lambda: True)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=runs))
    with pytest.raises(UserError, match="'us/nxtp' cannot be read: not found"):
        rec.from_wandb("us/nxtp")


def complaints(folder, capsys):
    records = rec.of_study(rec.read_lines(folder / "records.jsonl"), folder.name)
    changed = differing(folder, generated(folder, records)[0])
    return [line for line in capsys.readouterr().err.splitlines() if "beside other work" not in line] + changed


def test_committed_studies_are_as_their_records_say(capsys):
    """One test over all folders: there may be none with records yet."""
    folders = [p.parent for p in sorted(EXPERIMENTS.glob("*/records.jsonl"))]
    assert {f.name: c for f in folders if (c := complaints(f, capsys))} == {}


def test_studies_and_the_page_on_the_paper_quote_the_same_numbers():
    page = (EXPERIMENTS.parent / "docs" / "reproduce.md").read_text().splitlines()
    quoted = 0
    for file in EXPERIMENTS.glob("*/report.yaml"):
        for paper in Spec.read(file).paper:
            table, _, model = paper.source.partition(", ")
            start = {"Table 1": f"| {model or 'G3M'} | Table 1 of the paper |", "Table A.5": "| 3, A.5:"}.get(table)
            if start:
                (line,) = (line for line in page if line.startswith(start))
                assert f"{paper.value:.3f}".lstrip("0") in line, f"{file}: {paper}"
                quoted += 1
    assert quoted >= 13


@pytest.mark.parametrize("name", ["results.csv", "plot.svg", "README.md"])
def test_an_edited_file_of_a_study_is_noticed(study, name, capsys):
    run(study)
    assert complaints(study, capsys) == []
    path = study / name
    path.write_text(path.read_text().replace("0.6", "0.7") if name != "plot.svg" else "<svg/>")
    assert complaints(study, capsys) == [name]


# ---- hits of each image, differences and intervals ---------------------------------------------------------------


def test_the_bootstrap_interval_of_a_normal_sample_is_the_known_one():
    images = np.random.default_rng(0).normal(0.3, 0.4, (1, 1500))
    low, high = interval(images)
    width = 2 * 1.96 * images.std(ddof=1) / 1500**0.5
    assert high - low == pytest.approx(width, rel=0.05)
    assert (low + high) / 2 == pytest.approx(images.mean(), abs=0.03 * width)
    assert interval(np.ones((1, 1))) is None
    assert interval(np.full((3, 7), 0.25)) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("images", [1, 100])
def test_an_interval_over_seeds_and_images_covers_the_mean_as_often_as_it_says(seeds, images):
    rng, covered = np.random.default_rng(seeds), 0
    for _ in range(200):
        values = rng.normal(0, 0.02, (seeds, 1)) + (images > 1) * rng.normal(0, 0.1, (1, images))
        low, high = interval(values + (images > 1) * rng.normal(0, 0.1, (seeds, images)))
        covered += low <= 0 <= high
    assert 184 <= covered <= 200  # at least 92 %; 78 and 85 % if seeds were drawn as images are


TRUTHS = [["cat", "dog"], ["Dog "], ["cow", "cat", "hen"], ["hen"]]


def evaluation(directory, guesses, seed=0, **config):
    """A finished evaluation of a sweep, with its predictions; metrics as `nxtp evaluate` measures them."""
    metric = ExactMatch(2)
    metric.update(guesses, TRUTHS)
    metrics = {f"val/{name}": float(value) for name, value in metric.compute().items()}
    made = record(seed=seed, sweep="depth/laptop") | {"metrics": metrics, "command": "evaluate"}
    made |= {"config": config, "name": f"{config},seed={seed}".replace("'", ""), "started": f"2026-01-0{seed + 1}"}
    made["data"] = {"train": {"frequent_labels": ["dog", "hen"]}}
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps(made))
    rows = [
        {"set": "val", "key": str(i), "labels": truth, "predictions": [[label, 0.5] for label in labels]}
        for i, (labels, truth) in enumerate(zip(guesses, TRUTHS, strict=True))
    ]
    rows.append({"set": "val", "key": "none", "labels": [], "predictions": [["cat", 0.5]]})
    (directory / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


GOOD = [["cat", "dog"], ["dog"], ["cow", "x"], ["x", "hen"]]
BAD_ONES = [["cat", "x"], ["x"], ["y", "x"], ["x", "hen"]]  # recall@2 of 1/2, 0, 0, 1


def test_metrics_of_each_image_have_the_records_means_also_packed(tmp_path):
    made = evaluation(tmp_path / "a", GOOD)
    (kept,) = rec.collect([tmp_path])
    hits = Hits.unpacked(kept["hits"]["val"]["packed"])
    assert hits.metric("recall@2").tolist() == pytest.approx([1, 1, 1 / 3, 1])
    assert hits.metric("hit@1").tolist() == [1, 1, 1, 0]
    for name in ("recall@2", "precision@2", "f1@2", "hit@1"):
        assert hits.metric(name).mean() == pytest.approx(made["metrics"][f"val/{name}"])
    assert hits.metric("loss") is None
    assert len(json.dumps(kept["hits"])) < 1500
    rows = [json.loads(line) for line in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    rows[0]["predictions"] = []
    (tmp_path / "a" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert rec.collect([tmp_path])[0]["hits"] == {}, "of another evaluation than the record"
    (tmp_path / "a" / "predictions.jsonl").write_text("[1]")
    with pytest.raises(UserError, match=r"not the predictions\.jsonl of an evaluation"):
        rec.collect([tmp_path])


def test_chance_is_the_mean_of_random_guesses_and_the_prior_that_of_frequent_labels(tmp_path):
    evaluation(tmp_path / "a", GOOD)
    kept = rec.collect([tmp_path])[0]["hits"]["val"]
    labels, rng = ["cat", "dog", "cow", "hen"], np.random.default_rng(0)
    guesses = [[list(rng.choice(labels, 2, replace=False)) for _ in TRUTHS] for _ in range(4000)]
    truths = [[label.strip().lower() for label in truth] for truth in TRUTHS]
    drawn = Hits.of([each for guess in guesses for each in guess], truths * len(guesses))
    hits = Hits.unpacked(kept["packed"])
    assert kept["chance"].keys() == {"recall@2", "precision@2", "f1@2", "hit@1"}
    for name, value in {**kept["chance"], "hit@2": chance("hit@2", hits.truths_N, 4)}.items():
        assert value == pytest.approx(drawn.metric(name).mean(), abs=0.01), name
    prior = Hits.of([["dog", "hen"]] * 4, truths)
    assert kept["label prior"] == pytest.approx({n: prior.metric(n).mean() for n in kept["label prior"]}, abs=1e-6)
    assert "recall@2" in kept["label prior"]
    made = json.loads((tmp_path / "a" / "run.json").read_text())
    made["data"]["classes"] = 3
    (tmp_path / "a" / "run.json").write_text(json.dumps(made))
    of_classes = rec.collect([tmp_path])[0]["hits"]["val"]["chance"]
    assert of_classes["hit@1"] == pytest.approx(1 / 3, abs=1e-6), "four names of three classes"


BASELINE = """
columns: {sampler: sampler, k: k}
metrics: {val/recall@2: recall@2, val/hit@1: hit@1, val/images_per_s: images/s}
baseline: {sampler: good}
"""


@pytest.fixture
def arms(study):
    """Three seeds of a good sampler, of the same under another name, and of a bad one, 60 images."""
    (study / "report.yaml").write_text(BASELINE)
    runs = study.parent.parent / "runs"
    shutil.rmtree(runs)
    for seed in range(3):
        for name, guesses in {"good": GOOD, "same": GOOD, "bad": BAD_ONES}.items():
            evaluation(runs / "depth" / "laptop" / f"{name}{seed}", guesses, seed, sampler=name, k=2)
    return study


def test_a_bound_that_is_shown_as_0_is_0():
    assert _difference(-0.025, (-0.053, -0.0003)) == "-0.025 [-0.053, +0.000] ≈"
    assert _difference(-0.025, (-0.053, -0.0007)) == "-0.025 [-0.053, -0.001]"


def test_differences_are_paired_and_what_overlaps_is_not_ranked(arms, capsys):
    done = run(arms)
    assert done.exit_code == 0
    shown = done.stdout.split()
    assert shown.index("Difference") > shown.index("sampler"), "below the table"
    assert "Δ" in shown
    assert "{good," in shown
    readme = (arms / "README.md").read_text()
    assert "| sampler | Δ recall@2 (3 seeds, 4 images) | Δ hit@1 (3 seeds, 4 images) |" in readme
    assert "| same | +0.000 [+0.000, +0.000] ≈ | +0.000 [+0.000, +0.000] ≈ |" in readme
    bad = next(line for line in readme.splitlines() if line.startswith("| bad | -0.4"))
    assert "] |" in bad
    assert "- recall@2: {good, same, bad}" in readme, "four images: their intervals overlap"
    assert "| label prior |  |  |" in readme
    assert "| chance |  |  | 0.500 |" in readme
    before = {p.name: p.read_bytes() for p in arms.iterdir()}
    shutil.rmtree(arms.parent.parent / "runs")
    assert run(arms, "--check").exit_code == 0, "from the records alone"
    assert {p.name: p.read_bytes() for p in arms.iterdir()} == before


def test_arms_whose_intervals_are_apart_are_ranked_and_old_records_compared_by_seeds(arms):
    for file in (arms.parent.parent / "runs").glob("**/predictions.jsonl"):
        file.unlink()
    run(arms)
    readme = (arms / "README.md").read_text()
    assert "Δ recall@2 (3 seeds only)" in readme
    assert "- recall@2: {good, same} > bad" in readme
    assert "chance" not in readme


def test_only_arms_that_differ_by_the_baseline_are_ranked_together(arms):
    for file in (arms.parent.parent / "runs").glob("**/run.json"):
        record = json.loads(file.read_text())
        record["config"]["k"] = 2 if record["config"]["sampler"] == "same" else 5
        file.write_text(json.dumps(record))
    run(arms)
    readme = (arms / "README.md").read_text()
    assert "- hit@1, k 2: same\n" in readme
    assert "- hit@1, k 5: {good, bad}" in readme


def test_full_size_is_named_beside_laptop_size_only(arms):
    directory = arms.parent.parent / "runs" / "depth" / "laptop"
    for file in directory.glob("**/run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sweep": "mine"}))
    said = CliRunner().invoke(report, [str(directory)]).stdout.split()
    assert "chance" in said
    assert not {"size", "full"} & set(said)


def test_images_of_another_kind_have_a_chance_of_their_own(arms):
    for file in (arms.parent.parent / "runs").glob("**/bad*/predictions.jsonl"):
        first, *others = file.read_text().splitlines()
        row = json.loads(first)
        named = [{"key": f"more {i}", "labels": [f"name {i}"], "predictions": []} for i in range(4)]
        file.write_text("\n".join([first, *others, *(json.dumps(row | each) for each in named)]))
        record = json.loads(file.with_name("run.json").read_text())
        record["metrics"] = {metric: value / 2 for metric, value in record["metrics"].items()}  # half of the images
        file.with_name("run.json").write_text(json.dumps(record))
    run(arms)
    readme = (arms / "README.md").read_text()
    assert "| chance | bad | 2 | 0.250 |" in readme
    assert "| chance |  | 2 | 0.500 |" in readme


@pytest.mark.parametrize(("other", "rows"), [(0.49, 1), (0.42, 2)])
def test_chances_within_5_percent_are_one_row(arms, other, rows):
    run(arms)
    shutil.rmtree(arms.parent.parent / "runs")
    records = [json.loads(line) for line in (arms / "records.jsonl").read_text().splitlines()]
    for kept in (r["hits"]["val"] for r in records if r["config"]["sampler"] == "bad"):
        kept["chance"] = {name: other / 0.5 * value for name, value in kept["chance"].items()}
    (arms / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run(arms)
    assert (arms / "README.md").read_text().count("| chance |") == rows


def test_only_seeds_that_both_arms_have_are_paired(arms):
    shutil.rmtree(arms.parent.parent / "runs" / "depth" / "laptop" / "good2")
    run(arms)
    assert "Δ recall@2 (2 seeds, 4 images)" in (arms / "README.md").read_text()


def test_images_of_another_set_are_not_paired(arms):
    for file in (arms.parent.parent / "runs").glob("**/bad*/predictions.jsonl"):
        file.write_text(file.read_text().replace('"key": "0"', '"key": "other"'))
    run(arms)
    readme = (arms / "README.md").read_text()
    assert "Δ recall@2 (3 seeds, some by these only, 4 images)" in readme
    assert "| bad | -0.458 [-0.458, -0.458] |" in readme, "by seeds, which agree"


def test_values_have_the_names_that_the_report_gives_them(arms):
    for file in (arms.parent.parent / "runs").glob("**/run.json"):
        record = json.loads(file.read_text())
        record["config"] |= {"lr": 0.0003, "k": record["config"]["sampler"] == "bad"}
        file.write_text(json.dumps(record))
    spec = """
columns: {k: k, lr: lr, sampler: sampler}
names: {k: {true: worst, false: usual}, sampler: {good: the best}}
metrics: {val/hit@1: hit@1}
baseline: {sampler: the best, k: usual, lr: 3e-4}
plot: {kind: bar, x: sampler, y: [val/hit@1], where: {lr: 3e-4, k: worst}}
"""
    (arms / "report.yaml").write_text(spec)
    run(arms)
    readme = (arms / "README.md").read_text()
    assert "| usual | 0.0003 | the best |" in readme
    assert "| worst | bad | -0." in readme
    assert "- hit@1: {usual the best, usual same, worst bad}" in readme
    assert "the best" in (arms / "results.csv").read_text()
    drawn = (arms / "plot.svg").read_text()
    assert ">bad<" in drawn
    assert ">same<" not in drawn
    ordered = spec.replace("good: the best", "same: same, good: the best").replace(", where: {lr: 3e-4, k: worst}", "")
    (arms / "report.yaml").write_text(ordered)
    run(arms)
    drawn = (arms / "plot.svg").read_text()
    assert drawn.index(">same<") < drawn.index(">the best<") < drawn.index(">bad<"), (
        "in the order of names, then others"
    )
    (arms / "report.yaml").write_text(spec.replace("sampler: {good", "samplr: {good"))
    with pytest.raises(UserError, match=r"names: unknown 'samplr'\. Did you mean 'sampler'"):
        Spec.read(arms / "report.yaml")


@pytest.mark.parametrize(
    "content", ["", "# only a comment", "null", "3", "[a]", "columns: {null: a}", "columns: {a: '${columns'}", "a: {"]
)
def test_a_report_that_is_no_mapping_is_one_line(tmp_path, content):
    (tmp_path / "report.yaml").write_text(content)
    with pytest.raises(UserError, match=r"report.yaml' (must be a mapping|cannot be read as YAML)"):
        Spec.read(tmp_path / "report.yaml")


def test_names_are_printed_as_they_are(arms):
    names = {"good": "[first 2]", "same": "__init__", "bad": "n [/] a:dog:b $_{$"}
    content = (
        f"names: {json.dumps({'sampler': names})}\nplot: {{kind: bar, x: sampler, y: [val/hit@1, val/images_per_s]}}"
    )
    (arms / "report.yaml").write_text(BASELINE.replace("sampler: good", "sampler: '[first 2]'") + content)
    done = run(arms)
    assert done.exit_code == 0, done.output
    for name in names.values():
        assert done.stdout.count(name) >= 2, name


def test_runs_that_no_column_tells_apart_are_reported(arms):
    (arms / "report.yaml").write_text(BASELINE.replace("baseline: {sampler: good}", "names: {sampler: {bad: same}}"))
    told = run(arms).stderr
    assert "note: report.yaml, columns: 3 runs with the columns and seed of another: means are over all of them" in told
    assert "they differ in sampler, which columns could name" in told


def test_what_no_run_has_is_named(arms):
    changed = BASELINE.replace("sampler: sampler", "sampler: smpler").replace("hit@1: hit@1", "hits@1: hit@1")
    (arms / "report.yaml").write_text(changed + "plot: {x: k, y: [val/hits@1]}\n")
    told = run(arms).stderr
    assert "columns: no run has the setting smpler. Did you mean 'sampler'?" in told
    assert "metrics: no run has val/hits@1. Did you mean 'val/hit@1'?" in told
    assert "plot: no run has what it shows; plot.svg is left as it is" in told
    assert "baseline: no runs to compare with those of sampler good" in told
    (arms / "report.yaml").write_text(BASELINE.replace("baseline: {sampler", "baseline: {k: 2.0, sampler"))
    assert "baseline" not in run(arms).stderr, "2.0 is 2"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"packed": "UEsDBA=="}, "the hits of val cannot be read"),
        ({"packed": None}, "the hits of val cannot be read"),
        (BAD_ONES, "the hits of val give not f1@2 0.767 but 0.292; compared by seeds only"),
    ],
)
def test_hits_that_are_not_the_records_are_not_used(arms, change, told):
    run(arms)
    shutil.rmtree(arms.parent.parent / "runs")
    file = arms / "records.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    of = {r["config"]["sampler"]: r["hits"] for r in records}
    for kept in (r["hits"] for r in records if r["config"]["sampler"] == "good"):
        kept["val"] |= change if isinstance(change, dict) else {"packed": of["bad"]["val"]["packed"]}
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert f"note: records.jsonl, line 4: {told}" in run(arms).stderr


def test_intervals_of_few_seeds_know_all_draws():
    """Of two seeds one is drawn: its value, widened as Student's t of one degree of freedom is."""
    assert interval(np.array([[0.0], [1.0]])) == pytest.approx((0.5 - 12.71 / 1.96 / 2, 0.5 + 12.71 / 1.96 / 2))
    values = np.random.default_rng(0).normal(0, 1, (5, 1))
    draws = values[np.array(list(itertools.product(range(5), repeat=4))), 0].mean(axis=1)
    wide = values.mean() + 2.78 / 1.96 * (np.quantile(draws, (0.025, 0.975), method="inverted_cdf") - values.mean())
    assert interval(values) == pytest.approx(tuple(wide))


def test_groups_are_those_whose_intervals_all_overlap():
    bounds = {("a",): (8, 9), ("b",): (5, 7), ("c",): (3, 6), ("d",): (2, 4), ("e",): (0, 1), ("f",): (0.5, 0.6)}
    assert _groups(bounds) == [[("a",)], [("b",), ("c",)], [("c",), ("d",)], [("e",), ("f",)]]


@pytest.mark.parametrize(("kind", "chance", "drawn"), [("line", 0.1, False), ("line", 0.89, True), ("bar", 0.1, True)])
def test_a_reference_does_not_flatten_lines(kind, chance, drawn):
    rows = [{"size": "laptop", "x": str(x), "m": str(0.9 + x / 20)} for x in range(2)]
    spec = Spec({"x": "x"}, {"m": "m"}, plot=Plot("x", ["m"], kind))
    assert ("chance" in svg([*rows, {"size": "chance", "x": "", "m": str(chance)}], spec)) is drawn


def test_a_baseline_must_be_a_column(arms):
    (arms / "report.yaml").write_text(BASELINE.replace("{sampler: good}", "{samplr: good}"))
    with pytest.raises(UserError, match=r"baseline: unknown 'samplr'\. Did you mean 'sampler'"):
        Spec.read(arms / "report.yaml")


def test_times_beside_other_work_are_left_out(study):
    runs = study.parent.parent / "runs"
    shutil.rmtree(runs)
    for seed, (minute, others) in enumerate([(0, None), (1, None), (10, None), (20, 0.6), (21, 0.02)]):
        write(runs, record(1, seed=seed, started=f"2026-01-01T00:{minute:02}:00", other_cores=others))
    write(runs, record(1, seed=5, started="2026-01-01T00:10:00", device="of another machine"))
    run(study)
    assert "| laptop | 1 | first | 0.575 ± 0.019 (6) |  | 104 ± 2 (3) |" in (study / "README.md").read_text()
