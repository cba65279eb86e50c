"""Which modules a command imports: commands start fast because they import only what they use."""

import json
import subprocess
import sys

import pytest
from helpers import jpeg, recognizer

HEAVY = {"torch", "transformers", "lightning", "open_clip", "timm", "torchmetrics", "scipy", "wandb", "matplotlib"}
PROGRAM = """
import json, sys
from nxtp.cli import main
loaded = {}
for command in sys.argv[1:]:
    sys.argv = ["nxtp", *command.split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
    loaded[command] = sorted({name.split(".")[0] for name in sys.modules})
sys.stderr.write("\\n" + json.dumps(loaded))
"""


def imported(*commands: str, cwd) -> dict[str, set[str]]:
    """Top-level modules that each `nxtp …` and those before it have imported when it ends."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *commands], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {command: set(modules) for command, modules in json.loads(done.stderr.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory, an image, one finished run of a sweep and a shard of one sample."""
    root = tmp_path_factory.mktemp("startup")
    recognizer().save_pretrained(root / "model")
    (root / "photo.jpg").write_bytes(jpeg((200, 40, 60)))
    record = {"status": "finished", "metrics": {"val/recall@10": 0.5}, "config": {}, "name": "seed=0", "seed": 0}
    record["format"] = 3
    (root / "runs" / "mine" / "seed=0").mkdir(parents=True)
    (root / "runs" / "mine" / "seed=0" / "run.json").write_text(json.dumps(record))
    return root


def test_help_and_status_import_no_heavy_library(place):
    """All in one process: of a library that is not to be imported, the first to do so is named."""
    commands = [
        "--help",
        "train --help",
        "evaluate --help",
        "calibrate --help",
        "describe --help",
        "sweep --help",
        "sweep status mine",
    ]
    commands += ["report --help", "report runs/mine", "data --help", "prepare --help", "predict --help"]
    commands += ["classify --help", "serve --help", "app --help", "export --help", "convert --help", "parity --help"]
    for command, modules in imported(*commands, cwd=place).items():
        assert not modules & HEAVY, command


def test_predict_imports_what_a_model_needs(place):
    (modules,) = imported("predict photo.jpg --model model", cwd=place).values()
    assert {"torch", "transformers", "open_clip"} <= modules  # which import timm, scipy and wandb themselves
    unused = {"lightning", "torchmetrics", "matplotlib", "hydra", "webdataset", "optuna", "pandas", "HanTa"}
    assert not modules & unused
